"""Documents for fuzz.py: sound text, HTML and PDF files, how longrun reads them, and what is right without it.

What is compared are words, for how they are set out is a matter of taste:

    questions  Python's json, line by line, for files whose first line is JSON; any line of another file is a question
    text    Python's own decoding by the byte order mark
    html    the text that lxml's parser finds, without what a browser does not show
    pdf     a regular expression over the file, whose page contents are not compressed. Fewer words, but no others, are
            right where a notice says so, or where the damage is in a page's content, of which every viewer shows what
            it understands
"""

from __future__ import annotations

import codecs
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from longrun.chat.questions import read_questions
from longrun.documents.archive import read_archive
from longrun.documents.find import read_documents
from scripts.fuzz_mutations import damage_json

_HTML = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>The lighthouse</title><style>p { color: red }</style>
<script>var hidden = "<p>not text</p>";</script></head><body><h1>Letters &amp; numbers</h1><p>The keeper wrote <b>27</b>
letters to <a href="https://example.org/x">the harbour</a>, na&iuml;vely.<p>Second<br>line<ul><li>oil<li>wick</ul>
<table><tr><th>month</th><th>ships</th></tr><tr><td>May</td><td>12</td></tr></table><pre>if a &lt; b:
    go()</pre><!-- a comment --></body></html>
"""
_HIDDEN = ("script", "style", "template", "noscript")
_PAGES = (("The keeper wrote 27 letters", "to the harbour"), ("Second page", "with nine ships"))
_CONTENT = re.compile(
    r"<< /Length \d+ >>\nstream\nBT /F1 12 Tf 72 720 Td (\([ -'*-~]*\) Tj( 0 -20 Td )?)+ ET\nendstream"
)
_ARCHIVED = {"code/main.py": "print(27)\n" * 40, "code/notes/ships.txt": "nine ships, naïvely\n", "a.txt": "the keeper"}
Words = tuple[list[str], bool]
Archived = list[tuple[str, str, list[str]]]


def make_documents(base: Path) -> None:
    """Folders `text`, `html`, `pdf`, `questions` and `archive` with a file or more each."""
    for name in ("text", "html", "pdf", "questions", "archive"):
        (base / name).mkdir()
    (base / "text" / "a.txt").write_text("The keeper wrote 27 letters, naïvely.\n", encoding="utf-8")
    (base / "text" / "b.txt").write_text("To the harbour: 灯台 🙂\n", encoding="utf-16")
    questions = [{"question": "Who wrote?", "id": "a"}, {"question": "How many letters?", "id": 2}, "Where to?"]
    (base / "questions" / "q.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    (base / "html" / "page.html").write_text(_HTML, encoding="utf-8")
    (base / "pdf" / "two.pdf").write_bytes(make_pdf(_PAGES))
    for mode, name in (("w", "code.tar"), ("w:gz", "code.tar.gz")):
        with tarfile.open(base / "archive" / name, mode) as archive:
            for file, text in _ARCHIVED.items():
                entry = tarfile.TarInfo(file)
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
    with zipfile.ZipFile(base / "archive" / "code.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in _ARCHIVED.items():
            archive.writestr(file, text)


def make_pdf(pages: tuple[tuple[str, ...], ...]) -> bytes:
    """A PDF file, not compressed, with a page for each tuple of lines; the lines are ASCII without parentheses."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, lines in enumerate(pages):
        content = "BT /F1 12 Tf 72 720 Td " + " 0 -20 Td ".join(f"({line}) Tj" for line in lines) + " ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            f"/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    made, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, start=1):
        places.append(len(made))
        made += f"{number} 0 obj\n{text}\nendobj\n".encode("latin-1")
    rows = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = (
        f"xref\n0 {size}\n0000000000 65535 f \n{rows}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(made)}\n"
    )
    return made + f"{end}%%EOF\n".encode()


def use_text(folder: Path) -> Words:
    """The words that longrun reads, and whether it told of anything that it did not."""
    return _read(folder / "a.txt", folder / "b.txt")


def use_questions(folder: Path) -> list[tuple[str, str | int | None]]:
    """What `--ask` would answer."""
    return [(question.text, question.id) for question in read_questions(folder / "q.jsonl")]


def expected_questions(folder: Path) -> list[tuple[str, str | int | None]]:
    """By Python's json."""
    lines = [line.strip() for line in _decoded((folder / "q.jsonl").read_bytes()).split("\n") if line.strip()]
    try:
        is_json = lines[0].startswith("{") or isinstance(json.loads(lines[0]), str)
    except ValueError:
        is_json = False
    items = [_unique_object(line) if is_json else {"question": line} for line in lines]
    assert all(item.keys() <= {"question", "id"} for item in items)
    assert all(isinstance(item["question"], str) and item["question"].strip() for item in items)
    assert all(type(item.get("id")) in (str, int, type(None)) for item in items)
    return [(item["question"].strip(), item.get("id")) for item in items]


def _unique_object(line: str) -> dict:
    def pairs(found: list) -> dict:
        assert len(dict(found)) == len(found)
        return dict(found)

    item = json.loads(line, object_pairs_hook=pairs)
    return item if isinstance(item, dict) else {"question": item}


def use_html(folder: Path) -> Words:
    """As `use_text`."""
    return _read(folder / "page.html")


def use_pdf(folder: Path) -> Words:
    """As `use_text`."""
    return _read(folder / "two.pdf")


def use_archive(folder: Path) -> Archived:
    """Archive, name and words of each file that longrun reads."""
    return [
        (file.name, text.name, _words(text.text))
        for file in sorted(folder.iterdir())
        for text in read_archive(file.read_bytes(), file.name, 10**6).texts
    ]


