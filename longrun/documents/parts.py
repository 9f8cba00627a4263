"""Several documents as one text, and back: which file, and which lines of it, a part of that text stands in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from longrun.documents.document import Document

_BETWEEN = "\n\n"
_HEADER = re.compile(rb"(?:\A|(?<=\n\n))==> (.+) <==\n")


@dataclass(frozen=True)
class FilePart:
    """A part of one file of a text that holds several.

    Attributes:
        name: the file's, as its header has it.
        lines: first and last line of the file, from 1.
        bytes: [first, stop) of the file's text in UTF-8.
    """

    name: str
    lines: tuple[int, int]
    bytes: tuple[int, int]


def joined(documents: Sequence[Document]) -> str:
    """The documents as the model reads them, one below the other with an empty line between."""
    return _BETWEEN.join(document.shown for document in documents)


def file_part(text: str, first: int, stop: int) -> FilePart | None:
    """Where bytes [first, stop) of a text in UTF-8 stand: in the file that holds most of them.

    A header counts to the file below it, at that file's beginning. A line of a file that looks like a header, below an
    empty one, is taken for one (`file_names` tells of it).

    Args:
        text: what `joined` made.

    Returns:
        None for a text that does not begin with a file's header.
    """
    raw = text.encode()
    headers = _headers(raw)
    if not headers:
        return None
    stops = [*(header.start() - len(_BETWEEN) for header in headers[1:]), len(raw)]

    def held(number: int) -> int:
        return min(stop, stops[number]) - max(first, headers[number].start())

    number = max(range(len(headers)), key=held)
    begin = headers[number].end()
    content = raw[begin : stops[number]]
    start = min(max(first - begin, 0), len(content))
    end = min(max(stop - begin, start), len(content))
    line = content.count(b"\n", 0, start) + 1
    return FilePart(headers[number][1].decode(), (line, line + content.count(b"\n", start, end)), (start, end))


def file_names(text: str) -> list[str]:
    """The files whose headers `file_part` sees, in order; none for a text that does not begin with one."""
    return [header[1].decode() for header in _headers(text.encode())]


def _headers(raw: bytes) -> list[re.Match[bytes]]:
    found = list(_HEADER.finditer(raw))
    return found if found and found[0].start() == 0 else []
