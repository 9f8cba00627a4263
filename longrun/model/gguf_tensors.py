"""The tensors of a GGUF file under our names and in our layout, dequantized as they are read.

Two things differ from a Hugging Face checkpoint. Tensors have llama.cpp's names, which the `gguf` package translates.
And Llama and Mistral files hold the rows of q and k so that RoPE turns neighbouring channels: row 2 i + j of a head is
row j * head_dim / 2 + i of the checkpoint. Qwen files hold them as they are.
"""

from __future__ import annotations

import math
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
# Values dequantized at a time: the package holds them about three times.
_STEP_BYTES = 2 * 2**20
# The package works on 16 rows at a time, twice to four times as fast on rows of this length than on a small model's.
_ROW_VALUES = 2**14


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, see `longrun.model.stored_tensor.StoredTensor`; quantized types become float32.

    Attributes:
        entry: where it stands, and how.
        head_rows: rows of a head whose halves are interleaved in the file; 0 where rows stand as they are.
    """

    file: Path
    name: str
    entry: GgufEntry
    head_rows: int = 0

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
        assert target.dtype == self.torch_dtype and target.is_contiguous() and target.device.type == "cpu"
        assert target.shape[1:] == self.shape[1:]
        # numpy, not torch: these steps are too small for two threads, which would wait for each other
        place = target.view(torch.int16).numpy() if target.element_size() == 2 else target.numpy()
        step = max(1, _STEP_BYTES * self.shape[0] // self.num_bytes)
        stop = first_row + len(target)
        if not self.head_rows:
            for start in range(first_row, stop, step):
                end = min(start + step, stop)
                self._read_rows(place[start - first_row : end - first_row], start)
            return
        step = max(1, step // self.head_rows) * self.head_rows
        for start in range(first_row - first_row % self.head_rows, stop, step):
            end = min(start + step, self.shape[0])
            stored = np.empty((end - start, *self.shape[1:]), dtype=place.dtype)
            self._read_rows(stored, start)
            pairs = stored.reshape(-1, self.head_rows // 2, 2, *self.shape[1:])
            rows = pairs.swapaxes(1, 2).reshape(stored.shape)
            low, high = max(start, first_row), min(end, stop)
            place[low - first_row : high - first_row] = rows[low - start : high - start]

    def read_bytes(self, start: int, length: int) -> bytes:
        row_bytes = self.num_bytes // self.shape[0]
        first, last = start // row_bytes, -(-(start + length) // row_bytes)
        rows = torch.empty((last - first, *self.shape[1:]), dtype=self.torch_dtype)
        self.read_into(rows, first)
        content = rows.view(torch.uint8).numpy().tobytes()
        return content[start - first * row_bytes :][:length]

    def _read_rows(self, target: np.ndarray, first: int) -> None:
        """Rows from `first` on as they stand in the file: float32, or int16 for the bits of a half."""
        row_bytes = self.entry.num_bytes // self.shape[0]
        offset = self.entry.offset + first * row_bytes
        if self.entry.type in _PLAIN:
            exact_read(self.file, self.entry.name, memoryview(target).cast("B"), offset)
            return
        stored = np.empty(len(target) * row_bytes, dtype=np.uint8)
        exact_read(self.file, self.entry.name, memoryview(stored), offset)
        _dequantize(stored, self.entry.type, target.reshape(-1))


def _dequantize(stored: np.ndarray, type_name: str, values: np.ndarray) -> None:
    """Set `values` (float32 [m]) to those of whole blocks (uint8 [n]), which do not depend on each other."""
    kind = gguf.GGMLQuantizationType[type_name]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = _ROW_VALUES // per_block * block_bytes
    whole = len(stored) - len(stored) % row_bytes
    start = 0
    with np.errstate(all="ignore"):  # a damaged scale shows when the logits are not finite
        for part in (stored[:whole].reshape(-1, row_bytes), stored[whole:].reshape(1, -1)):
            if part.size:
                found = gguf.dequantize(part, kind).reshape(-1)
                values[start : start + len(found)] = found
                start += len(found)


def find_gguf_tensors(file: Path, config: ModelConfig) -> dict[str, GgufTensor]:
    """Every tensor of the model by our name, after checking that it is the one `config` describes.

    Left-over tensors are errors, except RoPE's factors and frequencies.

    Raises:
        CheckpointError: a damaged or truncated file, a missing, left-over or misshapen tensor, a quantized vector.
    """
    stored, where = dict(read_gguf_header(file).tensors), short_path(file)
    names = gguf.get_tensor_name_map(_ARCH[config.model_type], config.num_layers)
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
        found[spec.name] = GgufTensor(file, spec.name, entry, config.head_dim if turned else 0)
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
