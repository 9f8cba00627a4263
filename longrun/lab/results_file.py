"""A folder's results.json: one run at a time has it open, it is written whole, and nothing of a run that was killed is
left next to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from longrun.errors import InputError
from longrun.files.folder_lock import FolderLock
from longrun.files.whole_file import leftovers, write_whole

RESULTS_FILE = "results.json"


class Owning(Protocol):
    """Results that own their file while they exist."""

    _lock: FolderLock | None


Results = TypeVar("Results", bound=Owning)


def open_results(folder: Path, read: Callable[[], Results]) -> Results:
    """Make the folder, own its results file until nothing refers to what `read` returns, and read it.

    Raises:
        InputError: another run has it open, or the folder cannot be made or written; or as `read`.
    """
    path = folder / RESULTS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made ({error.strerror}): choose another --out") from error
    lock = FolderLock(
        folder / f".{RESULTS_FILE}.lock", f"{path}", InputError, "wait for that run", "give another --out"
    )
    try:
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        results = read()
    except BaseException:
        lock.release()
        raise
    results._lock = lock
    return results


def refuse_changes(folder: Path, changes: Iterable[tuple[str, Any, Any]]) -> None:
    """Compare what a run was started with, (key, then, now), JSON-able, with what it is resumed with.

    Raises:
        InputError: they differ; the first is named.
    """
    for key, then, now in changes:
        if then != now:
            raise InputError(
                f"{folder / RESULTS_FILE} was run with {key} = {json.dumps(then)}, now it is {json.dumps(now)}: use "
                f"another --out, or --force to start over"
            )


def write_results(folder: Path, content: dict[str, Any]) -> None:
    """Write the file: complete or not at all.

    Raises:
        InputError: the disk is full or the folder is not writable; the earlier file is intact.
    """
    path = folder / RESULTS_FILE
    try:
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): free the disk or choose --out") from error
