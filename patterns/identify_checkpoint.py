"""Progress of an unfinished identification: a small folder beside the map, from which a rerun goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longrun.errors import InputError, shortened
from longrun.user_files import parse_object, read_object

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

    Raises:
        InputError: the folder holds the progress of other settings (the keys that differ are named), or it cannot be
            read.
    """

    def __init__(self, folder: str | Path, deciding: Mapping[str, Any], save_every: int = 1, force: bool = False):
        self.folder = Path(folder)
        self._deciding = json.loads(json.dumps(dict(deciding)))
        self._save_every = save_every
        self._prepare(force)

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
                _write(self.folder / _SETTINGS, json.dumps(self._deciding, indent=2).encode())
            fresh = self.folder / f".{_STATE}.new"
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, fresh, metadata={_FACTS: json.dumps(dict(facts))})
            os.replace(fresh, self.folder / _STATE)
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
        """Drop the folder: the map is written, or other settings take over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self, force: bool) -> None:
        path = self.folder / _SETTINGS
        if not path.exists():
            return
        try:
            saved = read_object(path, InputError, f"delete {self.folder} to start again")
        except InputError:
            if force:
                self.remove()
                return
            raise
        if saved == self._deciding:
            return
        if force:
            self.remove()
            return
        differing = [key for key in {**saved, **self._deciding} if saved.get(key) != self._deciding.get(key)]
        shown = ", ".join(
            f"{key} {_short(saved.get(key))} there, {_short(self._deciding.get(key))} here" for key in differing
        )
        raise InputError(
            f"{self.folder} holds the progress of other settings ({shown}): give the same settings to go on, another "
            f"--out, or --force to start again"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(data)
    os.replace(fresh, path)
