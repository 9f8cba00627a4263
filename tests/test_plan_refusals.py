"""Refusals of the plan: what it suggests fits, and one step beyond it does not."""

import json
import random
import re
import shlex
from dataclasses import replace

import pytest
from planned_models import CTX, LLAMA, LLAMA_JSON, SMALL, assumed

from longrun.cli import PLAN_OPTIONS
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.plan import NoFitError, choose_split, make_plan
from longrun.runtime.auto_head_map import assumed_losses


def refused(config, budget, capacity, split, **options):
    with pytest.raises(NoFitError) as error:
        make_plan(config, budget, capacity, split=split, **options)
    assert "\n" not in str(error.value)
    for suggestion in error.value.suggestions:
        assert suggestion.words in str(error.value)
    return error.value, {suggestion.setting: suggestion.value for suggestion in error.value.suggestions}


def does_fit(config, budget, capacity, split, **options):
    try:
        make_plan(config, budget, capacity, split=split, **options)
    except NoFitError:
        return False
    return True


def test_every_suggestion_fits_and_one_step_beyond_does_not():
    budget = Budget.load("rtx4090-24g").override(kv_format="bf16", weight_format="int8", chunk_size=16384)
    split = assumed(LLAMA, budget, 0.5)
    capacity = 990_000
    error, found = refused(LLAMA, budget, capacity, split)
    assert error.host_short > 0
    assert set(found) >= {"ctx", "retrieval_ratio", "host", "kv", "weights"}

    assert does_fit(LLAMA, budget, found["ctx"], split)
    assert not does_fit(LLAMA, budget, found["ctx"] + 1, split)

    heads = round(found["retrieval_ratio"] * 256)
    assert 0 < heads < 128
    assert does_fit(LLAMA, budget, capacity, assumed(LLAMA, budget, found["retrieval_ratio"]))
    assert not does_fit(LLAMA, budget, capacity, assumed(LLAMA, budget, (heads + 1) / 256))

    assert does_fit(LLAMA, replace(budget, host_bytes=found["host"]), capacity, split)
    assert not does_fit(LLAMA, replace(budget, host_bytes=found["host"] - 10**8), capacity, split)

    assert found["kv"] == "k5v3"
    assert does_fit(LLAMA, budget.override(kv_format="k5v3"), capacity, split)
    assert found["weights"] == "int4"
    assert does_fit(LLAMA, budget.override(weight_format="int4"), capacity, split)


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
    assert does_fit(LLAMA, replace(alone, device_bytes=alone.device_bytes + error.device_short), CTX, split)
    assert not does_fit(LLAMA, replace(alone, device_bytes=alone.device_bytes + error.device_short - 1), CTX, split)


def test_one_byte_missing_is_one_byte():
    """A host pool that is too small for a page of every head is not what is short."""
    split = HeadMap.uniform(6, 4, 0.5).split(0.5)
    needed = make_plan(SMALL, Budget(device_bytes=10**10), 4096, split=split, device_type="cpu").device_bytes
    error, _ = refused(SMALL, Budget(device_bytes=needed - 1, host_bytes=1000), 4096, split, device_type="cpu")
    assert (error.device_short, error.host_short) == (1, 0)
    assert "1 B of device pool memory short" in str(error)


