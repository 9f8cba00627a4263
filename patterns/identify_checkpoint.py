"""Progress of an unfinished identification: a small folder next to the map, from which a rerun resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encoded
from torch import Tensor

from longrun.errors import HeadMapError, InputError, shortened
from longrun.files.folder_lock import FolderLock
from longrun.files.user_files import parse_object, read_object
from longrun.files.whole_file import leftovers, write_whole

_SETTINGS = "settings.json"
_STATE = "state.safetensors"
_FACTS = "facts"


class Checkpoint:
    """`OUT.partial/`: `settings.json`, by which a rerun knows its own, and `state.safetensors`.

    Args:
        folder: made by the first `save`.
        deciding: all that decides the result, as JSON types: settings, fingerprints of model and text, versions.
        save_every: steps between two saves.
        force: a folder of other settings is dropped rather than refused.

    From then on until `release` or `remove` no other process makes this map.

    Raises:
        HeadMapError: another process is making it.
        InputError: the folder holds the progress of other settings (the keys that differ are named), or it cannot be
            read.
    """

    def __init__(self, folder: str | Path, deciding: Mapping[str, Any], save_every: int = 1, force: bool = False):
        self.folder = Path(folder)
        self._deciding = json.loads(json.dumps(dict(deciding)))
        self._save_every = save_every
        self._lock = FolderLock(
            self.folder.with_name(f".{self.folder.name}.lock"), f"{self.folder}, the progress of a head map,",
            HeadMapError, "wait until that one is done", "name another folder",
        )  # fmt: skip
        try:
            self._prepare(force)
        except BaseException:
            self.release()
            raise

    def due(self, step: int) -> bool:
        """Whether progress should be saved after `step` steps (counted from 1)."""
        return step % self._save_every == 0

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the saved state by this one, whole or not at all.

        Args:
            tensors: any shapes and dtypes; copied to the CPU.
            facts: JSON types, such as the number of steps done.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _SETTINGS).exists():
                write_whole(self.folder / _SETTINGS, json.dumps(self._deciding, indent=2).encode())
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_whole(self.folder / _STATE, encoded(on_cpu, metadata={_FACTS: json.dumps(dict(facts))}))
        except OSError as error:
            raise InputError(
                f"progress cannot be saved to {self.folder} ({error.strerror or error}): free the disk or name another "
                f"folder with --out"
            ) from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors on the CPU, facts) as last saved, or None where nothing was.

        Raises:
            InputError: the state is damaged.
        """
        path = self.folder / _STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            advice = f"delete {self.folder} to start again"
            return tensors, parse_object(metadata[_FACTS], f"{_FACTS} of {path}", InputError, advice)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(
                f"{path} is damaged ({shortened(error, 160)}): delete {self.folder} to start again"
            ) from error

    def remove(self) -> None:
        """Drop the folder: the map is written."""
        self._drop()
        self.release()

    def release(self) -> None:
        """Let others resume from the progress saved."""
        self._lock.release()

    def _drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self, force: bool) -> None:
        path = self.folder / _SETTINGS
        for left in (*leftovers(path), *leftovers(self.folder / _STATE)):
            left.unlink(missing_ok=True)
        if not path.exists():
            return
        try:
            saved = read_object(path, InputError, f"delete {self.folder} to start again")
        except InputError:
            if force:
                self._drop()
                return
            raise
        if saved == self._deciding:
            return
        if force:
            self._drop()
            return
        differing = [key for key in {**saved, **self._deciding} if saved.get(key) != self._deciding.get(key)]
        shown = ", ".join(
            f"{key} {_short(saved.get(key))} there, {_short(self._deciding.get(key))} here" for key in differing
        )
        raise InputError(
            f"{self.folder} holds the progress of other settings ({shown}): give the same settings to resume, another "
            f"--out, or --force to start again"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
