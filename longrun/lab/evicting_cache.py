"""A cache that drops tokens, for the eviction baselines: exact keys and values, only of the tokens kept.

Simpler than the dual cache: per layer a tensor of keys, one of values and one of positions. Heads that keep different
numbers of tokens have these one after the other without padding (`RaggedTokens`), and the layer's tensors hold what
comes later. What is evicted is gone, with its memory. For comparisons only; nothing is paged, quantized, offloaded or
saved.
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

    def head_token_bytes(self) -> int:
        """Bytes of one token in one KV head: key, value and position (int32)."""
        return 2 * self.head_dim * self.dtype.itemsize + _POSITION_BYTES

    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.num_layers * self.num_kv_heads * self.head_token_bytes()

    def initial_bytes(self) -> int:
        return self.room * self.token_bytes()

    def received_bytes(self) -> int:
        """Bytes of the attention that `capacity` tokens received, where a rule reads it: a float32 each a KV head."""
        return self.capacity * self.num_layers * self.num_kv_heads * 4


@dataclass(frozen=True)
class RaggedTokens:
    """Tokens of which every KV head has a number of its own, head after head, in ascending position.

    Attributes:
        k, v: [sum(counts), head_dim]; positions: int32 [sum(counts)]; counts: tokens of each KV head.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    counts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.positions.nbytes


class EvictingLayer:
    """Keys and values of one layer's kept tokens, in ascending position per KV head.

    Attributes:
        ragged: the oldest of them, where heads keep different numbers; else None.
        k, v: [num_kv_heads, room, head_dim]; positions: int32 [num_kv_heads, room]. The first `length` are held, in
            addition to `ragged`.
    """

    def __init__(self, spec: EvictingSpec, device: torch.device) -> None:
        self._spec, self.length = spec, 0
        self.ragged: RaggedTokens | None = None
        self.k = torch.zeros(spec.num_kv_heads, spec.room, spec.head_dim, dtype=spec.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.zeros(spec.num_kv_heads, spec.room, dtype=torch.int32, device=device)

    @property
    def room(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        ragged = 0 if self.ragged is None else self.ragged.nbytes
        return self.k.nbytes + self.v.nbytes + self.positions.nbytes + ragged

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens kept of each KV head."""
        return tuple(self.length + own for own in self.ragged.counts) if self.ragged else (self.length,) * len(self.k)

    def kept_positions(self) -> list[Tensor]:
        """The positions kept of each KV head, int32 [counts[h]], ascending."""
        rows = list(self.positions[:, : self.length])
        if self.ragged is None:
            return rows
        old = self.ragged.positions.split(self.ragged.counts)
        return [torch.cat(pair) for pair in zip(old, rows, strict=True)]

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

    def keep_chosen(self, chosen: Tensor) -> None:
        """Drop all but these: bool [num_kv_heads, length], a number of its own of every head. Waits for the device."""
        assert self.ragged is None and not self._spec.in_place
        counts = tuple(chosen.sum(dim=1).tolist())
        heads, indices = chosen.nonzero(as_tuple=True)
        if len(set(counts)) == 1:
            self.keep(indices.view(len(counts), -1))
            return
        self.ragged = RaggedTokens(
            self.k[heads, indices], self.v[heads, indices], self.positions[heads, indices], counts
        )
        self.length = 0
        self._move(None, self._spec.spare)

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
    layers: tuple[tuple[Tensor, Tensor, Tensor, int, RaggedTokens | None], ...]
    queries: tuple[Tensor | None, ...]
    received: tuple[Tensor | None, ...]
    compressed: bool


class EvictingCache:
    """All layers' kept tokens of one sequence.

    Attributes:
        seq_len: tokens seen, so the position of the next one; `layers[i].counts` is what is kept.
        queries: per layer, the newest queries [n, num_qo_heads, head_dim] where the method needs them, else None.
        received: per layer, float32 [num_kv_heads, seq_len], the attention that each token got so far where the method
            needs it, else None. Nothing changes such a tensor.
        compressed: the prompt's end was declared and its tokens were dropped (all methods but TOVA).
    """

    def __init__(self, spec: EvictingSpec, device: torch.device) -> None:
        self.spec, self.device, self.seq_len = spec, device, 0
        self.holds_back_pages = False  # marks refer to tensors of their own
        self.layers = [EvictingLayer(spec, device) for _ in range(spec.num_layers)]
        self.queries: list[Tensor | None] = [None] * spec.num_layers
        self.received: list[Tensor | None] = [None] * spec.num_layers
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

    def keep_chosen(self, layer_idx: int, chosen: Tensor) -> None:
        """Drop all of a layer's tokens but these: bool [num_kv_heads, n], over the held ones. Waits for the device."""
        self._watch(layer_idx, lambda layer: layer.keep_chosen(chosen))

    def receive(self, layer_idx: int, received: Tensor) -> None:
        """Put `received`, float32 [num_kv_heads, n], in place of a layer's; both stand in memory for a moment."""
        self._peak_bytes = max(self._peak_bytes, self.total_bytes + received.nbytes)
        self.received[layer_idx] = received

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
        """Bytes of all tensors held, kept queries and received attention included."""
        return self._layer_bytes + sum(x.nbytes for x in (*self.queries, *self.received) if x is not None)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever held, while tensors were copied included."""
        return max(self._peak_bytes, self.total_bytes)

    def end_prompt(self) -> None:
        """The prompt's tokens were dropped: so are all layers' queries and received attention."""
        self._peak_bytes = self.peak_bytes
        self.queries, self.received = ([None] * self.spec.num_layers for _ in range(2))
        self.compressed = True

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept tokens alone: keys, values, positions."""
        return sum(sum(layer.counts) for layer in self.layers) * self.spec.head_token_bytes()

    def mark(self) -> EvictingMark:
        """Remember this point; copies what later steps overwrite, refers to the rest."""
        copy = self.spec.in_place
        layers = tuple(
            (
                *(t[:, : layer.length].clone() if copy else t for t in (layer.k, layer.v, layer.positions)),
                layer.length,
                layer.ragged,
            )
            for layer in self.layers
        )
        return EvictingMark(self.seq_len, layers, tuple(self.queries), tuple(self.received), self.compressed)

    def release(self, mark: EvictingMark) -> None:
        """Nothing to give back: a mark's tensors go with it."""

    def rewind(self, mark: EvictingMark) -> None:
        """Back to `mark`, evicted tokens included."""
        assert mark.seq_len <= self.seq_len
        for layer, (k, v, positions, length, ragged) in zip(self.layers, mark.layers, strict=True):
            if self.spec.in_place:
                layer.k[:, :length], layer.v[:, :length], layer.positions[:, :length] = k, v, positions
            else:
                layer.k, layer.v, layer.positions = k, v, positions
            layer.length, layer.ragged = length, ragged
        self._layer_bytes = sum(layer.nbytes for layer in self.layers)
        self.queries, self.received = list(mark.queries), list(mark.received)
        self.seq_len, self.compressed = mark.seq_len, mark.compressed
