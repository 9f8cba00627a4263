"""How far each head may reach within so many bytes: where the loss falls most for its bytes first.

With a loss for each head and reach this is a knapsack with one choice a head. Going along every head's lower convex
hull of (bytes, loss), best ratio over all heads first, gives the least loss of all choices wherever it stops with the
bytes used up, and is off by less than one head's step elsewhere (the linear relaxation's bound).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from longrun.errors import HeadMapError
from longrun.patterns.reach_losses import ReachLosses
from longrun.units import ALL_TOKENS, format_bytes

_Point = tuple[float, float, int]  # bytes, loss, reach


def allocate(
    losses: ReachLosses, bytes_of_reach: Callable[[int], float], budget_bytes: float
) -> tuple[tuple[int, ...], ...]:
    """The reach of every head, within `budget_bytes` in all; the same for the same arguments.

    Every head begins with what costs least, as a rule the first reach. Then steps to more are taken, largest loss
    saved per byte first (ties: lower layer, then lower head). A head whose next step does not fit stays where it is,
    and smaller steps of others are still tried.

    Args:
        losses: of the heads. A head that keeps all tokens loses nothing.
        bytes_of_reach: bytes of one head of this reach; `ALL_TOKENS` for all.
        budget_bytes: of all heads together.

    Returns:
        [num_layers][num_kv_heads], one of `losses.reaches` or `ALL_TOKENS`.

    Raises:
        HeadMapError: even the least that heads can have does not fit.
    """
    options = (*losses.reaches, ALL_TOKENS)
    cost = {reach: float(bytes_of_reach(reach)) for reach in options}
    chosen: list[list[int]] = []
    steps = []
    used = 0.0
    for layer, row in enumerate(losses.losses):
        chosen.append([])
        for head, of_head in enumerate(row):
            hull = lower_hull(
                [(cost[reach], loss, reach) for reach, loss in zip(options, (*of_head, 0.0), strict=True)]
            )
            chosen[layer].append(hull[0][2])
            used += hull[0][0]
            for number, (now, then) in enumerate(pairwise(hull)):
                steps.append((_slope(now, then), layer, head, number, then[0] - now[0], then[2]))
    if used > budget_bytes:
        raise HeadMapError(
            f"{format_bytes(int(budget_bytes))} for cached keys and values do not hold the shortest reach of every "
            f"head, {format_bytes(int(used))}: give at least {int(used):,} bytes"
        )
    stopped = set()
    for _, layer, head, _, more, reach in sorted(steps):
        if (layer, head) in stopped:
            continue
        if used + more > budget_bytes:
            stopped.add((layer, head))
            continue
        used += more
        chosen[layer][head] = reach
    return tuple(tuple(row) for row in chosen)


def lower_hull(points: Sequence[_Point]) -> list[_Point]:
    """The points (bytes, loss, reach) at which a line from below touches: ascending in bytes, falling in loss, each
    step saving less per byte than the one before."""
    hull: list[_Point] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: _Point, other: _Point) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
