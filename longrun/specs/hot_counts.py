"""What decode steps chose of host pages, and how much of it stood in the hot pool: plain values, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longrun.units import format_bytes


@dataclass(frozen=True)
class HotCounts:
    """Counts of the steps whose tokens became the sequence's: a step that was launched ahead and thrown away counts
    nothing, though what it fetched may be a hit later.

    Attributes:
        pages, missed: by layer, chosen pages that stood on the host, and those of them that had to be fetched.
        payload_bytes: of a page.
    """

    pages: tuple[int, ...]
    missed: tuple[int, ...]
    payload_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Share of the pages that stood in the pool; None without a page."""
        return 1 - sum(self.missed) / sum(self.pages) if sum(self.pages) else None

    @property
    def link_bytes(self) -> int:
        """Bytes that were fetched."""
        return sum(self.missed) * self.payload_bytes

    def since(self, earlier: HotCounts) -> HotCounts:
        """What came after `earlier`."""
        pages, missed = (
            tuple(now - then for now, then in zip(a, b, strict=True))
            for a, b in ((self.pages, earlier.pages), (self.missed, earlier.missed))
        )
        return HotCounts(pages, missed, self.payload_bytes)

    def line(self) -> str:
        """As a person reads it."""
        if self.hit_rate is None:
            return "no host page chosen"
        return (
            f"{self.hit_rate:.1%} of {sum(self.pages):,} chosen host pages in the hot pool, "
            f"{format_bytes(self.link_bytes)} fetched"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types, with what `pages` and `missed` come to in all."""
        return {
            "host_pages_chosen": sum(self.pages), "hits": sum(self.pages) - sum(self.missed), "hit_rate": self.hit_rate,
            "link_bytes": self.link_bytes, "by_layer": asdict(self),
        }  # fmt: skip
