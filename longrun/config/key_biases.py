"""How far a checkpoint's key biases move within a page, from its files: no torch, a few kilobytes read.

RoPE turns a bias with the position, so over a page it spreads on a circle, and the grid over its tokens grows with it.
A slow pair hardly moves within a page, and the page's minimum takes its bias away, however large.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrun.config.config_file import read_config
from longrun.config.gguf_header import gguf_file, read_gguf_header
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, LongrunError
from longrun.files.user_files import MAX_BYTES, parse_object, read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CODES = {"F32": "f", "F16": "e", "BF16": "H"}
_ADVICE = "fetch it again"


@dataclass(frozen=True)
class KeyBiases:
    """Biases of all k_proj of a model.

    Attributes:
        squares: per rotary pair, the square of its bias, mean over layers and KV heads.
        angles: per rotary pair, by how much a position turns it, in radians.
    """

    squares: tuple[float, ...]
    angles: tuple[float, ...]

    def motion(self, page_size: int) -> float:
        """How far biases are from their mean over a page, RMS over tokens, layers, heads and channels.

        The mean of a pair over P positions is |sin(P w / 2) / (P sin(w / 2))| of its length, where w is its angle.
        """
        moving = 0.0
        for square, angle in zip(self.squares, self.angles, strict=True):
            mean = math.sin(page_size * angle / 2) / (page_size * math.sin(angle / 2))
            moving += square * max(0.0, 1 - mean**2)
        return math.sqrt(moving / (2 * len(self.squares)))


def read_key_biases(model: str | Path, config: ModelConfig) -> KeyBiases | None:
    """The key biases of a checkpoint folder or GGUF file.

    Angles are those of the plain RoPE type; what stretches a window only slows pairs down.

    Returns:
        None where keys have no bias (or a norm follows it), where the weights are not there, as with config.json alone,
        or where they cannot be read: loading them says what is wrong.
    """
    if not config.qkv_bias or config.qk_norm:
        return None
    path, half = Path(model), config.head_dim // 2
    try:
        theta, file = _theta(read_config(path).data), gguf_file(path)
        stored = _in_folder(path, config) if file is None else _in_gguf(file, config)
        squares = [0.0] * half
        for channel, value in enumerate(value for bias in stored for value in bias):
            squares[_pair(channel % config.head_dim, half, file is not None and config.model_type != "qwen2")] += (
                value**2
            )
    except (LongrunError, OSError, LookupError, TypeError, ValueError, OverflowError, struct.error):
        return None
    if not all(map(math.isfinite, squares)):
        return None
    heads = config.num_layers * config.num_kv_heads
    return KeyBiases(tuple(s / heads for s in squares), tuple(theta ** (-pair / half) for pair in range(half)))


def _theta(data: dict[str, Any]) -> float:
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or data.get("rope_theta") or 10_000)


def _pair(channel: int, half: int, interleaved: bool) -> int:
    """The rotary pair of a channel of a head; GGUF files of Llama and Mistral hold a pair's channels side by side."""
    return channel // 2 if interleaved else channel % half


def _in_gguf(file: Path, config: ModelConfig) -> Iterator[tuple[float, ...]]:
    tensors = read_gguf_header(file).tensors
    for layer_idx in range(config.num_layers):
        entry = tensors[f"blk.{layer_idx}.attn_k.bias"]
        yield _values(file, entry.type, entry.offset, entry.num_bytes, config.kv_size)


def _in_folder(folder: Path, config: ModelConfig) -> Iterator[tuple[float, ...]]:
    whole = os.path.isfile(folder / _SINGLE)
    shards = None if whole else read_object(folder / _INDEX, CheckpointError, _ADVICE)["weight_map"]
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    for layer_idx in range(config.num_layers):
        name = f"model.layers.{layer_idx}.self_attn.k_proj.bias"
        file = folder / (_SINGLE if shards is None else Path(shards[name]).name)
        if file not in headers:
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                text = stream.read(min(length, MAX_BYTES))
            headers[file] = 8 + length, parse_object(text, str(file), CheckpointError, _ADVICE)
        start, header = headers[file]
        begin, end = header[name]["data_offsets"]
        yield _values(file, header[name]["dtype"], start + begin, end - begin, config.kv_size)


def _values(file: Path, kind: str, first: int, num_bytes: int, count: int) -> tuple[float, ...]:
    """`count` numbers. Raises LookupError, OSError, ValueError or struct.error where the file holds something else."""
    code = f"<{count}{_CODES[kind]}"
    if num_bytes != struct.calcsize(code):
        raise ValueError(f"{num_bytes} bytes are not {count} of type {kind}")
    with open(file, "rb") as stream:
        stream.seek(first)
        numbers = struct.unpack(code, stream.read(num_bytes))
    if kind == "BF16":
        numbers = struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(number << 16 for number in numbers)))
    return numbers
