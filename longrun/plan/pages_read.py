"""How much of the pages a decode step reads, where a plan selects: what statistics and results say of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longrun.plan.plan import Plan
from longrun.specs.selection_spec import select_from_text


def selection_facts(plan: Plan) -> dict[str, Any] | None:
    """What the plan selects, as results record it: JSON types, None for nothing."""
    return None if plan.attention.selection is None else asdict(plan.attention.selection)


@dataclass(frozen=True)
class PagesRead:
    """What a decode step reads of the pages, by retrieval head on average.

    Attributes:
        held, read: pages of a head, and those of them that are read.
        share: of the tokens that a head holds, those of the exact sink page and the tail included.
        why_all: why the step does not select; empty where it does.
    """

    held: float
    read: float
    share: float
    why_all: str = ""

    def line(self) -> str:
        """As a person reads it."""
        why = f": {self.why_all}" if self.why_all else ""
        return f"{self.read:,.0f} of {self.held:,.0f} pages a head read ({self.share:.1%} of its tokens){why}"


def pages_read(plan: Plan, seq_len: int) -> PagesRead | None:
    """What a decode step reads at `seq_len` tokens; None where the plan selects nothing."""
    cache, heads = plan.cache, plan.cache.total_retrieval_heads
    selection = plan.attention.selection
    if selection is None:
        return None
    held = cache.held_pages(seq_len) / heads
    read = cache.read_pages(seq_len, selection) / heads
    size = cache.page_format.page_size
    exact = seq_len - cache.page_format.pooled_pages(seq_len) * size
    why_all = "" if selection.selects_at(cache.page_format.pooled_pages(seq_len)) else select_from_text(selection)
    return PagesRead(held, read, (read * size + exact) / max(1, held * size + exact), why_all)
