"""Baseline head maps: fixed by their seed, the opposite of a map, and nothing at all."""

from __future__ import annotations

import pytest

from longrun.patterns.baseline_maps import inverted_map, random_map, streaming_map
from longrun.patterns.head_map import HeadMap


def test_random_maps_are_those_of_their_seed_everywhere():
    made = random_map(3, 4, seed=1)
    assert made == random_map(3, 4, seed=1)
    assert made.split(0.5).hash != random_map(3, 4, seed=2).split(0.5).hash
    assert made.split(retrieval_ratio=0.5).total_retrieval == 6
    # written down: another version of Python must give the same numbers
    assert made.scores[0] == pytest.approx(EXPECTED, abs=1e-12)


EXPECTED = (0.9233392883504961, 0.49368087491250756, 0.3037586619931044, 0.6462165511201926)


def test_the_inverted_map_keeps_what_the_map_would_drop():
    head_map = HeadMap(((0.1, 0.9, 0.4), (0.8, 0.2, 0.7)), sink_size=3, recent_size=5)
    inverted = inverted_map(head_map)
    assert (inverted.sink_size, inverted.recent_size) == (3, 5)
    for one, other in zip(
        head_map.split(retrieval_ratio=0.5).retrieval, inverted.split(retrieval_ratio=0.5).retrieval, strict=True
    ):
        assert [not keep for keep in one] == list(other)


def test_the_streaming_map_keeps_no_head():
    head_map = streaming_map(2, 3, sink_size=4, recent_size=8)
    assert head_map.split().total_retrieval == head_map.split(retrieval_ratio=0.0).total_retrieval == 0
    assert (head_map.split().sink_size, head_map.split().recent_size) == (4, 8)
