"""A process of its own that reads the text of one PDF file, with a limit on time and memory: a file of a few kilobytes
may ask for hours and for more memory than there is. `longrun.documents.pdf_text` starts it.

Run by path: a line of JSON (the limits) and then the file on stdin, one JSON object on stdout; nothing of longrun's is
imported.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any


class _Faults(logging.Handler):
    """Keeps what pypdf says while it mends a damaged file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.said) < 10:
            self.said.append(record.getMessage()[:200])


def read_pages(raw: bytes) -> dict[str, Any]:
    """{"pages": [text, ...], "faults": [...]}, or {"refused": why}."""
    faults = _Faults()
    logger = logging.getLogger("pypdf")
    logger.addHandler(faults)
    logger.propagate = False
    try:
        from pypdf import PdfReader

        if b"%PDF-" not in raw[:1024]:
            return {"refused": "it does not begin as a PDF file does"}
        reader = PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):
            return {"refused": "it is encrypted with a password"}
        pages = [page.extract_text() for page in reader.pages]
        promised = reader.root_object["/Pages"]["/Count"]
        if len(pages) != promised:
            faults.said.append(f"its catalog promises {promised} pages and {len(pages)} are there")
    except MemoryError:
        return {"refused": "it needs more memory than a file of its size may"}
    except RecursionError:
        return {"refused": "its objects are nested too deep"}
    except Exception as error:  # pypdf raises what a damaged file makes it meet
        return {"refused": f"{type(error).__name__}: {error}"[:1000]}
    sound = [page.encode("utf-8", "replace").decode().replace("\0", "") for page in pages]
    return {"pages": sound, "faults": faults.said}


def main() -> None:
    import resource

    request = sys.stdin.buffer
    limits = json.loads(request.readline())
    for limit, name in ((resource.RLIMIT_CPU, "cpu_seconds"), (resource.RLIMIT_AS, "memory_bytes")):
        _, hard = resource.getrlimit(limit)
        value = limits[name] if hard == resource.RLIM_INFINITY else min(limits[name], hard)
        resource.setrlimit(limit, (value, value))
    json.dump(read_pages(request.read()), sys.stdout)


if __name__ == "__main__":
    main()
