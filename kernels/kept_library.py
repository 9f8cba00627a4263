"""A library compiled once and kept in a folder. It is code that this process will run, so it is loaded only if nobody
else could have written it and if every byte is what the compiler wrote: its name holds the checksum of its content.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

Compile = Callable[[Path], None]


def load_kept_library(name: str, folder: Path | None, compile_to: Compile) -> tuple[ctypes.CDLL, list[str]]:
    """The library, compiled where the folder holds none that may be loaded, and sentences on what was wrong.

    Args:
        name: of this source, compiler and processor; another one is another library.
        folder: where it is kept, made if need be; None or one that cannot be used: it is compiled for this process
            alone, in a private temporary folder.
        compile_to: writes the library to a path; what it raises goes through.

    Raises:
        OSError: the library cannot be loaded, or not even a temporary folder can be written.
    """
    notices: list[str] = []
    if folder is not None:
        try:
            _make_private(folder)
            kept = _find(name, folder, notices)
            return ctypes.CDLL(str(kept or _compile_into(name, folder, compile_to))), notices
        except (PermissionError, FileExistsError, NotADirectoryError, _NotWritten) as error:
            notices.append(f"{folder} cannot keep the compiled CPU kernels ({error}): they are compiled at every start")
    scratch = Path(tempfile.mkdtemp(prefix="longrun-"))  # only its owner may enter it
    try:
        compile_to(scratch / "kernels.so")
        return ctypes.CDLL(str(scratch / "kernels.so")), notices
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what is loaded stays loaded


class _NotWritten(Exception):
    """The folder takes no file; the message says why."""


def _fault_of(path: Path) -> str | None:
    """Why somebody else could have written what stands at `path`; None where nobody could."""
    found = os.lstat(path)
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode):
        return _fault_of(path.resolve(strict=True))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written by others"
    return None


def _make_private(folder: Path) -> None:
    """Make the folder; take others' right to write from one of our own.

    Raises:
        PermissionError, FileExistsError, NotADirectoryError, _NotWritten: it cannot be made, or is not ours.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.stat(folder)
        if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.chmod(folder, stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        fault = _fault_of(folder)
    except OSError as error:
        raise _NotWritten(error.strerror or str(error)) from error
    if fault is not None:
        raise PermissionError(f"it {fault}")


def _find(name: str, folder: Path, notices: list[str]) -> Path | None:
    """The library of this name, if one stands there that may be loaded; others of this name are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            fault = _fault_of(path)
            if fault is None:
                if path.stem.removeprefix(f"{name}-") == hashlib.sha256(path.read_bytes()).hexdigest():
                    return path
                fault = "is damaged"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        notices.append(f"{path} {fault}: it was not loaded, and the CPU kernels were compiled again")
        try:
            path.unlink()
        except OSError:
            continue
    return None


def _compile_into(name: str, folder: Path, compile_to: Compile) -> Path:
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".compiling-", dir=folder))
    except OSError as error:
        raise _NotWritten(error.strerror or str(error)) from error
    try:
        made = scratch / "kernels.so"
        compile_to(made)
        try:
            os.chmod(made, 0o700)
            path = folder / f"{name}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
            os.replace(made, path)
        except OSError as error:
            raise _NotWritten(error.strerror or str(error)) from error
        return path
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
