"""What the loader asks of a tensor in a file, whatever the file's format."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longrun.errors import CheckpointError, short_path


class StoredTensor(Protocol):
    """One tensor of a checkpoint in our layout, read a run of rows at a time.

    Attributes:
        file: where it stands.
        name: as a Hugging Face checkpoint calls it.
        shape: rows first.
    """

    @property
    def file(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Of its values, as safetensors spells it."""
        ...

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same. Raises `CheckpointError` for a dtype that weights do not come in."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of its values, as they are when they have been read."""
        ...

    def read_into(self, target: Tensor, first_row: int) -> None:
        """Read `target.shape[0]` rows from `first_row` on into `target`: contiguous, on the CPU, of any floating dtype.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        ...

    def read_bytes(self, start: int, length: int) -> bytes:
        """`length` bytes of its values from byte `start` on. Raises as `read_into`."""
        ...


def exact_read(file: Path, name: str, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes of tensor `name` from byte `offset` of the file on.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{short_path(file)} ends inside tensor {name}: the file is truncated, fetch it again"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"{file}: tensor {name} cannot be read ({error.strerror})") from error
