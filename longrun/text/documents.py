"""Text files that are put in front of a question."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from longrun.errors import InputError
from longrun.paths import user_path


@dataclass(frozen=True)
class Document:
    """A text file as it was read.

    Attributes:
        name: the path as it was given.
        text: its content without trailing white space.
        sha256: hex digest of the file's bytes, by which it is known again.
    """

    name: str
    text: str
    sha256: str


def read_document(path: str | Path) -> Document:
    """Read a UTF-8 text file (a byte order mark is dropped).

    Raises:
        InputError: missing, a folder or a device, unreadable, empty, binary (a NUL byte) or not UTF-8; the message
            names the file, and the byte offset where there is one.
    """
    file = user_path(path, "file")
    try:
        if file.is_dir():
            raise InputError(f"{path} is a folder: name a text file in it")
        if file.is_block_device() or file.is_char_device():
            raise InputError(f"{path} is a device: name a text file")
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"file {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    nul = raw.find(b"\0")
    if nul >= 0:
        raise InputError(f"file {path} is binary (a NUL byte at byte {nul:,}): only UTF-8 text can be read")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").rstrip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"file {path} is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start:,}): convert it, for "
            f"example with iconv"
        ) from None
    if not text:
        raise InputError(f"file {path} is empty ({len(raw):,} bytes, no text): name a file with text in it")
    return Document(str(path), text, hashlib.sha256(raw).hexdigest())


def check_text(text: str, what: str) -> str:
    """Return `text`, which was typed or given as an argument.

    Raises:
        InputError: it holds bytes that are not UTF-8 (Python keeps such bytes as lone surrogates).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise InputError(
            f"{what} is not UTF-8 (byte 0x{byte:02x} after {error.start:,} characters): convert it, for example with "
            f"iconv"
        ) from None
    return text
