"""Which heads the plan takes as retrieval heads: full attention, a head map, and whose ratio counts."""

from dataclasses import replace

import pytest
from planned_models import LLAMA, SMALL

from longrun.errors import HeadMapError, InputError
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.plan import choose_split


def test_full_attention_without_a_head_map_and_the_budgets_ratio_unused():
    budget = Budget.load("a100-80g")
    chosen = choose_split(LLAMA, budget)
    assert chosen.split.is_full
    assert chosen.note == "full attention: no head map given"
    assert "retrieval_ratio 0.5 is not used" in chosen.notes[0]
    assert choose_split(LLAMA, budget, "full").note == "full attention"


def test_head_map_takes_the_callers_ratio_then_the_budgets(tmp_path):
    head_map = HeadMap(tuple(tuple(head / 4 for head in range(4)) for _ in range(6)), 7, 9)
    head_map.save(tmp_path / "map")
    budget = Budget(device_bytes=10**9, retrieval_ratio=0.25)
    assert choose_split(SMALL, budget, tmp_path / "map").split.total_retrieval == 6
    assert choose_split(SMALL, budget, tmp_path / "map", 0.75).split.total_retrieval == 18
    by_score = choose_split(SMALL, replace(budget, retrieval_ratio=None), str(tmp_path / "map")).split
    assert by_score == head_map.split(threshold=0.5)
    assert (by_score.sink_size, by_score.recent_size) == (7, 9)
    windowed = choose_split(SMALL, replace(budget, sink_size=1, recent_size=2), head_map).split
    assert (windowed.sink_size, windowed.recent_size) == (1, 2)


def test_splits_that_make_no_sense():
    budget = Budget(device_bytes=10**9)
    with pytest.raises(InputError, match="needs a head map"):
        choose_split(SMALL, budget, None, 0.5)
    with pytest.raises(InputError, match="needs a head map"):
        choose_split(SMALL, budget, "full", 0.5, assume=True)
    with pytest.raises(HeadMapError, match="the model has 32 of 8"):
        choose_split(LLAMA, budget, HeadMap.full(6, 4))
    with pytest.raises(HeadMapError, match="outside"):
        choose_split(SMALL, budget, None, 1.5, assume=True)


def test_a_map_that_scored_nothing_is_a_note_of_the_plan():
    cpu = Budget.load("cpu")
    nothing = HeadMap(((0.25,) * LLAMA.num_kv_heads,) * LLAMA.num_layers)
    assert "no head scores enough" in choose_split(LLAMA, cpu, nothing).notes[0]
    assert "all scores are 0.25, so they rank nothing" in choose_split(LLAMA, cpu, nothing, 0.5).notes[0]
