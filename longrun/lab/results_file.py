"""A folder's results.json: one run at a time has it open, it is written whole, and nothing of a run that was killed is
left next to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrun.errors import InputError
from longrun.files.folder_lock import FolderLock
from longrun.files.whole_file import leftovers, write_whole

RESULTS_FILE = "results.json"


def claim_results(folder: Path) -> FolderLock:
    """Make the folder and own its results file, until the lock is released or nothing refers to it.

    Raises:
        InputError: another run has it open, or the folder cannot be made or written.
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
    except BaseException:
        lock.release()
        raise
    return lock


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
