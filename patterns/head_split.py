"""Which KV heads are retrieval heads: the boolean side of a head map, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from longrun.arguments import integer, number
from longrun.errors import HeadMapError, quoted

DEFAULT_SINK_SIZE = 64
DEFAULT_RECENT_SIZE = 256


@dataclass(frozen=True)
class HeadSplit:
    """Which KV heads are retrieval heads, and what the others keep.

    Attributes:
        retrieval: [num_layers][num_kv_heads], true for a retrieval head.
        sink_size, recent_size: tokens a streaming head keeps: positions < sink_size and the last recent_size.

    Raises:
        HeadMapError: no layer or head, rows of different lengths, sink_size < 0 or recent_size < 1.
    """

    retrieval: tuple[tuple[bool, ...], ...]
    sink_size: int = DEFAULT_SINK_SIZE
    recent_size: int = DEFAULT_RECENT_SIZE

    def __post_init__(self) -> None:
        check_rows(self.retrieval, "head split")
        check_window(self.sink_size, self.recent_size, "head split")

    @property
    def num_layers(self) -> int:
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        return len(self.retrieval[0])

    @property
    def num_retrieval(self) -> tuple[int, ...]:
        """Number of retrieval heads of each layer."""
        return tuple(sum(row) for row in self.retrieval)

    @property
    def total_retrieval(self) -> int:
        return sum(self.num_retrieval)

    @property
    def retrieval_ratio(self) -> float:
        return self.total_retrieval / (self.num_layers * self.num_kv_heads)

    @property
    def is_full(self) -> bool:
        """True where every head is a retrieval head, that is: full attention."""
        return all(all(row) for row in self.retrieval)

    def retrieval_heads(self, layer_idx: int) -> list[int]:
        """Old indices of the layer's retrieval KV heads, ascending."""
        return [head for head, keep in enumerate(self.retrieval[layer_idx]) if keep]

    def streaming_heads(self, layer_idx: int) -> list[int]:
        """Old indices of the layer's streaming KV heads, ascending."""
        return [head for head, keep in enumerate(self.retrieval[layer_idx]) if not keep]

    def permutation(self, layer_idx: int) -> list[int]:
        """Order of the layer's KV heads at run time, new -> old: retrieval heads first, then streaming heads."""
        return self.retrieval_heads(layer_idx) + self.streaming_heads(layer_idx)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over shape, bits, sink_size and recent_size."""
        bits = "".join("1" if keep else "0" for row in self.retrieval for keep in row)
        text = f"{self.num_layers}x{self.num_kv_heads} {bits} {self.sink_size} {self.recent_size}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def spread_retrieval_heads(num_layers: int, num_kv_heads: int, retrieval_ratio: float) -> tuple[int, ...]:
    """Retrieval heads of each layer when `round(retrieval_ratio * total)` heads are spread evenly over the layers.

    Raises:
        HeadMapError: a ratio outside [0, 1].
    """
    total = count_for_ratio(retrieval_ratio, num_layers * num_kv_heads)
    edges = [total * layer // num_layers for layer in range(num_layers + 1)]
    return tuple(after - before for before, after in pairwise(edges))


def count_for_ratio(retrieval_ratio: float, total: int) -> int:
    """`round(retrieval_ratio * total)` heads; HeadMapError for a ratio outside [0, 1]."""
    retrieval_ratio = number(retrieval_ratio, "retrieval ratio", 0, 1, error=HeadMapError)
    return round(retrieval_ratio * total)


def check_rows(rows: Sequence[Sequence[object]], source: str) -> None:
    """Raise HeadMapError unless `rows` is a non-empty rectangle."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence) or not all(_is_row(row) for row in rows):
        raise HeadMapError(f"{source} is {quoted(rows)}: it must be a sequence of rows, one a layer")
    if not rows or not rows[0]:
        raise HeadMapError(f"{source} is empty: it needs a row per layer and a column per KV head")
    for row_number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise HeadMapError(
                f"{source}: row {row_number} has {len(row)} columns where row 1 has {len(rows[0])}: "
                f"every layer needs one score per KV head"
            )


def check_window(sink_size: int, recent_size: int, source: str) -> None:
    """Raise HeadMapError unless sink_size is a whole number >= 0 and recent_size one >= 1."""
    for name, value, least in (("sink_size", sink_size, 0), ("recent_size", recent_size, 1)):
        integer(value, f"{source}: {name}", least, error=HeadMapError)


def _is_row(row: object) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str | bytes)
