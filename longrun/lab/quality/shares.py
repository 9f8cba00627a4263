"""Head splits that hold a given share of full attention's tokens in a context of one length.

A token held is a key and a value that one KV head keeps. Full attention holds `length` in every head; a head that
reaches R tokens holds the sinks and R. So equal shares are equal cached keys and values at that length, whatever page
format or index they stand in: what those take besides is counted apart (`measures.cache_bytes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longrun.errors import HeadMapError
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.patterns.reach_allocation import allocate
from longrun.units import ALL_TOKENS


def reaching_split(head_map: HeadMap, share: float, length: int) -> HeadSplit | None:
    """Reaches by the map's losses that hold at most `share` of all tokens; None where the shortest reach of every head
    holds more.

    Raises:
        HeadMapError: the map has no reach losses.
    """
    losses = head_map.reach_losses
    if losses is None:
        raise HeadMapError(
            "the head map has no reach losses, by which a share of the tokens becomes reaches: measure them "
            "(longrun.patterns identify --method reach), or give a recent_size, which keeps whole heads"
        )
    heads = head_map.num_layers * head_map.num_kv_heads
    if heads * held_tokens(losses.reaches[0], losses.sink_size, length) > share * length * heads:
        return None
    reaches = allocate(losses, lambda reach: held_tokens(reach, losses.sink_size, length), share * length * heads)
    return HeadSplit.of_reaches(reaches, losses.sink_size, losses.reaches[0])


def whole_head_split(head_map: HeadMap, share: float, length: int) -> HeadSplit | None:
    """As many heads that keep every token as `share` of all tokens holds, all others with the map's window; None where
    the windows alone hold more.

    Heads are ranked by what they lose with the longest measured reach that is no longer than the window, where the map
    has reach losses, else by the map's scores.
    """
    heads = head_map.num_layers * head_map.num_kv_heads
    window = held_tokens(head_map.recent_size, head_map.sink_size, length)
    spare = heads * (share * length - window)
    if spare < 0:
        return None
    count = heads if window == length else min(heads, int(spare / (length - window) + 1e-9))
    return HeadMap(
        _ranks(_scores_beyond(head_map)), head_map.sink_size, head_map.recent_size
    ).split(retrieval_ratio=count / heads)  # fmt: skip


def streaming_split(num_layers: int, num_kv_heads: int, share: float, length: int, sink_size: int) -> HeadSplit | None:
    """Sinks and one window in all heads that hold `share` of all tokens; None where that leaves no window."""
    recent_size = int(share * length) - sink_size
    if recent_size < 1:
        return None
    return HeadSplit(((False,) * num_kv_heads,) * num_layers, sink_size, recent_size)


def with_sinks(head_map: HeadMap, sink_size: int) -> HeadMap:
    """The map, all of whose heads keep at least these first tokens; its losses, too."""
    losses = head_map.reach_losses
    if losses is not None:
        losses = replace(losses, sink_size=max(losses.sink_size, sink_size))
    return replace(head_map, sink_size=max(head_map.sink_size, sink_size), reach_losses=losses)


def held_tokens(reach: int, sink_size: int, length: int) -> int:
    """Tokens that one head of this reach holds of `length`."""
    return length if reach == ALL_TOKENS else min(length, sink_size + reach)


def split_tokens(split: HeadSplit, length: int) -> int:
    """Tokens that all heads of a split hold of `length`, summed."""
    return sum(held_tokens(reach, split.sink_size, length) for row in split.all_reaches for reach in row)


def _scores_beyond(head_map: HeadMap) -> Sequence[Sequence[float]]:
    losses = head_map.reach_losses
    if losses is None:
        return head_map.scores
    place = max((n for n, reach in enumerate(losses.reaches) if reach <= head_map.recent_size), default=0)
    return [[of_head[place] for of_head in row] for row in losses.losses]


def _ranks(scores: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Scores of any unit as ones in [0, 1] of the same order."""
    most = max(max(row) for row in scores) or 1.0
    return tuple(tuple(score / most for score in row) for row in scores)
