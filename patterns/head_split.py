"""Which KV heads are retrieval heads and how far they reach: what a head map decides, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from longrun.arguments import integer, number
from longrun.errors import HeadMapError, quoted
from longrun.units import ALL_TOKENS

DEFAULT_SINK_SIZE = 64
DEFAULT_RECENT_SIZE = 256


@dataclass(frozen=True)
class HeadSplit:
    """Which KV heads are retrieval heads, and what the others keep.

    Attributes:
        retrieval: [num_layers][num_kv_heads], true for a retrieval head.
        sink_size, recent_size: tokens a streaming head keeps: positions < sink_size and the last recent_size.
        reaches: [num_layers][num_kv_heads], the newest tokens that a head sees beside the sinks: `recent_size` of a
            streaming head, more of a retrieval head, `ALL_TOKENS` where it keeps all. Empty where every retrieval head
            does.

    Raises:
        HeadMapError: no layer or head, rows of different lengths, sink_size < 0 or recent_size < 1, or reaches that do
            not go with the rest.
    """

    retrieval: tuple[tuple[bool, ...], ...]
    sink_size: int = DEFAULT_SINK_SIZE
    recent_size: int = DEFAULT_RECENT_SIZE
    reaches: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_rows(self.retrieval, "head split")
        check_window(self.sink_size, self.recent_size, "head split")
        if self.reaches:
            self._check_reaches()

    @classmethod
    def of_reaches(cls, reaches: Sequence[Sequence[int]], sink_size: int, recent_size: int) -> HeadSplit:
        """The split in which each head reaches as far as `reaches` [num_layers][num_kv_heads] say, at least
        `recent_size` tokens. Raises HeadMapError as the class."""
        rows = tuple(map(tuple, reaches))
        retrieval = tuple(tuple(reach > recent_size for reach in row) for row in rows)
        plain = all(reach in (recent_size, ALL_TOKENS) for row in rows for reach in row)
        return cls(retrieval, sink_size, recent_size, () if plain else rows)

    def _check_reaches(self) -> None:
        check_rows(self.reaches, "head split: reaches")
        shape = len(self.reaches), len(self.reaches[0])
        if shape != (self.num_layers, self.num_kv_heads):
            raise HeadMapError(
                f"head split: reaches are of {shape[0]} layers of {shape[1]} KV heads and not of {self.num_layers} of "
                f"{self.num_kv_heads}: give one a head"
            )
        for layer, (row, bits) in enumerate(zip(self.reaches, self.retrieval, strict=True)):
            for head, (reach, keep) in enumerate(zip(row, bits, strict=True)):
                where = f"head split: layer {layer}, KV head {head}: reach"
                integer(reach, where, self.recent_size, ALL_TOKENS, HeadMapError)
                if keep != (reach > self.recent_size):
                    kind = "retrieval" if keep else "streaming"
                    raise HeadMapError(
                        f"{where} {reach:,} is not a {kind} head's with a window of {self.recent_size:,}: streaming "
                        f"heads have that window, retrieval heads a longer reach"
                    )

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
        """True where every head keeps every token, that is: full attention."""
        return not self.reaches and all(all(row) for row in self.retrieval)

    def retrieval_heads(self, layer_idx: int) -> list[int]:
        """Old indices of the layer's retrieval KV heads, ascending."""
        return [head for head, keep in enumerate(self.retrieval[layer_idx]) if keep]

    def streaming_heads(self, layer_idx: int) -> list[int]:
        """Old indices of the layer's streaming KV heads, ascending."""
        return [head for head, keep in enumerate(self.retrieval[layer_idx]) if not keep]

    def permutation(self, layer_idx: int) -> list[int]:
        """Order of the layer's KV heads at run time, new -> old: retrieval heads first, those of the longest reach at
        the front (ties: lower head), then streaming heads."""
        kept = self.retrieval_heads(layer_idx)
        if self.reaches:
            kept.sort(key=lambda head: -self.reaches[layer_idx][head])
        return kept + self.streaming_heads(layer_idx)

    @property
    def all_reaches(self) -> tuple[tuple[int, ...], ...]:
        """[num_layers][num_kv_heads] as `reaches`, also where that is empty."""
        return self.reaches or tuple(
            tuple(ALL_TOKENS if keep else self.recent_size for keep in row) for row in self.retrieval
        )

    @property
    def retrieval_reaches(self) -> tuple[tuple[int, ...], ...]:
        """Of every layer the reaches of its retrieval heads, in the order of `permutation`; empty as `reaches`."""
        return tuple(
            tuple(self.reaches[layer_idx][head] for head in self.permutation(layer_idx)[:count])
            for layer_idx, count in enumerate(self.num_retrieval)
            if self.reaches
        )

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over shape, bits, sink_size, recent_size and, where there are some,
        reaches."""
        bits = "".join("1" if keep else "0" for row in self.retrieval for keep in row)
        text = f"{self.num_layers}x{self.num_kv_heads} {bits} {self.sink_size} {self.recent_size}"
        if self.reaches:
            text += " " + " ".join(str(reach) for row in self.reaches for reach in row)
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
