"""A cache that drops tokens, for the eviction baselines: exact keys and values, only of the tokens kept.

Simpler than the dual cache: per layer a tensor of keys, one of values and one of positions. What is evicted
is gone, with its memory. For comparisons only; nothing is paged, quantized, offloaded or saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_POSITION_BYTES = 4  # int32


@dataclass(frozen=True)
class EvictingSpec:
    """Shape of an `EvictingCache`.

    Attributes:
        capacity: tokens that the sequence may have (seen, not kept).
        room: tokens that every layer's tensors are made for at first.
        spare: tokens of room made beyond what is kept when memory is given back; also the step in which a full
            tensor grows.
        in_place: evicting moves the kept tokens to the front of the same tensors (a fixed budget, kept at every step),
            else they go into new, smaller tensors (evicting once).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    capacity: int
    room: int
    spare: int
    in_place: bool

    def token_bytes(self) -> int:
        """Bytes of one token in all layers: keys, values and their positions (int32, one a KV head)."""
        return self.num_layers * self.num_kv_heads * (2 * self.head_dim * self.dtype.itemsize + _POSITION_BYTES)

    def initial_bytes(self) -> int:
        return self.room * self.token_bytes()


class EvictingLayer:
    """Keys and values of one layer's kept tokens, in ascending position per KV head.

    Attributes:
        k, v: [num_kv_heads, room, head_dim]; positions: int32 [num_kv_heads, room]. The first `length` are held.
    """

    def __init__(self, spec: EvictingSpec, device: torch.device) -> None:
        self._spec, self.length = spec, 0
        self.k = torch.zeros(spec.num_kv_heads, spec.room, spec.head_dim, dtype=spec.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.zeros(spec.num_kv_heads, spec.room, dtype=torch.int32, device=device)

    @property
    def room(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.positions.nbytes

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """k, v: [num_kv_heads, length, head_dim]."""
        return self.k[:, : self.length], self.v[:, : self.length]

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Tokens [start, start + T): k, v [num_kv_heads, T, head_dim]; the tensors grow where they are full."""
        count = k.shape[1]
        if self.length + count > self.room:
            self._move(None, self.length + count + self._spec.spare)
        part = slice(self.length, self.length + count)
        self.k[:, part], self.v[:, part] = k, v
        self.positions[:, part] = torch.arange(start, start + count, dtype=torch.int32, device=k.device)
        self.length += count

    def keep(self, indices: Tensor) -> None:
        """Drop all but these: int64 [num_kv_heads, n], ascending, into the held tokens."""
        if self._spec.in_place:
            n = indices.shape[1]
            for tensor in (self.k, self.v, self.positions):
                tensor[:, :n] = _take(tensor, indices)
            self.length = n
        else:
            self._move(indices, indices.shape[1] + self._spec.spare)

    def _move(self, indices: Tensor | None, room: int) -> None:
        """Into new tensors of `room` tokens: all that are held, or those of `indices`."""
        length = self.length if indices is None else indices.shape[1]
        for name in ("k", "v", "positions"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], room, *old.shape[2:])
            new[:, :length] = old[:, :length] if indices is None else _take(old, indices)
            setattr(self, name, new)
        self.length = length


def _take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Row indices[h, i] of head h: [num_kv_heads, n, ...]."""
    heads = torch.arange(indices.shape[0], device=indices.device)[:, None]
    return tensor[heads, indices]


@dataclass(frozen=True)
class EvictingMark:
    """A point to come back to. Tensors that nothing overwrites are referred to, not copied: while such a mark lives,
    so does the memory of the tokens it holds."""

    seq_len: int
    layers: tuple[tuple[Tensor, Tensor, Tensor, int], ...]
    queries: tuple[Tensor | None, ...]
    compressed: bool


class EvictingCache:
    """All layers' kept tokens of one sequence.

    Attributes:
        seq_len: tokens seen, so the position of the next one; `layers[i].length` is what is kept.
        queries: per layer, the newest queries [n, num_qo_heads, head_dim] where the method needs them, else None.
        compressed: the prompt's end was declared and its tokens were dropped (SnapKV).
    """

    def __init__(self, spec: EvictingSpec, device: torch.device) -> None:
        self.spec, self.device, self.seq_len = spec, device, 0
        self.holds_back_pages = False  # marks refer to tensors of their own
        self.layers = [EvictingLayer(spec, device) for _ in range(spec.num_layers)]
        self.queries: list[Tensor | None] = [None] * spec.num_layers
        self.compressed = False
        self._layer_bytes = sum(layer.nbytes for layer in self.layers)
        self._peak_bytes = self._layer_bytes
        assert self._peak_bytes == spec.initial_bytes()

    def append(self, layer_idx: int, k: Tensor, v: Tensor, start: int) -> None:
        """Append tokens [start, start + T) to one layer: k, v [num_kv_heads, T, head_dim] after RoPE."""
        assert start + k.shape[1] <= self.spec.capacity, "the session checks the capacity before a step"
        self._watch(layer_idx, lambda layer: layer.append(k, v, start))

    def keep(self, layer_idx: int, indices: Tensor) -> None:
        """Drop all of a layer's tokens but `indices`, int64 [num_kv_heads, n], ascending, into the held ones."""
        self._watch(layer_idx, lambda layer: layer.keep(indices))

    def _watch(self, layer_idx: int, change: Callable[[EvictingLayer], None]) -> None:
        """Change a layer. The bytes are added up again only where it got new tensors: this runs once a layer and step,
        and counting all layers each time would take longer than the step on a GPU."""
        layer = self.layers[layer_idx]
        old, own = layer.k, layer.nbytes
        change(layer)
        if layer.k is not old:
            self._peak_bytes = max(self._peak_bytes, self.total_bytes + layer.nbytes)
            self._layer_bytes += layer.nbytes - own

    def advance(self, num_tokens: int) -> None:
        """Every layer has appended `num_tokens`: they now count."""
        self.seq_len += num_tokens

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors held, kept queries included."""
        return self._layer_bytes + sum(q.nbytes for q in self.queries if q is not None)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever held, while tensors were copied included."""
        return max(self._peak_bytes, self.total_bytes)

    def forget_queries(self) -> None:
        """Drop all layers' queries: the prompt has ended."""
        self._peak_bytes = self.peak_bytes
        self.queries = [None] * self.spec.num_layers

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept tokens alone: keys, values, positions."""
        return sum(layer.length * (layer.nbytes // layer.room) for layer in self.layers)

    def mark(self) -> EvictingMark:
        """Remember this point; copies what later steps overwrite, refers to the rest."""
        copy = self.spec.in_place
        layers = tuple(
            (*(t[:, : layer.length].clone() if copy else t for t in (layer.k, layer.v, layer.positions)), layer.length)
            for layer in self.layers
        )
        return EvictingMark(self.seq_len, layers, tuple(self.queries), self.compressed)

    def release(self, mark: EvictingMark) -> None:
        """Nothing to give back: a mark's tensors go with it."""

    def rewind(self, mark: EvictingMark) -> None:
        """Back to `mark`, evicted tokens included."""
        assert mark.seq_len <= self.seq_len
        for layer, (k, v, positions, length) in zip(self.layers, mark.layers, strict=True):
            if self.spec.in_place:
                layer.k[:, :length], layer.v[:, :length], layer.positions[:, :length] = k, v, positions
            else:
                layer.k, layer.v, layer.positions = k, v, positions
            layer.length = length
        self._layer_bytes = sum(layer.nbytes for layer in self.layers)
        self.queries, self.seq_len, self.compressed = list(mark.queries), mark.seq_len, mark.compressed