@pytest.mark.parametrize("seed", range(30))
def test_every_advice_followed_to_the_letter_fits(seed, tmp_path, capsys):
    """The same command again with what it said, for models, budgets and settings of every size."""
    draw = random.Random(seed)
    heads, group = draw.choice([1, 2, 8]), draw.choice([1, 4])
    shape = {
        "num_hidden_layers": draw.choice([2, 7, 32]),
        "num_key_value_heads": heads,
        "num_attention_heads": heads * group,
        "hidden_size": 64 * heads * group,
        "head_dim": draw.choice([64, 96]),
        "intermediate_size": draw.choice([256, 14336]),
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_JSON | shape))
    device = draw.choice(["cpu", "cuda"])
    memory = {"gpu": draw.choice([0.4, 1, 3, 10, 40]) * draw.uniform(0.5, 2) * 10**9}
    memory["host"] = draw.choice([0, 1000, 10**8, 10**10])
    tables = {"weights": {"format": draw.choice(["fp32", "bf16", "nf4", "int4"])}}
    tables["kv"] = {"format": draw.choice(["k5v3", "bf16"]), "recent_size": draw.choice([16, 256, 32768])}
    tables["prefill"] = {"chunk_size": draw.choice([64, 1024, 32768]), "mode": draw.choice(["exact", "sparse"])}
    tables["decode"] = {"pages_per_head": draw.choice(["off", 512])}

    def write_budget():
        lines = ["[memory]", *(f'{key} = "{int(value)} B"' for key, value in memory.items())]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        (tmp_path / "budget.toml").write_text("\n".join(lines))

    def plan(*more):
        return plan_command([*command, "--json", *more])

    if device == "cuda" and shape["head_dim"] == 96:
        tables["kv"]["format"] = "bf16"  # quantized pages are not served there, and must not be advised
    if shape["head_dim"] == 96 or tables["kv"]["format"] == "bf16":
        tables["decode"]["pages_per_head"] = "off"  # refused in its own words
        tables["prefill"]["mode"] = "exact"
    write_budget()
    command = ["--model", str(tmp_path), "--budget", str(tmp_path / "budget.toml"), "--device", device]
    command += ["--ctx", str(draw.choice([1000, 50_000, 10**6, 10**7]))]
    command += draw.choice([[], ["--retrieval-ratio", "0.7"]])
    try:
        assert plan() == 0
        assert plan("--ctx", f"{json.loads(capsys.readouterr().out)['max_ctx']:,}") == 0
        return
    except NoFitError as error:
        said = error.told_by(PLAN_OPTIONS)
    facts = json.loads(capsys.readouterr().out)
    assert facts["error"] == said
    for suggestion in facts["suggestions"]:
        assert suggestion["text"] in said
        words = suggestion["text"].removesuffix(" with a head map").replace(" with --", " --")
        options, _, file = words.partition(" with ") if words.startswith("--") else ("", "", words)
        if file:
            key, size = re.match(r'(gpu|host) = "([\d.]+) GB" under \[memory\]', file).groups()
            before, memory[key] = memory[key], float(size) * 10**9
            write_budget()
        assert plan(*shlex.split(options)) == 0, suggestion
        if file:
            memory[key] = before
            write_budget()
    for key, short in (("gpu", facts["device_short"]), ("host", facts["host_short"])):
        memory[key] += short
    write_budget()
    assert "weights" in said or plan() == 0


def test_advice_names_options_only_where_there_are_such():
    budget = Budget(device_bytes=3 * 10**9, weight_format="nf4", kv_format="bf16")
    error, found = refused(SMALL, budget, 2_000_000, None, device_type="cpu")
    assert f"a context of {found['ctx']} tokens" in str(error) and "--" not in str(error)
    said = error.told_by({"--kv"})
    assert "--kv k5v3" in said and f"a context of {found['ctx']} tokens" in said
    assert f"--ctx {found['ctx']}" in error.told_by(PLAN_OPTIONS)


def test_where_no_setting_helps_fewer_bits_are_named_with_their_memory():
    """A model of which not even the smallest weights fit: on a CPU `--weights int4` is proposed, too."""
    error, found = refused(LLAMA, Budget(device_bytes=5 * 10**9, source="cpu"), 8192, None, device_type="cpu")
    assert found == {"gpu": found["gpu"], "weights": "int4"}
    said = error.told_by(PLAN_OPTIONS)
    assert "(main memory, too), or --weights int4 with gpu = " in said


def test_a_smaller_chunk_is_suggested_where_it_is_enough():
    split = HeadMap.uniform(32, 8, 0.5).split(0.5)
    needed = make_plan(LLAMA, Budget(device_bytes=10**12, chunk_size=1024, weight_format="nf4"), 100_000, split=split)
    budget = Budget(device_bytes=needed.device_bytes, chunk_size=65536, weight_format="nf4")
    _, found = refused(LLAMA, budget, 100_000, split)
    assert found["chunk_size"] == 1024
    assert does_fit(LLAMA, replace(budget, chunk_size=1024), 100_000, split)
    assert not does_fit(LLAMA, replace(budget, chunk_size=1025), 100_000, split)


