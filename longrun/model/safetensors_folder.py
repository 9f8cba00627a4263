"""The safetensors files of a checkpoint folder: one, or the shards that an index names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longrun.errors import CheckpointError, short_path, shortened
from longrun.files.user_files import read_object
from longrun.model.safetensors_file import SafetensorsTensor, read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_folder(folder: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor of the folder by name.

    Raises:
        CheckpointError: no safetensors files, a shard that is missing or damaged, a tensor in two of them.
    """
    tensors: dict[str, SafetensorsTensor] = {}
    for file in _weight_files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{short_path(file)} and {shortened(tensors[name].file.name)} both hold tensor "
                    f"{shortened(name)}: remove one"
                )
            tensors[name] = tensor
    return tensors


def and_more(names: Sequence[str]) -> str:
    """ " and 3 more" for four names, nothing for one."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    name = short_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model folder {name} does not exist: give a folder with config.json and *.safetensors")
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
        if shards:
            raise CheckpointError(
                f"model folder {name} holds {shortened(shards[0])}{and_more(shards)} but no {_INDEX}, which says what "
                f"belongs together: fetch that file, too"
            )
        other = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
        found = f" (only {shortened(other[0])}{and_more(other)})" if other else ""
        raise CheckpointError(
            f"model folder {name} holds no {_SINGLE} and no {_INDEX}{found}: only safetensors checkpoints and GGUF "
            f"files are read"
        )
    weight_map = read_object(index, CheckpointError, "fetch it again").get("weight_map")
    files = set(weight_map.values()) if _maps_to_names(weight_map) else set()
    if not files or any(Path(file).name != file for file in files):
        raise CheckpointError(
            f"{short_path(index)} cannot be used (weight_map names no files of this folder): fetch it again"
        )
    for file in sorted(files):
        if not os.path.isfile(folder / file):
            raise CheckpointError(
                f"shard {short_path(folder / file)}, which {_INDEX} names, is missing: fetch it again"
            )
    return [folder / file for file in sorted(files)]


def _maps_to_names(weight_map: object) -> bool:
    return isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
