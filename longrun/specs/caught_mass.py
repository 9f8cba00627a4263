"""How much attention the pages hold that a decode step chose, by what their digests say of them: plain values, without
torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class CaughtMass:
    """An estimate: a digest's score stands for the attention to its page. The sink page, the tail and streaming heads,
    which are always read, are not counted.

    Attributes:
        by_layer: by layer and retrieval head, the chosen pages' share of what all of the head's pages are estimated to
            get, mean over the head's queries; empty for a layer without pages.
    """

    by_layer: tuple[tuple[float, ...], ...]

    @property
    def share(self) -> float:
        """Mean over all heads of all layers."""
        return fmean(share for heads in self.by_layer for share in heads)

    def line(self) -> str:
        """As a person reads it."""
        return f"they hold about {self.share:.1%} of the attention to pages, as digests estimate it"

    def to_dict(self) -> dict[str, Any]:
        """JSON types; layers without pages are null."""
        by_layer = [fmean(heads) if heads else None for heads in self.by_layer]
        return {"estimated_by": "digests", "share": self.share, "by_layer": by_layer}
