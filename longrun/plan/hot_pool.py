"""The hot pool as it is asked for: device memory for host pages that decode steps chose lately."""

from __future__ import annotations

from longrun.errors import InputError, quoted
from longrun.patterns.head_split import HeadSplit
from longrun.plan.budget import OFF, Budget
from longrun.plan.placement import Placement, PlanSettings
from longrun.quant.kv_format import PageFormat
from longrun.specs.selection_spec import Selection
from longrun.units import ALL_TOKENS, format_bytes, parse_bytes

HOT_POOL_HELP = (
    "GPU memory, like 2GB, that keeps the host pages which --select chose lately; off: they are read in place"
)


def parse_hot_pool(size: int | str, what: str = "hot_pool") -> int | str:
    """Bytes, or "off".

    Raises:
        InputError: neither.
    """
    if isinstance(size, str) and size.strip() == OFF:
        return OFF
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InputError(f'{what} {quoted(size)} is neither a memory size nor off: write it like "2 GB"')
    return parse_bytes(size, what)


def hot_bytes_of(budget: Budget, selection: Selection | None) -> int:
    """Bytes of the budget's hot pool; 0 without one, or where selection is turned off.

    Raises:
        InputError: nothing is selected.
    """
    if budget.hot_pool in (None, OFF) or budget.pages_per_head == OFF:
        return 0
    assert isinstance(budget.hot_pool, int)
    asked = f"hot_pool {format_bytes(budget.hot_pool)}"
    if selection is None:
        raise InputError(
            f"{asked} is for the pages that decode steps select, and these read all: give select N as well, or "
            f"hot_pool off"
        )
    return budget.hot_pool


def check_hot_bytes(
    hot_bytes: int, selection: Selection | None, split: HeadSplit, page_format: PageFormat, capacity: int
) -> None:
    """Raise InputError where a hot pool of that many bytes does not hold the pages of one step, at the full context."""
    if not hot_bytes or selection is None:
        return
    reaches = split.retrieval_reaches
    heads = sum(reach == ALL_TOKENS for row in reaches for reach in row) if reaches else split.total_retrieval
    pages = max(selection.pages_per_head, selection.pages_of(page_format.pooled_pages(capacity)))
    least = heads * pages * page_format.payload_bytes
    if hot_bytes < least:
        raise InputError(
            f"hot_pool {format_bytes(hot_bytes)} does not hold the {pages:,} pages that a step reads of each of "
            f"{heads:,} heads: give at least {-(-least // 10**6)} MB, or hot_pool off"
        )


def hot_pool_notes(settings: PlanSettings, placement: Placement) -> tuple[str, ...]:
    """Why the hot pool that is asked for is left out, where it is. It changes no answer, so that a budget may name one
    for the contexts and machines that use it."""
    if not settings.hot_bytes or placement.cache.hot_slots:
        return ()
    if not placement.cache.host_pages:
        why = "no page stands on the host"
    elif not placement.attention.selects:
        why = "no step leaves out a page"
    else:
        why = "host pages are read in place here"
    return (f"the hot pool of {format_bytes(settings.hot_bytes)} is left out: {why}",)
