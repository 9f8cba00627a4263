"""Intervals of the quality harness, by published examples and by simulation; what rows are taken together."""

from __future__ import annotations

import random

import pytest

from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import Row
from longrun.lab.quality.statistics import Estimate, bootstrap, paired_difference, wilson
from longrun.lab.quality.summary import families, summarize, verdict


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


def test_seeds_are_taken_together_a_question_at_a_time(tmp_path):
    settings = {"lengths": [100], "tasks": ["single"]}
    results = QualityResults.open(
        tmp_path, settings, [Row(n, f"random:{i}", 0.5).to_dict() for i, n in enumerate("abc")]
    )
    results.head["described"] = {n: {"method": "random map, int4", "retrieval_ratio": 0.5} for n in "abc"}
    kv = {"used": 1, "peak": 1}
    for name, right in zip("abc", (1, 1, 0), strict=True):
        asked = [
            {"task": "needle", "document": f"d/{i}", "depth": 0.5, "expected": str(i), "exact": bool(right and i % 2)}
            for i in range(10)
        ]
        asked = [item | {"token_accuracy": float(item["exact"])} for item in asked]
        results.add({"row": name, "length": 100, "group": "single", "items": asked, "kv": kv})
    ((label, names),) = families(results).items()
    assert names == ["a", "b", "c"] and "50% of heads (3 rows)" in label
    together = summarize(results, names, label, 100).tasks["all"]
    assert together.exact.count == 10 and together.exact.value == pytest.approx(1 / 3)
    assert summarize(results, ["a"], "a", 100).tasks["all"].exact == wilson(5, 10)


def test_random_tokens_of_several_seeds_are_one_family_for_each_budget(tmp_path):
    evictions = ["random-1:25%", "random-22:25%", "random-1:50%", "random-2:50%", "snapkv:25%", "random-1:25%@document"]
    rows = [Row(f"row {i}", kv="bf16", eviction=eviction) for i, eviction in enumerate(evictions)]
    results = QualityResults.open(tmp_path, {"lengths": [100], "tasks": ["single"]}, [row.to_dict() for row in rows])
    results.head["described"] = {row.name: {"method": row.method, "retrieval_ratio": None} for row in rows}
    assert families(results) == {
        "random tokens, 25% (2 rows)": ["row 0", "row 1"],
        "random tokens, 50% (2 rows)": ["row 2", "row 3"],
    }
