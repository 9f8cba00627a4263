"""Head maps that know nothing of the model: what a real map must beat.

Each is an ordinary `HeadMap`, so that its rows run in the same runtime, with the same window and the same bytes as the
map they are compared with.
"""

from __future__ import annotations

import random

from longrun.patterns.head_map import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, HeadMap


def streaming_map(
    num_layers: int, num_kv_heads: int, sink_size: int = DEFAULT_SINK_SIZE, recent_size: int = DEFAULT_RECENT_SIZE
) -> HeadMap:
    """Every score 0: sinks and a window are all that is kept (StreamingLLM, arXiv 2309.17453)."""
    return HeadMap(((0.0,) * num_kv_heads,) * num_layers, sink_size, recent_size)


def random_map(
    num_layers: int,
    num_kv_heads: int,
    seed: int,
    sink_size: int = DEFAULT_SINK_SIZE,
    recent_size: int = DEFAULT_RECENT_SIZE,
) -> HeadMap:
    """Scores drawn evenly from [0, 1): the same for the same seed on every machine (Python's Mersenne Twister)."""
    rng = random.Random(f"random head map/{seed}")
    scores = tuple(tuple(rng.random() for _ in range(num_kv_heads)) for _ in range(num_layers))
    return HeadMap(scores, sink_size, recent_size)


def inverted_map(head_map: HeadMap) -> HeadMap:
    """1 - score: at any ratio the heads that `head_map` would keep last; same window."""
    scores = tuple(tuple(1.0 - score for score in row) for row in head_map.scores)
    return HeadMap(scores, head_map.sink_size, head_map.recent_size, origin=head_map.origin)
