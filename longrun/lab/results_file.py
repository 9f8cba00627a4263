"""A folder's results.json: one run at a time has it open, and nothing of a run that was killed is left beside it."""

from __future__ import annotations

from pathlib import Path

from longrun.errors import InputError
from longrun.files.folder_lock import FolderLock
from longrun.files.whole_file import leftovers

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
