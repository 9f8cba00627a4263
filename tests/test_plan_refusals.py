"""What the plan says where something does not fit: what it suggests fits, and one step beyond it does not."""

from dataclasses import replace

import pytest
from planned_models import CTX, LLAMA, SMALL, assumed

from longrun.budget import Budget
from longrun.patterns.head_map import HeadMap
from longrun.plan import NoFitError, choose_split, make_plan


def refused(config, budget, ctx, split, **options):
    with pytest.raises(NoFitError) as error:
        make_plan(config, budget, ctx, split=split, **options)
    assert "\n" not in str(error.value)
    for suggestion in error.value.suggestions:
        assert suggestion.text in str(error.value)
    return error.value, {suggestion.setting: suggestion.value for suggestion in error.value.suggestions}


def does_fit(config, budget, ctx, split, **options):
    try:
        make_plan(config, budget, ctx, split=split, **options)
    except NoFitError:
        return False
    return True


def test_every_suggestion_fits_and_one_step_beyond_does_not():
    budget = Budget.load("rtx4090-24g").override(kv_format="bf16", weight_format="int8", chunk_size=16384)
    split = assumed(LLAMA, budget, 0.5)
    ctx = 990_000
    error, found = refused(LLAMA, budget, ctx, split)
    assert error.host_short > 0
    assert set(found) >= {"ctx", "retrieval_ratio", "host", "kv", "weights"}

    assert does_fit(LLAMA, budget, found["ctx"], split)
    assert not does_fit(LLAMA, budget, found["ctx"] + 1, split)

    heads = round(found["retrieval_ratio"] * 256)
    assert 0 < heads < 128
    assert does_fit(LLAMA, budget, ctx, assumed(LLAMA, budget, found["retrieval_ratio"]))
    assert not does_fit(LLAMA, budget, ctx, assumed(LLAMA, budget, (heads + 1) / 256))

    assert does_fit(LLAMA, replace(budget, host_bytes=found["host"]), ctx, split)
    assert not does_fit(LLAMA, replace(budget, host_bytes=found["host"] - 10**8), ctx, split)

    assert found["kv"] == "k5v3"
    assert does_fit(LLAMA, budget.override(kv_format="k5v3"), ctx, split)
    assert found["weights"] == "int4"
    assert does_fit(LLAMA, budget.override(weight_format="int4"), ctx, split)


def test_the_shortfall_is_what_is_missing():
    budget = Budget.load("rtx4090-24g")
    split = assumed(LLAMA, budget, 0.5)
    error, _ = refused(LLAMA, budget, 10_000_000, split)
    assert error.device_short == 0
    assert does_fit(LLAMA, replace(budget, host_bytes=budget.host_bytes + error.host_short), 10_000_000, split)
    assert not does_fit(LLAMA, replace(budget, host_bytes=budget.host_bytes + error.host_short - 1), 10_000_000, split)
    alone = replace(budget, host_bytes=0)
    error, _ = refused(LLAMA, alone, CTX, split)
    assert error.host_short == 0
    assert does_fit(LLAMA, replace(alone, gpu_bytes=alone.gpu_bytes + error.device_short), CTX, split)
    assert not does_fit(LLAMA, replace(alone, gpu_bytes=alone.gpu_bytes + error.device_short - 1), CTX, split)


def test_a_smaller_chunk_is_suggested_where_it_is_enough():
    split = HeadMap.uniform(32, 8, 0.5).split(0.5)
    needed = make_plan(LLAMA, Budget(gpu_bytes=10**12, chunk_size=1024, weight_format="nf4"), 100_000, split=split)
    budget = Budget(gpu_bytes=needed.device_bytes, chunk_size=65536, weight_format="nf4")
    _, found = refused(LLAMA, budget, 100_000, split)
    assert found["chunk_size"] == 1024
    assert does_fit(LLAMA, replace(budget, chunk_size=1024), 100_000, split)
    assert not does_fit(LLAMA, replace(budget, chunk_size=1025), 100_000, split)


def test_suggested_ratio_follows_the_given_head_map():
    # every head of the last three layers first: the busiest layer has four retrieval heads at any such ratio
    scores = tuple((float(layer >= 3),) * 4 for layer in range(6))
    budget = Budget(gpu_bytes=800 * 10**6, weight_format="nf4")
    split = choose_split(SMALL, budget, HeadMap(scores), 0.5)
    _, found = refused(SMALL, budget, 2_000_000, split, device_type="cpu")
    heads = round(found["retrieval_ratio"] * 24)
    assert 0 < heads < 12
    again = choose_split(SMALL, budget, HeadMap(scores), found["retrieval_ratio"])
    beyond = choose_split(SMALL, budget, HeadMap(scores), (heads + 1) / 24)
    assert does_fit(SMALL, budget, 2_000_000, again, device_type="cpu")
    assert not does_fit(SMALL, budget, 2_000_000, beyond, device_type="cpu")


def test_a_budget_that_cannot_hold_the_weights_says_so():
    budget = Budget(gpu_bytes=10 * 10**9, weight_format="bf16", source="mine")
    error, found = refused(LLAMA, budget, 8192, None)
    assert "mine does not even hold the weights: 16.1 GB in bf16" in str(error)
    assert error.device_short == 16_060_522_496 + 850_000_000 - 10 * 10**9
    assert found == {"weights": "int4"}
    assert does_fit(LLAMA, replace(budget, weight_format="int4"), 8192, None)
    assert not does_fit(LLAMA, replace(budget, weight_format="int8"), 8192, None)
    _, found = refused(LLAMA, replace(budget, gpu_bytes=10_200 * 10**6), 8192, None, device_type="cpu")
    assert found == {"weights": "nf4"}  # where it is the faster one of the two with 4 bits


def test_where_no_other_setting_helps_the_memory_needed_is_named():
    budget = Budget(gpu_bytes=2 * 10**9, weight_format="nf4")
    _, found = refused(LLAMA, budget, 8192, None)
    assert set(found) == {"gpu"}
    assert does_fit(LLAMA, replace(budget, gpu_bytes=found["gpu"]), 8192, None)
    assert not does_fit(LLAMA, replace(budget, gpu_bytes=found["gpu"] - 10**8), 8192, None)
