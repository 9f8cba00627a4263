"""The files of a head map: DuoAttention's folder, read with every fault named and written all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrun.errors import HeadMapError, quoted, short_path
from longrun.files.folder_lock import FolderLock
from longrun.files.user_files import read_object, read_text
from longrun.files.whole_file import fresh_path, leftovers
from longrun.patterns.head_split import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, check_window
from longrun.patterns.reach_losses import REACH_LOSSES_FILE, ReachLosses

SCORES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
_NUMBER = re.compile(r"\s*[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)\s*", re.ASCII | re.IGNORECASE)
IDENTIFICATION = "identification"
"""Key of `config.json` under which `longrun.patterns.identify` writes how the map was made."""


@dataclass(frozen=True)
class HeadMapOrigin:
    """What a map says of the model it was made for, as `longrun.patterns.identify` recorded it.

    Attributes:
        folder: the map.
        model, adapter: names of their folders; adapter None where there was none.
        model_fingerprint: of model and adapter together (`longrun.model.checkpoint.model_fingerprint`).
        weights_fingerprint: of the weights alone, or None in a map that does not say.
        adapter_sha256: the adapter's digest, or None where there was none.
    """

    folder: Path
    model: str
    model_fingerprint: str
    weights_fingerprint: str | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None


def read_scores(folder: Path) -> list[list[float]]:
    """Scores of `full_attention_heads.tsv` as they stand there, not yet checked for shape or range.

    Raises:
        HeadMapError: a missing folder or file, or a cell that is not a number (row and column named, from 1).
    """
    if not os.path.isdir(folder):
        raise HeadMapError(f"head map {short_path(folder)} is not a folder: give a folder that holds {SCORES_FILE}")
    path = folder / SCORES_FILE
    rows = []
    for row_number, line in enumerate(_read_text(path).rstrip().splitlines(), start=1):
        cells = line.rstrip().split("\t")
        rows.append([_number(cell, path, row_number, column) for column, cell in enumerate(cells, start=1)])
    return rows


def write_folder(
    target: Path,
    scores: Sequence[Sequence[float]],
    sink_size: int,
    recent_size: int,
    facts: Mapping[str, object],
    reach_losses: ReachLosses | None = None,
) -> None:
    """Write the map's files into a fresh folder next to `target` and let it take the name `target`.

    `facts` follow the window in `config.json`. Other files of an existing `target` are carried over; without
    `reach_losses` those of another map are not.

    Raises:
        HeadMapError: another process is writing it.
        OSError: `target` could not be written; what was there before is there still.
    """
    lock = FolderLock(
        target.with_name(f".{target.name}.lock"),
        f"head map {target}",
        HeadMapError,
        "wait for it",
        "name another folder",
    )
    try:
        _take_back(target)
        _replace_folder(target, scores, {"sink_size": sink_size, "recent_size": recent_size, **facts}, reach_losses)
    finally:
        lock.release()


def _take_back(target: Path) -> None:
    """Undo what a killed `_replace_folder` began. Only for the lock's owner."""
    for old in leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for fresh in leftovers(target, "new"):
        shutil.rmtree(fresh, ignore_errors=True)


def _replace_folder(
    target: Path, scores: Sequence[Sequence[float]], config: Mapping[str, object], reach_losses: ReachLosses | None
) -> None:
    fresh, old = fresh_path(target), fresh_path(target, "old")
    try:
        fresh.mkdir()
        if target.exists():
            shutil.copytree(target, fresh, symlinks=True, dirs_exist_ok=True)
        _write_synced(fresh / SCORES_FILE, "".join("\t".join(map(repr, row)) + "\n" for row in scores))
        _write_synced(fresh / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        (fresh / REACH_LOSSES_FILE).unlink(missing_ok=True)
        if reach_losses is not None:
            _write_synced(fresh / REACH_LOSSES_FILE, json.dumps(reach_losses.to_dict()) + "\n")
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _read_text(path: Path) -> str:
    if not os.path.exists(path):
        raise HeadMapError(
            f"head map {short_path(path.parent)} has no {path.name}: give a folder in DuoAttention's format"
        )
    return read_text(path, HeadMapError, "give a head map of DuoAttention's format")


def _number(cell: str, path: Path, row_number: int, column: int) -> float:
    # Python's float takes 0_5 for 5 and digits of every script, which no program writes.
    if _NUMBER.fullmatch(cell):
        return float(cell)
    raise HeadMapError(
        f"{short_path(path)}: row {row_number}, column {column} is {quoted(cell)}, not a number: rows are floats "
        f"separated by tabs"
    )


def read_window(folder: Path) -> tuple[int, int, list[str]]:
    """(sink_size, recent_size, notes) of `config.json`; what is absent or null is assumed, with a note.

    Raises:
        HeadMapError: not a JSON object, or an impossible size.
    """
    defaults = {"sink_size": DEFAULT_SINK_SIZE, "recent_size": DEFAULT_RECENT_SIZE}
    path, data = folder / CONFIG_FILE, _read_config(folder)
    if data is None:
        return (
            *defaults.values(),
            [f"no {CONFIG_FILE}: assumed sink_size {DEFAULT_SINK_SIZE} and recent_size {DEFAULT_RECENT_SIZE}"],
        )
    window, notes = {}, []
    for name, default in defaults.items():
        window[name] = data.get(name)
        if window[name] is None:
            window[name] = default
            notes.append(f"no {name} in {CONFIG_FILE}: assumed {default}")
    check_window(window["sink_size"], window["recent_size"], str(path))
    return window["sink_size"], window["recent_size"], notes


def read_origin(folder: Path) -> HeadMapOrigin | None:
    """The model that `config.json` says the map was made for; None where it names none, as maps of others do.

    Raises:
        HeadMapError: not a JSON object.
    """
    facts = (_read_config(folder) or {}).get(IDENTIFICATION)
    if not isinstance(facts, dict):
        return None
    names = ("model", "model_fingerprint", "weights_fingerprint", "adapter", "adapter_sha256")
    said = {name: facts[name] for name in names if isinstance(facts.get(name), str)}
    if not {"model", "model_fingerprint"} <= said.keys():
        return None
    return HeadMapOrigin(folder, **said)


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The object in `config.json`, or None where there is no such file."""
    path = folder / CONFIG_FILE
    if not os.path.exists(path):
        return None
    return read_object(path, HeadMapError, "it needs an object with sink_size and recent_size")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
