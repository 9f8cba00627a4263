"""One file, or what stdin holds, as a text that is put in front of a question."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from longrun.documents.decoding import NoTextError, decoded
from longrun.documents.html_text import html_source, html_text, is_html
from longrun.documents.pdf_text import is_pdf, pdf_text
from longrun.errors import InputError, shortened
from longrun.paths import user_path
from longrun.units import format_bytes

MAX_BYTES = 2**29
"""Of all documents of a message: far above the tokens that a machine has room for."""


PIPED = "stdin"
"""Name of the document that stdin holds."""


@dataclass(frozen=True)
class Document:
    """A text as it was read.

    Attributes:
        name: the path as it was given; of a file found in a folder or by a pattern, the path from the working folder,
            or from that folder's parent where it stands elsewhere.
        text: its content without trailing white space.
        sha256: hex digest of the file's bytes, by which it is known again.
        headed: the model sees the name, in a line above the text.
        notices: sentences that a person should be shown: what of the file was not read.
    """

    name: str
    text: str
    sha256: str
    headed: bool = False
    notices: tuple[str, ...] = ()

    @property
    def header(self) -> str:
        """The line with the name that stands above the text of a document that is `headed`, with its line end."""
        return f"==> {shortened(self.name, 4096)} <==\n"

    @property
    def shown(self) -> str:
        """What the model reads."""
        return self.header + self.text if self.headed else self.text


def document_of(raw: bytes, name: str, headed: bool = False, markup: bool = False) -> Document:
    """The document that these bytes of a file are: PDF, HTML, or plain text.

    Args:
        markup: HTML is source code here, and stays as it is written.

    Raises:
        NoTextError: see `pdf_text`, `html_text` and `decoded`; the message calls it `name`.
    """
    notices: tuple[str, ...] = ()
    if is_pdf(raw, name):
        text, notices = pdf_text(raw, name)
    elif is_html(raw, name):
        text = html_source(raw, name).rstrip() if markup else html_text(raw, name)
    else:
        text = decoded(raw, name)
    return Document(name, text, hashlib.sha256(raw).hexdigest(), headed, notices)


def read_document(path: str | Path, name: str | None = None, headed: bool = False, markup: bool = False) -> Document:
    """Read a text, HTML or PDF file.

    Args:
        name: of the document; default: the path as it is given.
        markup: see `document_of`.

    Raises:
        InputError, NoTextError: see `read_file`.
        NoTextError: empty, binary (a NUL byte), in another encoding than UTF-8 and UTF-16, or PDF or HTML that cannot
            be read; the message names the file, and the byte offset where there is one.
    """
    return document_of(read_file(path), str(path) if name is None else name, headed, markup)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file that somebody named.

    Raises:
        InputError: missing, a folder or a device, larger than `MAX_BYTES`.
        NoTextError: unreadable.
    """
    file = user_path(path, "file")
    try:
        if file.is_dir():
            raise InputError(f"{path} is a folder: name a text file in it")
        if file.is_block_device() or file.is_char_device():
            raise InputError(f"{path} is a device: name a text file")
        with file.open("rb") as stream:
            return read_bytes(stream, f"file {path}")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NoTextError(f"file {path} cannot be read ({reason}): check its permissions", "unreadable") from error


def read_bytes(stream: BinaryIO, what: str) -> bytes:
    """All that the stream holds.

    Raises:
        InputError: more than `MAX_BYTES`.
    """
    raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise too_large(what, None)
    return raw


def too_large(what: str, size: int | None) -> InputError:
    """What to raise for more than `MAX_BYTES`; `size` in bytes, None where it is not known."""
    holds = f"more than {format_bytes(MAX_BYTES)}" if size is None else format_bytes(size)
    return InputError(f"{what} holds {holds}, and at most {format_bytes(MAX_BYTES)} can be read: give less text")
