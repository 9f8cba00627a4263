"""Puts files or a folder of code into a running server (`python -m longrun.server --documents KEPT`) as one document,
and waits until it is read. A folder is packed without what .gitignore names and without hidden files.

stdout gets the id of the model to ask; progress and what was left out go to stderr.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longrun.cli import Parser, run
from longrun.documents.decoding import NoTextError, decoded
from longrun.documents.document import read_file
from longrun.documents.find import files_named
from longrun.documents.html_text import is_html
from longrun.documents.left_out import LeftOut
from longrun.documents.pdf_text import is_pdf
from longrun.errors import InputError, LongrunError, short_path
from longrun.specs.prefill_spec import PREFILL_MODES

_POLL_SECONDS = 0.5


def packed(paths: Sequence[str | Path]) -> tuple[bytes, str, str | None]:
    """What is put for these paths, its type of content, and what was left out: a file as it is; several, or a folder's,
    as tar.gz, without those that hold no text.

    Raises:
        InputError: see `longrun.documents.find.read_documents`, or a hidden file that is named itself.
    """
    files = files_named(paths)
    if len(paths) == 1 and [Path(paths[0])] == [file for file, _ in files]:
        raw = read_file(paths[0])
        kind = "application/pdf" if is_pdf(raw, str(paths[0])) else "text/html" if is_html(raw, str(paths[0])) else None
        return raw, kind or "text/plain", None
    out, names, left_out = io.BytesIO(), set[str](), LeftOut(str(paths[0]) if len(paths) == 1 else "the files")
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for file, name in files:
            info = tarfile.TarInfo(_name_within(name))
            if info.name in names:
                raise InputError(f"two files would be called {short_path(info.name)}: name a folder that holds both")
            names.add(info.name)
            try:
                raw = read_file(file)
                if not is_pdf(raw, name) and not is_html(raw, name):
                    decoded(raw, name)
            except NoTextError as error:
                left_out.add(error.kind, name)
                continue
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue(), "application/gzip", left_out.notice()


def _name_within(name: str) -> str:
    """A document's name as a path in an archive."""
    path = Path(name)
    path = Path(path.name) if path.is_absolute() else Path(*(part for part in path.parts if part != ".."))
    if any(part.startswith(".") for part in path.parts):
        raise InputError(f"{short_path(name)} is hidden, and a server reads no hidden files: copy it to another name")
    return path.as_posix()


def name_for(paths: Sequence[str | Path]) -> str:
    """A document's name after the first path."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(paths[0]).resolve().name).strip(".-")
    return name[:100] or "document"


def note(console: Console, text: str) -> None:
    """A sentence for a person."""
    console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def put(
    client: httpx.Client, name: str, raw: bytes, kind: str, console: Console, prefill: str | None = None
) -> dict[str, Any]:
    """Put the document and wait until it is read, with a bar; returns its status.

    Raises:
        LongrunError: the server refuses it, or cannot read it.
    """
    how = {} if prefill is None else {"prefill": prefill}
    told = _answer(client.put(f"/documents/{name}", content=raw, headers={"Content-Type": kind}, params=how))
    for notice in told["notices"]:
        note(console, notice)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(told["state"], total=told["tokens"])
        while told["state"] in ("queued", "reading"):
            time.sleep(_POLL_SECONDS)
            told = _answer(client.get(f"/documents/{name}"))
            progress.update(task, description=told["state"], completed=told["tokens_done"], total=told["tokens"])
        progress.update(task, description=told["state"], completed=told["tokens_done"])
    if told["state"] != "ready":
        raise LongrunError(f"document {name} is {told['state']}: {told['error']}")
    return told


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        told = response.json()
    except ValueError:
        raise LongrunError(f"no server of longrun answers here (status {response.status_code}): check --url") from None
    if response.status_code >= 400:
        raise LongrunError(f"the server refused: {told['error']['message']}")
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Put it, wait, and say how to ask."""
    parser = Parser(prog="python scripts/put_document.py", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="file, folder, or pattern in quotes, as the chat takes"
    )
    parser.add_argument("--name", help="of the document (default: the first path's)")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: http://127.0.0.1:8000/v1")
    parser.add_argument("--prefill", choices=PREFILL_MODES, help="how it is read (default: as the server reads)")
    args = parser.parse_args(argv)
    raw, kind, left_out = packed(args.paths)
    console = Console(stderr=True)
    if left_out is not None:
        note(console, left_out)
    name = args.name or name_for(args.paths)
    headers = {"Authorization": f"Bearer {os.environ.get('LONGRUN_API_KEY', 'none')}"}
    root = args.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=root, headers=headers, timeout=600) as client:
            put(client, name, raw, kind, console, args.prefill)
            models = _answer(client.get("/v1/models"))["data"]
    except httpx.HTTPError as error:
        raise InputError(f"no server answers at {args.url} ({error}): start one, or name it by --url") from error
    print(next(model["id"] for model in models if model["id"].endswith(f"@{name}")))


if __name__ == "__main__":
    run(main)
