"""Bytes of a file as text: UTF-8, and UTF-16 with a byte order mark. No other encoding is guessed."""

from __future__ import annotations

import codecs

from longrun.errors import InputError

_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
ENCODING_ADVICE = "convert it to UTF-8, for example with iconv"


class NoTextError(InputError):
    """A file that holds no text, or none that can be read.

    Attributes:
        kind: why, in a word or two that stand before "files": "binary", "empty", "unreadable", "not UTF-8".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def decoded(raw: bytes, name: str) -> str:
    """The text without a byte order mark and trailing white space.

    Raises:
        NoTextError: empty, binary (a NUL byte that is not UTF-16's), in another encoding, or damaged UTF-8 or UTF-16.
    """
    if raw.startswith(_UTF_32):
        raise NoTextError(f"file {name} is UTF-32 by its byte order mark: {ENCODING_ADVICE}", "not UTF-8")
    encoding, start = "utf-8", 3 if raw.startswith(codecs.BOM_UTF8) else 0
    if raw[:2] in _UTF_16:
        encoding, start = _UTF_16[raw[:2]], 2
    elif (nul := raw.find(b"\0")) >= 0:
        raise NoTextError(
            f"file {name} is binary (a NUL byte at byte {nul:,}): only text can be read, as UTF-8 or as UTF-16 with a "
            f"byte order mark",
            "binary",
        )
    try:
        text = raw[start:].decode(encoding).rstrip()
    except UnicodeDecodeError as error:
        at = start + error.start
        shown = "UTF-8" if encoding == "utf-8" else "the UTF-16 that its byte order mark promises"
        raise NoTextError(
            f"file {name} is not {shown} (byte 0x{raw[at]:02x} at byte {at:,}): {ENCODING_ADVICE}", "not UTF-8"
        ) from None
    if not text:
        raise NoTextError(f"file {name} is empty ({len(raw):,} bytes, no text): name a file with text in it", "empty")
    return text
