"""The tensors of a GGUF file under our names and in our layout, dequantized as they are read.

Two things differ from a Hugging Face checkpoint. Tensors have llama.cpp's names, which the `gguf` package translates.
And Llama and Mistral files hold the rows of q and k so that RoPE turns neighbouring channels: row 2 i + j of a head is
row j * head_dim / 2 + i of the checkpoint. Qwen files hold them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from longrun.config.gguf_config import ROPE_FACTORS
from longrun.config.gguf_header import GgufEntry, read_gguf_header
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, quoted, short_path, shortened
from longrun.model.safetensors_folder import and_more
from longrun.model.stored_tensor import exact_read

_ARCH = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_INTERLEAVED = ("llama", "mistral")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values dequantized at a time: few enough for a processor's cache, enough that Python's own time does not count.
_STEP_VALUES = 2**18
# Each holds some five times the values it works on. More would wait for each other: Python's own part is a tenth.
_MOST_THREADS = 8
# torch spreads the copy of more values over threads of its own, which here work on other rows.
_COPY_VALUES = 2**14

Dequantize = Callable[[np.ndarray, Tensor], None]
"""Sets a contiguous float32 or bfloat16 tensor on the CPU to the values of the blocks in a uint8 array, as
`gguf.dequantize` and rounding do."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, see `longrun.model.stored_tensor.StoredTensor`; quantized types become float32.

    Attributes:
        entry: where it stands, and how.
        pool: its threads dequantize.
        head_rows: rows of a head whose halves are interleaved in the file; 0 where rows stand as they are.
        dequantize: does it without temporaries; None: the `gguf` package does it.
    """

    file: Path
    name: str
    entry: GgufEntry
    pool: ThreadPoolExecutor
    head_rows: int = 0
    dequantize: Dequantize | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        return self.entry.type if self.entry.type in _PLAIN else "F32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _PLAIN[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def read_into(self, target: Tensor, first_row: int) -> None:
        assert target.is_contiguous() and target.device.type == "cpu" and target.shape[1:] == self.shape[1:]
        straight = self.dequantize is not None and target.dtype in (torch.float32, torch.bfloat16)

        def read(start: int, stop: int) -> None:
            low, high = max(start, first_row), min(stop, first_row + len(target))
            place = target[low - first_row : high - first_row]
            if straight and len(place) == stop - start:
                self.dequantize(self._stored(start, stop), place)
                return
            values = self._rows(start, stop)[low - start : high - start]
            for part, found in zip(
                place.view(-1).split(_COPY_VALUES), values.reshape(-1).split(_COPY_VALUES), strict=True
            ):
                part.copy_(found)

        self._in_steps(read, first_row, first_row + len(target))

    def read_runs(self, take: Callable[[int, Tensor], None], first_row: int, stop: int) -> None:
        """Give the rows from `first_row` to `stop` to `take`, some at a time: the first one's number, and values of
        `torch_dtype` on the CPU. Several threads call it at once. Raises as `read_into`, and what `take` raises."""

        def read(start: int, end: int) -> None:
            low = max(start, first_row)
            take(low, self._rows(start, end)[low - start : stop - start])

        self._in_steps(read, first_row, stop)

    def _in_steps(self, read: Callable[[int, int], None], first_row: int, stop: int) -> None:
        """Call `read` with first and last row, of whole heads where there are any, on the pool's threads."""
        unit = self.head_rows or 1
        last = stop + -stop % unit
        step = max(1, _STEP_VALUES * self.shape[0] // math.prod(self.shape) // unit) * unit
        starts = range(first_row - first_row % unit, stop, step)
        ends = (min(start + step, last) for start in starts)
        for _ in self.pool.map(read, starts, ends) if len(starts) > 1 else map(read, starts, ends):
            pass

    def read_bytes(self, start: int, length: int) -> bytes:
        row_bytes = self.num_bytes // self.shape[0]
        first, last = start // row_bytes, -(-(start + length) // row_bytes)
        rows = torch.empty((last - first, *self.shape[1:]), dtype=self.torch_dtype)
        self.read_into(rows, first)
        content = rows.view(torch.uint8).numpy().tobytes()
        return content[start - first * row_bytes :][:length]

    def _rows(self, start: int, stop: int) -> Tensor:
        """Whole heads, where there are any, in our order and of `torch_dtype`."""
        stored, shape = self._stored(start, stop), (stop - start, *self.shape[1:])
        if self.dequantize is not None:
            values = torch.empty(shape)
            self.dequantize(stored, values)
            return values
        if self.entry.type not in _PLAIN:
            with np.errstate(all="ignore"):  # a damaged scale shows when the logits are not finite
                stored = gguf.dequantize(stored.reshape(1, -1), gguf.GGMLQuantizationType[self.entry.type])
        return torch.from_numpy(stored).view(self.torch_dtype).view(shape)

    def _stored(self, start: int, stop: int) -> np.ndarray:
        """Their bytes, in our order."""
        row_bytes = self.entry.num_bytes // self.shape[0]
        stored = np.empty((stop - start) * row_bytes, dtype=np.uint8)
        exact_read(self.file, self.entry.name, memoryview(stored), self.entry.offset + start * row_bytes)
        if self.head_rows:
            stored = stored.reshape(-1, self.head_rows // 2, 2, row_bytes).swapaxes(1, 2).reshape(-1)
        return stored


def find_gguf_tensors(
    file: Path, config: ModelConfig, dequantize: Mapping[str, Dequantize] | None = None
) -> dict[str, GgufTensor]:
    """Every tensor of the model by our name, after checking that it is the one `config` describes.

    Left-over tensors are errors, except RoPE's factors and frequencies. `dequantize`: by tensor type, what does it in
    place of the `gguf` package.

    Raises:
        CheckpointError: a damaged or truncated file, a missing, left-over or misshapen tensor, a quantized vector.
    """
    stored, where = dict(read_gguf_header(file).tensors), short_path(file)
    names = gguf.get_tensor_name_map(_ARCH[config.model_type], config.num_layers)
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS))  # its threads end with the last tensor
    found, missing = {}, []
    for spec in config.weights():
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        entry = stored.pop(name, None) if name is not None else None
        if entry is None:
            missing.append(name or spec.name)
            continue
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {quoted(list(entry.shape))} where the metadata call for "
                f"{list(spec.shape)}: fetch the file again"
            )
        if len(entry.shape) == 1 and entry.type not in _PLAIN:
            raise CheckpointError(
                f"{where}: tensor {name} is a vector of type {entry.type}, and must be of {', '.join(_PLAIN)}: fetch "
                f"another file"
            )
        turned = config.model_type in _INTERLEAVED and ".attn_" in name and name.split(".")[2] in ("attn_q", "attn_k")
        how = None if dequantize is None else dequantize.get(entry.type)
        found[spec.name] = GgufTensor(file, spec.name, entry, pool, config.head_dim if turned else 0, how)
    if missing:
        raise CheckpointError(
            f"{where} lacks tensor {missing[0]}{and_more(missing)}, which its metadata call for: fetch it again"
        )
    extra = [name for name in stored if name != ROPE_FACTORS and not name.endswith(".attn_rot_embd.weight")]
    if extra:
        raise CheckpointError(
            f"{where} holds tensor {shortened(extra[0])}{and_more(extra)}, which a {config.architecture} does not "
            f"have: use another file"
        )
    return found
