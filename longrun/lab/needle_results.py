"""The results file of a needle sweep: written whole after every cell, so that the next run can resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrun.errors import InputError
from longrun.files.folder_lock import FolderLock
from longrun.files.user_files import RESULTS_BYTES, read_object
from longrun.lab.results_file import RESULTS_FILE, open_results, refuse_changes, write_results

FORMAT = 1


class SweepResults:
    """`results.json` in a folder: what was run with which settings, and the cells finished so far.

    Attributes:
        head: everything but the cells (model, settings, versions, device, notes); JSON-able.
        cells: finished cells in the order they were run.
    """

    def __init__(self, folder: Path, head: dict[str, Any], cells: list[dict[str, Any]]) -> None:
        self.folder, self.head, self.cells = folder, head, cells
        self._lock: FolderLock | None = None
        self._done = {_key(cell["setting"], cell["length"], cell["depth"]): cell for cell in cells}

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], force: bool = False) -> SweepResults:
        """Start in `folder`, or resume with the cells it holds if they were run with the same settings.

        Args:
            settings: JSON-able; compared key by key with the file's.
            force: drop what another sweep left there.

        No other run may open it until this object is gone.

        Raises:
            InputError: another run has it open, the folder cannot be written, or it holds a damaged file or other
                settings (the first is named).
        """
        return open_results(folder, lambda: cls._open(folder, settings, force))

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], force: bool) -> SweepResults:
        path = folder / RESULTS_FILE
        if force or not path.exists():
            return cls(folder, {"format": FORMAT, "settings": settings}, [])
        try:
            found = read_object(path, InputError, "it holds no results", RESULTS_BYTES)
            cells, earlier = found.pop("cells"), found["settings"]
            results = cls(folder, found, cells)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read as a needle sweep's results: use another --out, or --force to start over"
            ) from error
        keys = sorted({*settings, *earlier})
        refuse_changes(folder, ((key, earlier.get(key), settings.get(key)) for key in keys))
        return results

    def get(self, setting: str, length: int, depth: float) -> dict[str, Any] | None:
        """The finished cell, or None."""
        return self._done.get(_key(setting, length, depth))

    def add(self, cell: dict[str, Any]) -> None:
        """Take in a finished cell and write the file."""
        self.cells.append(cell)
        self._done[_key(cell["setting"], cell["length"], cell["depth"])] = cell
        self.write()

    def write(self) -> None:
        """Write the file, see `write_results`."""
        write_results(self.folder, {**self.head, "cells": self.cells})


def _key(setting: str, length: int, depth: float) -> tuple[str, int, float]:
    return setting, int(length), round(float(depth), 6)