def test_suggested_ratio_follows_the_given_head_map():
    # every head of the last three layers first: the busiest layer has four retrieval heads at any such ratio
    scores = tuple((float(layer >= 3),) * 4 for layer in range(6))
    budget = Budget(device_bytes=800 * 10**6, weight_format="nf4")
    split = choose_split(SMALL, budget, HeadMap(scores), 0.5)
    _, found = refused(SMALL, budget, 2_000_000, split, device_type="cpu")
    heads = round(found["retrieval_ratio"] * 24)
    assert 0 < heads < 12
    again = choose_split(SMALL, budget, HeadMap(scores), found["retrieval_ratio"])
    beyond = choose_split(SMALL, budget, HeadMap(scores), (heads + 1) / 24)
    assert does_fit(SMALL, budget, 2_000_000, again, device_type="cpu")
    assert not does_fit(SMALL, budget, 2_000_000, beyond, device_type="cpu")


def test_a_budget_that_cannot_hold_the_weights_says_so():
    budget = Budget(device_bytes=10 * 10**9, weight_format="bf16", source="mine")
    error, found = refused(LLAMA, budget, 8192, None)
    assert "mine does not even hold the weights: 16.1 GB in bf16" in str(error)
    norms = 2 * 2**20 - 65 * 8192  # what they leave of their segment
    assert error.device_short == 16_060_522_496 + norms + 850_000_000 - 10 * 10**9
    assert found == {"weights": "int4"}
    assert does_fit(LLAMA, replace(budget, weight_format="int4"), 8192, None)
    assert not does_fit(LLAMA, replace(budget, weight_format="int8"), 8192, None)
    _, found = refused(LLAMA, replace(budget, device_bytes=10_200 * 10**6), 8192, None, device_type="cpu")
    assert found == {"weights": "nf4"}  # where it is the faster one of the two with 4 bits


def test_where_no_other_setting_helps_the_memory_needed_is_named():
    budget = Budget(device_bytes=2 * 10**9, weight_format="nf4")
    _, found = refused(LLAMA, budget, 8192, None)
    assert set(found) == {"gpu"}
    assert does_fit(LLAMA, replace(budget, device_bytes=found["gpu"]), 8192, None)
    assert not does_fit(LLAMA, replace(budget, device_bytes=found["gpu"] - 10**8), 8192, None)


@pytest.mark.parametrize("given", [{}, {"kv_bytes": "60%"}])
def test_selection_is_named_where_a_plan_without_it_fits(given):
    """Digests are what is too much: one byte below what selecting needs, reading all pages fits."""
    base = Budget(device_bytes=10**12, weight_format="bf16", chunk_size=64, **given)
    head_map = assumed_losses(LLAMA, "cuda") if given else None
    split = choose_split(LLAMA, base, head_map, assume=True, capacity=100_000)
    selecting = base.override(pages_per_head=256)
    dense, selected = (make_plan(LLAMA, b, 100_000, split=split) for b in (base, selecting))
    digests = next(item for item in selected.items if item.name == "page digests")
    assert digests.bytes == selected.cache.total_retrieval_heads * 1561 * 528 and "page digests" not in {
        item.name for item in dense.items
    }
    assert selected.to_dict()["selection"]["pages_per_head"] == 256 and dense.to_dict()["selection"] is None
    tight = replace(selecting, device_bytes=selected.device_bytes - 1)
    error, found = refused(LLAMA, tight, 100_000, split)
    assert found["select"] == "off" and "decoding that reads all pages" in str(error)
    assert "--select off" in error.told_by(PLAN_OPTIONS)
    assert does_fit(LLAMA, replace(tight, pages_per_head="off"), 100_000, split)
    error, found = refused(LLAMA, replace(tight, device_bytes=dense.device_bytes - 1), 100_000, split)
    assert "select" not in found