def expected_archive(folder: Path) -> Archived:
    """By Python's own readers, without hidden files and those that hold no text."""
    found = []
    for file in sorted(folder.iterdir()):
        entries = {str(PurePosixPath(name)): raw for name, raw in _entries(file)}
        for name, raw in sorted(entries.items()):
            parts = PurePosixPath(name).parts
            assert parts
            if name.startswith("/") or any(part.startswith(".") for part in parts):
                continue
            try:
                found.append((file.name, name, _words(_decoded(raw))))
            except (AssertionError, UnicodeDecodeError):
                continue
    return found


def _entries(file: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and entry.external_attr >> 28 in (0, 8):
                    yield entry.filename, archive.read(entry)
        return
    with tarfile.open(file) as archive:
        for entry in archive:
            if entry.isreg() and not entry.issparse():
                yield entry.name, archive.extractfile(entry).read()  # type: ignore[union-attr]


def _read(*files: Path) -> Words:
    found = read_documents(files)
    return [word for text in found.texts for word in _words(text.text)], bool(found.notices)


def expected_text(folder: Path) -> Words:
    """By Python's codecs."""
    return [word for name in ("a.txt", "b.txt") for word in _words(_decoded((folder / name).read_bytes()))], False


def expected_html(folder: Path) -> Words:
    """By lxml's parser, as it goes through the text."""
    from lxml import etree

    parser = etree.HTMLParser(target=_Shown(), huge_tree=True)
    parser.feed(_decoded((folder / "page.html").read_bytes()))
    return _words(parser.close()), False


class _Shown:
    """Collects the text that a parser meets outside elements that a browser does not show."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._hidden = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._hidden += tag in _HIDDEN
        self._text.append(" ")

    def end(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        self._text.append(" ")

    def data(self, text: str) -> None:
        if not self._hidden:
            self._text.append(text)

    def close(self) -> str:
        return "".join(self._text)


def expected_pdf(folder: Path) -> Words:
    """The strings that page contents show, in the order of the pages; and whether a content is damaged."""
    raw = (folder / "two.pdf").read_bytes().decode("latin-1")
    objects = dict(re.findall(r"(\d+) 0 obj\n(.*?)\nendobj", raw, re.DOTALL))
    words: list[str] = []
    damaged = False
    for page in re.findall(r"(\d+) 0 R", re.search(r"/Kids \[(.*?)\]", objects["2"])[1]):  # type: ignore[index]
        content = objects[re.search(r"/Contents (\d+) 0 R", objects[page])[1]]  # type: ignore[index]
        words += [word for line in re.findall(r"\(([^()]*)\) (?:Tj|')", content) for word in _words(line)]
        damaged |= _CONTENT.fullmatch(content) is None
    assert words
    return words, damaged


def same_words(ours: Words, right: Words) -> bool:
    """The same words in the same order, wherever they are cut."""
    return "".join(ours[0]) == "".join(right[0])


def same_or_told(ours: Words, right: Words) -> bool:
    """The same words; or only some, where a notice says that something was not read, or the content is damaged."""
    return same_words(ours, right) or ((ours[1] or right[1]) and set(ours[0]) <= set(right[0]))


def damage_questions(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """`damage_json` of one line."""
    lines = content.decode().splitlines()
    at = rng.randrange(2)
    damaged, what = damage_json(rng, lines[at].encode())
    lines[at] = damaged.decode()
    return "\n".join(lines).encode(), f"line {at + 1}: {what}"


def damage_html(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Something at a tag that nests, never ends, hides, asks for much or is no character."""
    pieces = (
        "<div>" * 300, "<div>" * 20_000, "<b><p>" * 400, "<td colspan=1000000000>x</td>", "<!--", "<script>", "</html>",
        "<style>", "&#xD800;", "&#0;", "&#99999999999;", "&nosuch;", "<![CDATA[x]]>", "<p hidden>x</p>", "<table><td>",
        "<?php x ?>", "<svg><title>x</title></svg>", "</p>" * 1000, "<a href='" + "x" * 20_000 + "'>",
        "<textarea>", "<plaintext>", "<template>x</template>", "<p" + " a=1" * 5000 + ">",
    )  # fmt: skip
    text, piece = content.decode(), rng.choice(pieces)
    at = rng.choice([match.start() for match in re.finditer("<|$", text)])
    return (text[:at] + piece + text[at:]).encode(), f"html: {piece[:20]!r} at {at}"


def damage_pdf(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Another number, name or operator for one of the file."""
    text = content.decode("latin-1")
    match = rng.choice(list(re.finditer(r"/\w+|\b\d+\b|\b(?:Tj|BT|ET|Td|obj|stream|xref|R)\b", text)))
    values = (
        "0", "1", "2", "3", "4", "-1", "999999999", "10" * 20, "/FlateDecode", "/Kids", "/Pages", "/Filter", "null",
        "()", "[", "<<", ">>", "2 0 R", "[2 0 R]", "/Encrypt", "endobj", "stream", "Do", "'", "TJ", "q " * 2000,
        "[" * 5000,
    )  # fmt: skip
    value = rng.choice(values)
    return (text[: match.start()] + value + text[match.end() :]).encode("latin-1"), (
        f"pdf: {match.group()!r} at {match.start()} becomes {value[:20]!r}"
    )


def _decoded(raw: bytes) -> str:
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if raw.startswith(mark):
            text = raw[2:].decode(encoding)
            break
    else:
        assert b"\0" not in raw
        text = raw.decode("utf-8-sig")
    assert text.strip()
    return text


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
