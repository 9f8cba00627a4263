"""Parts of a text of several files are parts of the files, for every range of bytes."""

from __future__ import annotations

from longrun.documents.document import Document
from longrun.documents.parts import FilePart, file_names, file_part, joined

FILES = [("a.py", "x = 1\n\ny = 'é漢'"), ("src/b c.txt", "one\ntwo\n==> no <==\nthree"), ("é.md", "last")]
DOCUMENTS = [Document(name, text, "", headed=True) for name, text in FILES]
TEXT = "==> a.py <==\nx = 1\n\ny = 'é漢'\n\n==> src/b c.txt <==\none\ntwo\n==> no <==\nthree\n\n==> é.md <==\nlast"


def test_every_range_is_found_where_it_was_put() -> None:
    assert joined(DOCUMENTS) == TEXT and file_names(TEXT) == [name for name, _ in FILES]
    owners: list[tuple[int, int]] = []  # of each byte: its file, and its place in that file, negative in a header
    for number, document in enumerate(DOCUMENTS):
        header = len(document.header.encode())
        owners += [(number, place - header) for place in range(len(document.shown.encode()))]
        owners += [(-1, 0)] * 2 if number < 2 else []
    assert len(owners) == len(TEXT.encode())
    for first in range(len(owners)):
        for stop in range(first + 1, len(owners) + 1, 5):
            counts = [sum(owner == number for owner, _ in owners[first:stop]) for number in range(3)]
            if sorted(counts)[-1] == sorted(counts)[-2]:
                continue
            number = counts.index(max(counts))
            places = [place for owner, place in owners[first:stop] if owner == number]
            raw = FILES[number][1].encode()
            begin, end = max(places[0], 0), max(places[-1] + 1, 0)
            lines = raw[:begin].count(b"\n") + 1, raw[:end].count(b"\n") + 1
            assert file_part(TEXT, first, stop) == FilePart(FILES[number][0], lines, (begin, end))


def test_a_text_without_a_header_at_its_beginning_holds_no_files() -> None:
    assert file_part("hello\n\n==> a <==\nx", 0, 3) is None and file_names("hello\n\n==> a <==\nx") == []
