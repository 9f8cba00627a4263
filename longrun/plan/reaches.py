"""How far heads reach within so many bytes of cached keys and values: the planner's side of the allocation."""

from __future__ import annotations

from collections.abc import Callable

from longrun.patterns.head_split import HeadSplit
from longrun.patterns.reach_allocation import allocate
from longrun.patterns.reach_losses import ReachLosses
from longrun.quant.kv_format import PageFormat
from longrun.specs.cache_spec import head_bytes, ring_bytes
from longrun.specs.reach import Reach


def allocated_split(losses: ReachLosses, page_format: PageFormat, capacity: int, kv_bytes: int) -> HeadSplit:
    """The split whose heads reach as far as `kv_bytes` hold at `capacity` tokens; the same for the same arguments.

    Raises:
        HeadMapError: not even the window of every head fits.
    """
    reaches = allocate(losses, reach_bytes(losses, page_format, capacity), kv_bytes)
    return HeadSplit.of_reaches(reaches, losses.sink_size, losses.reaches[0])


def reach_bytes(losses: ReachLosses, page_format: PageFormat, capacity: int) -> Callable[[int], int]:
    """Bytes of one head by its reach in a cache of `capacity` tokens: a ring of the first reach, otherwise pages."""
    sink_size, recent_size = losses.sink_size, losses.reaches[0]

    def size(reach: int) -> int:
        if reach == recent_size:
            return ring_bytes(page_format, min(sink_size + recent_size, capacity))
        return head_bytes(Reach(reach, sink_size, page_format), capacity)

    return size
