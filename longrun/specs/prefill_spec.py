"""Which pages of the past a long document's chunks read, as a setting: plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from longrun.arguments import choice, flag, integer, number
from longrun.errors import InputError, quoted
from longrun.units import parse_tokens, share_of

EXACT, SPARSE = "exact", "sparse"
PREFILL_MODES = (EXACT, SPARSE)
"""How texts are read: every chunk reads all of the past, or long documents as a `PrefillSpec` says."""

TILE = 128
"""Consecutive queries of one query head that choose their pages together."""
ROWS_PER_TILE = (1, 2, 4, 8)


@dataclass(frozen=True)
class PrefillSpec:
    """A tile of a document's chunk reads the pages of the past that hold most of its attention, of heads that keep
    every token; its own chunk, the sink page and the tail in full. The share that it reads by default is the one of
    docs/sparse-prefill.md that kept most answers of those that save time.

    Where every chunk reads everything, there is None in place of a `PrefillSpec`.

    Attributes:
        mass: None: every tile reads the share `cap` of the pages. A number above 0 and below 1: as few, between `least`
            and `cap`, as catch this share of its attention.
        dense_tokens: chunks that begin before this position read everything.
        dense_end: the newest tokens of a document that read everything; so do documents of no more than that.
        newest: pages before the chunk that are always read.
        floor: pages that a tile reads at least, `newest` included.
        least: share of the past's pages that a tile reads at least where a mass decides; beyond `cap` it means that.
        cap: share of the past's pages that a tile reads, or with a mass reads at most, above 0. `floor` wins.
        rows: means of a tile's queries by which it chooses, of `ROWS_PER_TILE`.
        correct: the middle query of every tile reads all, and what it differs by is added to the tile's other queries
            (delta correction, arXiv 2505.11254).

    Raises:
        InputError: a value out of its range.
    """

    mass: float | None = None
    dense_tokens: int = 131_072
    dense_end: int = 2048
    newest: int = 4
    floor: int = 16
    least: float = 0.05
    cap: float = 0.25
    rows: int = 1
    correct: bool = False

    def __post_init__(self) -> None:
        if self.mass is not None:
            number(self.mass, "mass", 0, 1, above=True, below=True)
        integer(self.dense_tokens, "dense_tokens")
        integer(self.dense_end, "dense_end", 1)
        integer(self.newest, "newest", 1)
        integer(self.floor, "floor", self.newest)
        number(self.cap, "cap", 0, 1, above=True)
        number(self.least, "least", 0, 1)
        if integer(self.rows, "rows", 1) not in ROWS_PER_TILE:
            choice(str(self.rows), "rows", [str(rows) for rows in ROWS_PER_TILE])
        flag(self.correct, "correct")

    def serves(self, capacity: int) -> bool:
        """Whether any token of a text of `capacity` tokens may be read sparsely."""
        return capacity > self.dense_tokens + self.dense_end

    def least_pages(self, pages: int) -> int:
        """How many of the past's `pages` a tile reads at least."""
        least = self.cap if self.mass is None else min(self.least, self.cap)
        return min(pages, max(self.floor, int(least * pages)))

    def most_pages(self, pages: int) -> int:
        """How many of the past's `pages` a tile reads at most."""
        return min(pages, max(self.floor, int(self.cap * pages)))


DEFAULT_PREFILL = PrefillSpec()


def parse_prefill_share(share: float | str, what: str = "prefill_share") -> float:
    """Above 0 and up to 1, also written like "25%".

    Raises:
        InputError: no such share.
    """
    found = share_of(share, what)
    if found is None and isinstance(share, str):
        try:
            share = float(share)
        except ValueError:
            raise InputError(f"{what} {quoted(share)} is no share: write it like 25%, or 0.25") from None
    return number(share, what, 0, 1, above=True) if found is None else found


def parse_dense_tokens(tokens: int | str, what: str = "prefill_dense") -> int:
    """Tokens, 0 or more, written as a context is.

    Raises:
        InputError: no such number.
    """
    return parse_tokens(tokens, what, 0)
