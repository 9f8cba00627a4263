"""Write safetensors shards tensor by tensor, so that a checkpoint of any size needs the memory of one tensor's slab.

The file format (8 bytes header length, a JSON header, raw little-endian data) is documented by the safetensors project;
its own `save_file` wants all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longrun.errors import CheckpointError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: `slabs()` yields its rows in order, all of one dtype, on any device."""

    name: str
    shape: tuple[int, ...]
    slabs: Callable[[], Iterator[Tensor]]

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


def write_shards(folder: Path, plans: Sequence[TensorPlan], dtype: torch.dtype, shard_bytes: int) -> int:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` (one tensor at least) and an index.

    Shards of an earlier checkpoint in the folder are removed first. Returns the bytes of tensor data.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    shards: list[list[TensorPlan]] = [[]]
    held = 0
    for plan in plans:
        size = plan.num_elements * dtype.itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(plan)
        held += size
    total = sum(plan.num_elements for plan in plans) * dtype.itemsize
    try:
        for stale in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
            stale.unlink(missing_ok=True)
        if len(shards) == 1:
            _write_file(folder / SINGLE_FILE, shards[0], dtype)
            return total
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / name, shard, dtype)
            weight_map |= {plan.name: name for plan in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder} ({total:,} bytes) cannot be written ({error.strerror or error}): free the disk or "
            "choose another folder"
        ) from error
    return total


def _write_file(path: Path, plans: Sequence[TensorPlan], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.num_elements * dtype.itemsize
        header[plan.name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for plan in plans:
            written = 0
            for slab in plan.slabs():
                data = slab.to(dtype=dtype).contiguous().cpu().reshape(-1)
                file.write(memoryview(data.view(torch.uint8).numpy()))
                written += data.numel()
            assert written == plan.num_elements, (plan.name, written, plan.shape)
