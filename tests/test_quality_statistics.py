"""Intervals of the quality harness, by published examples and by simulation."""

from __future__ import annotations

import random

import pytest

from longrun.quality.statistics import Estimate, bootstrap, paired_difference, wilson
from longrun.quality.summary import verdict


def test_wilson_is_the_published_interval():
    """Worked examples: 81 of 263 and 15 of 148 (Newcombe 1998, table I, method 3), 0 of 20, 1 of 29."""
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, count), (low, high) in cases.items():
        found = wilson(successes, count)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(20, 20).high == 1.0


def test_bootstrap_covers_as_it_says_and_counts_documents():
    rng, covered = random.Random(1), 0
    for seed in range(200):
        values = [rng.gauss(0, 1) for _ in range(40)]
        found = bootstrap(values, [str(i) for i in range(40)], seed=seed)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 200 <= 0.98
    # ten documents of ten equal items each are ten observations, not a hundred
    values = [rng.gauss(0, 1) for _ in range(10) for _ in range(1)]
    repeated = [value for value in values for _ in range(10)]
    documents = [str(i // 10) for i in range(100)]
    clustered, single = bootstrap(repeated, documents), bootstrap(repeated, [str(i) for i in range(100)])
    assert clustered.value == pytest.approx(single.value)
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


def test_pairing_removes_what_the_items_share():
    rng = random.Random(0)
    difficulty = [rng.gauss(0, 5) for _ in range(50)]
    own, groups = [value - 0.3 + rng.gauss(0, 0.2) for value in difficulty], [str(i) for i in range(50)]
    difference = paired_difference(own, difficulty, groups)
    assert difference.high < 0 and difference.high - difference.low < 0.2
    alone = bootstrap(own, groups)
    assert alone.high - alone.low > 1
    assert verdict(difference) == "worse than the reference"
    assert verdict(Estimate(0.1, 0.05, 0.2, 9)) == "better than the reference"
    same = paired_difference([1.0] * 30, [1.0] * 30, groups[:30], (-1, 1))
    assert (same.low, same.high) == (-0.1, 0.1) and "no difference" in verdict(same)  # rule of three
    assert paired_difference([0.0] * 30, [1.0] * 30, groups[:30], (-1, 1)) == Estimate(-1.0, -1.0, -0.9, 30)
