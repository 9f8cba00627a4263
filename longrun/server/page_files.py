"""The local page's own files, and the headers that keep it to itself: no other origin, no script within the text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Request, Response

_FOLDER = Path(__file__).parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

PAGE_FILES = {"/" if path.name == "index.html" else f"/page/{path.name}": path for path in sorted(_FOLDER.iterdir())}
"""The page's files by the path at which they are served, without a key: they hold no secret."""


def page_file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """What serves one of `PAGE_FILES`."""
    content, kind = path.read_bytes(), _KINDS[path.suffix]

    async def respond(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return respond
