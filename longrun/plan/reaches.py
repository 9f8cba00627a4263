"""How far heads reach within so many bytes of cached keys and values: the planner's side of the allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from longrun.errors import HeadMapError
from longrun.patterns.head_split import HeadSplit
from longrun.patterns.reach_allocation import allocate
from longrun.patterns.reach_losses import ReachLosses
from longrun.quant.kv_format import PageFormat
from longrun.specs.cache_spec import head_bytes, ring_bytes
from longrun.specs.reach import Reach
from longrun.units import ALL_TOKENS


def allocated_split(
    losses: ReachLosses, page_format: PageFormat, capacity: int, kv_bytes: int, window: int | None = None,
    sink_size: int | None = None,
) -> HeadSplit:  # fmt: skip
    """The split whose heads reach as far as `kv_bytes` hold at `capacity` tokens; the same for the same arguments.

    Streaming heads share one window, a ring of exact keys and values. It is the measured reach with which the heads
    lose least in all: a wide one costs little in a long context, where pages of a finite reach cost more.

    Args:
        window: a measured reach that the streaming heads shall have; None chooses.
        sink_size: first tokens that every head keeps; None for those of the losses.

    Raises:
        HeadMapError: not even the shortest window of every head fits.
    """
    if sink_size is not None:
        losses = replace(losses, sink_size=sink_size)
    found: list[tuple[float, HeadSplit]] = []
    for recent_size in losses.reaches if window is None else (window,):
        some = losses.at_least(recent_size)
        try:
            reaches = _within(some, reach_bytes(some, page_format, capacity), kv_bytes)
        except HeadMapError:
            if not found:
                raise
            break
        found.append((some.lost(reaches), HeadSplit.of_reaches(reaches, losses.sink_size, recent_size)))
    return min(found, key=lambda one: one[0])[1]


def window_of(reaches: Sequence[Sequence[int]], losses: ReachLosses) -> int:
    """The streaming heads' window among reaches that `allocated_split` gave."""
    shortest = min(map(min, reaches))
    return losses.reaches[0] if shortest >= ALL_TOKENS else shortest


def reach_bytes(losses: ReachLosses, page_format: PageFormat, capacity: int) -> Callable[[int], int]:
    """Bytes of one head by its reach in a cache of `capacity` tokens: a ring of the first reach, otherwise pages."""
    sink_size, recent_size = losses.sink_size, losses.reaches[0]

    def size(reach: int) -> int:
        if reach == recent_size:
            return ring_bytes(page_format, min(sink_size + recent_size, capacity))
        return head_bytes(Reach(reach, sink_size, page_format), capacity)

    return size


def _within(losses: ReachLosses, size: Callable[[int], int], kv_bytes: int) -> tuple[tuple[int, ...], ...]:
    """`allocate`, and with a ring. Behind many sinks a ring takes more than quantized pages of a longer reach: so much
    is then left for one.

    Raises:
        HeadMapError: as `allocate`.
    """
    ring = size(losses.reaches[0])
    for left in (kv_bytes, kv_bytes - max(0, ring - min(map(size, (*losses.reaches, ALL_TOKENS))))):
        reaches = _with_a_ring(allocate(losses, size, left), losses)
        if sum(size(reach) for row in reaches for reach in row) <= kv_bytes:
            return reaches
    raise AssertionError("a ring takes more than what was left for it")


def _with_a_ring(reaches: Sequence[Sequence[int]], losses: ReachLosses) -> tuple[tuple[int, ...], ...]:
    """`reaches`, of which at least one is the window unless all heads keep everything: so reaches say the window."""
    rows = [list(row) for row in reaches]
    if losses.reaches[0] < min(map(min, rows)) < ALL_TOKENS:
        _, layer, head = min((of_head[0], i, j) for i, row in enumerate(losses.losses) for j, of_head in enumerate(row))
        rows[layer][head] = losses.reaches[0]
    return tuple(map(tuple, rows))
