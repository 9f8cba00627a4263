"""PDF as text, read in a process of its own with limits (see `longrun.documents.pdf_child`)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longrun.documents.decoding import NoTextError
from longrun.errors import shortened

CPU_SECONDS, CPU_SECONDS_PER_MB = 15, 60
MEMORY_BYTES, MEMORY_BYTES_PER_BYTE = 2**30, 16


def is_pdf(raw: bytes, name: str) -> bool:
    """Whether a file is PDF, by its name or by how it begins."""
    return name.lower().endswith(".pdf") or raw[:1024].lstrip().startswith(b"%PDF-")


def pdf_text(raw: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """The text of a PDF file, page by page with an empty line between, and what a person should be told of it.

    Raises:
        NoTextError: damaged, encrypted, without text (pages that were scanned), or it takes more time or memory than
            one of its size may.
    """
    limits = {
        "cpu_seconds": int(CPU_SECONDS + CPU_SECONDS_PER_MB * len(raw) / 10**6),
        "memory_bytes": MEMORY_BYTES + MEMORY_BYTES_PER_BYTE * len(raw),
    }
    answer = _in_child(json.dumps(limits).encode() + b"\n" + raw)
    if "refused" in answer:
        raise NoTextError(
            f"file {name} is PDF that cannot be read ({shortened(answer['refused'], 160)}): print it into a new PDF "
            f"file, or save it as text",
            "damaged",
        )
    pages: list[str] = answer["pages"]
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise NoTextError(
            f"file {name} is PDF without text on its {len(pages):,} pages (scanned ones need OCR first): name a file "
            f"with text in it",
            "empty",
        )
    notices = []
    if empty := sum(not page.strip() for page in pages):
        notices.append(f"{empty:,} of {len(pages):,} pages of {name} hold no text: images are not read")
    if answer["faults"]:
        notices.append(f"{name} is damaged PDF, read as far as it goes ({shortened(answer['faults'][0], 100)})")
    return text, tuple(notices)


def _in_child(request: bytes) -> dict[str, Any]:
    found = [find_spec(package) for package in ("pypdf", "typing_extensions")]
    folders = sorted({_folder_of(spec) for spec in found if spec is not None and spec.origin})
    child = str(Path(__file__).with_name("pdf_child.py"))
    code = f"import sys, runpy; sys.path += {folders!r}; runpy.run_path({child!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        input=request,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode < 0:
        return {"refused": "it takes more time or memory than a file of its size may"}
    if done.returncode:
        return {"refused": " ".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])}
    return json.loads(done.stdout)


def _folder_of(spec: Any) -> str:
    return str(Path(spec.origin).parents[1 if spec.submodule_search_locations else 0])
