"""HTML as text: headings, lists, tables and code as Markdown writes them, without scripts and targets of links."""

from __future__ import annotations

import re
from typing import Any

from longrun.documents.decoding import ENCODING_ADVICE, NoTextError, decoded
from longrun.units import format_bytes

MAX_HTML_BYTES = 2**25  # the tree of a page takes a hundred times its bytes

_SUFFIXES = (".html", ".htm", ".xhtml")
_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html[\s>])", re.IGNORECASE)
_CHARSET = re.compile(rb"<meta[^>]*charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_PLAIN = ["a", "img", "b", "strong", "i", "em", "u", "s", "del", "sub", "sup"]


def is_html(raw: bytes, name: str) -> bool:
    """Whether a file is HTML, by its name or by how it begins."""
    return name.lower().endswith(_SUFFIXES) or _BEGINS.match(raw) is not None


def html_text(raw: bytes, name: str) -> str:
    """The text of an HTML file, in UTF-8, UTF-16 with a byte order mark, or the encoding that its head names.

    Raises:
        NoTextError: no text in it, an encoding that is not known or not the file's, tags nested too deep, more than
            `MAX_HTML_BYTES`.
    """
    if len(raw) > MAX_HTML_BYTES:
        raise NoTextError(
            f"file {name} holds {format_bytes(len(raw))} of HTML, and at most {format_bytes(MAX_HTML_BYTES)} can be "
            f"read: cut it into parts",
            "too large",
        )
    try:
        text = _converter().convert(html_source(raw, name)).strip()
    except RecursionError:
        raise NoTextError(
            f"file {name} nests its HTML tags too deep (some hundred levels): save it as text", "too deeply nested"
        ) from None
    if not text:
        raise NoTextError(
            f"file {name} is HTML without text ({len(raw):,} bytes): name a file with text in it", "empty"
        )
    return text.encode("utf-8", "replace").decode()


def html_source(raw: bytes, name: str) -> str:
    """An HTML file as it is written, in an encoding that `html_text` takes.

    Raises:
        NoTextError: it is empty, or of another encoding.
    """
    try:
        return decoded(raw, name)
    except NoTextError:
        found = _CHARSET.search(raw[:1024])
        if found is None or not raw.strip() or b"\0" in raw:
            raise
    encoding = found[1].decode("ascii", "replace")
    try:
        return raw.decode(encoding)
    except (LookupError, ValueError):
        raise NoTextError(
            f"file {name} is not UTF-8, nor {encoding[:40]}, which its head names: {ENCODING_ADVICE}", "not UTF-8"
        ) from None


def _converter() -> Any:
    from markdownify import MarkdownConverter  # its parser takes a while to import

    class Converter(MarkdownConverter):
        """Leaves out what a browser does not show."""

        def convert_template(self, el: Any, text: str, parent_tags: Any) -> str:
            return ""

        convert_noscript = convert_template

    return Converter(bs4_options="lxml", heading_style="atx", strip=_PLAIN, escape_asterisks=False,
                     escape_underscores=False)  # fmt: skip
