"""What sparse reading read of the past and how much attention it caught: plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = tuple[float, ...]  # one number a query head, in the layer's order: retrieval heads first


@dataclass(frozen=True)
class PrefillCounts:
    """By layer and query head, of the chunks that were read sparsely; heads that always read densely have zeros.

    Attributes:
        read: pages that tiles read. pages: those that lay before them.
        caught: the share of their attention that dense rows have in what their tile reads, summed over `rows` rows.
    """

    read: tuple[Row, ...]
    pages: tuple[Row, ...]
    caught: tuple[Row, ...]
    rows: tuple[Row, ...]

    @property
    def read_share(self) -> float | None:
        """Pages read, of those of the past; None where nothing was read sparsely."""
        return _share(self.read, self.pages)

    @property
    def caught_share(self) -> float | None:
        """Mean share of attention caught, over all dense rows, layers and heads; None where there was none."""
        return _share(self.caught, self.rows)

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """`read`, `pages`, `caught` and `rows` over all layers and heads."""
        return _sum(self.read), _sum(self.pages), _sum(self.caught), _sum(self.rows)

    def since(self, earlier: PrefillCounts) -> PrefillCounts:
        """What came after `earlier`, of the same session."""
        return PrefillCounts(*(_less(getattr(self, name), getattr(earlier, name)) for name in _NAMES))

    def line(self) -> str:
        """As a person reads it."""
        if self.read_share is None:
            return "nothing read sparsely"
        caught = "" if self.caught_share is None else f", {self.caught_share:.1%} of the attention caught"
        return f"{self.read_share:.1%} of the pages read{caught}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the shares, of everything and by layer and head (null for heads that always read densely)."""
        return {
            "pages_read": int(_sum(self.read)), "pages": int(_sum(self.pages)), "read_share": self.read_share,
            "caught_share": self.caught_share, "read_by_head": _by_head(self.read, self.pages),
            "caught_by_head": _by_head(self.caught, self.rows),
        }  # fmt: skip


_NAMES = ("read", "pages", "caught", "rows")


def _sum(table: tuple[Row, ...]) -> float:
    return sum(map(sum, table))


def _share(part: tuple[Row, ...], whole: tuple[Row, ...]) -> float | None:
    return _sum(part) / _sum(whole) if _sum(whole) else None


def _by_head(part: tuple[Row, ...], whole: tuple[Row, ...]) -> list[list[float | None]]:
    return [
        [round(a / b, 5) if b else None for a, b in zip(*rows, strict=True)] for rows in zip(part, whole, strict=True)
    ]


def _less(now: tuple[Row, ...], then: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(tuple(a - b for a, b in zip(*rows, strict=True)) for rows in zip(now, then, strict=True))
