"""Reading safetensors files by plain file reads: strict about the header, exact about memory.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the data. The
safetensors library maps a whole file into memory, and every page it touches counts as resident memory until the
handle is closed; here a tensor's rows are read straight into where they belong, so that loading costs the weights and
one piece.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longrun.errors import CheckpointError, quoted, short_path, shortened
from longrun.files.user_files import MAX_BYTES, parse_object
from longrun.model.stored_tensor import exact_read

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEMSIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class SafetensorsTensor:
    """Where one tensor stands: its file, safetensors dtype name, shape, and first byte in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read_into(self, target: Tensor, first_row: int) -> None:
        """Read `target.shape[0]` rows from `first_row` on into `target`: contiguous, on the CPU, of any floating dtype.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        assert target.is_contiguous() and target.device.type == "cpu" and target.shape[1:] == self.shape[1:]
        stored = target if target.dtype == self.torch_dtype else torch.empty(target.shape, dtype=self.torch_dtype)
        row_bytes = self.num_bytes // max(self.shape[0], 1)
        buffer = memoryview(stored.view(torch.uint8).numpy()).cast("B")
        exact_read(self.file, self.name, buffer, self.offset + first_row * row_bytes)
        if stored is not target:
            target.copy_(stored)

    def read_bytes(self, start: int, length: int) -> bytes:
        """`length` bytes of the tensor's data from byte `start` on. Raises as `read_into`."""
        buffer = bytearray(length)
        exact_read(self.file, self.name, memoryview(buffer), self.offset + start)
        return bytes(buffer)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises `CheckpointError` for a dtype that weights of these families do not come in."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"{short_path(self.file)}: tensor {shortened(self.name)} has dtype {self.dtype}, and must be one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor of a safetensors file, after checking that the header is sound and the file complete.

    Raises:
        CheckpointError: no such file, a damaged header, offsets that leave gaps or do not fit shape and dtype, or a
            file shorter or longer than its header says.
    """
    where = short_path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_BYTES):
                raise CheckpointError(
                    f"{where} is truncated or no safetensors file (header of {length:,} bytes in a file of {size:,}): "
                    f"fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror}): fetch it again") from error
    header = parse_object(text, f"safetensors header of {where}", CheckpointError, "fetch it again", unique_keys=True)
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in header.items()}

    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{where}: the header leaves a gap or an overlap before tensor {shortened(tensor.name)}"
            )
        end += tensor.num_bytes
        if end > size:
            raise CheckpointError(
                f"{where} ends inside tensor {shortened(tensor.name)} ({size:,} bytes where the header needs at least "
                f"{end:,}): the file is truncated, fetch it again"
            )
    if end != size:
        raise CheckpointError(f"{where} is {size:,} bytes where its header says {end:,}: fetch it again")
    return tensors


def _entry(path: Path, name: str, entry: object, data_start: int) -> SafetensorsTensor:
    where = f"{short_path(path)}: the header's entry of tensor {shortened(name)}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        known = isinstance(dtype, str)
        sound = known and isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        sound = sound and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        known = sound = False
    if known and dtype not in _ITEMSIZES:
        raise CheckpointError(
            f"{where} has dtype {quoted(dtype)}, which is none that weights come in ({', '.join(_DTYPES)}): use "
            f"another checkpoint"
        )
    if not sound or end - begin != math.prod(shape) * _ITEMSIZES[dtype]:
        raise CheckpointError(f"{where} is damaged ({quoted(entry)}): fetch the file again")
    return SafetensorsTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)
