"""The memory plan: its sums, its refusals (every suggestion tried), and its command."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from longrun.budget import Budget
from longrun.config import ModelConfig
from longrun.errors import HeadMapError, InputError, PlanError
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan import NoFitError, choose_split, make_plan
from longrun.plan_search import MAX_CTX

ROOT = Path(__file__).resolve().parent.parent
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
CTX = 3_300_000


@pytest.fixture
def llama():
    return ModelConfig.from_dict(LLAMA_3_8B, "config.json")


@pytest.fixture
def small():
    return ModelConfig.from_dict(SMALL, "config.json")


def items(plan):
    assert len({item.name for item in plan.items}) == len(plan.items)
    return {item.name: item.bytes for item in plan.items}


def assumed(config, budget, ratio):
    return choose_split(config, budget, None, ratio, assume=True)


def test_llama_3_8b_at_3_3m_on_80_gb_equals_hand_arithmetic(llama):
    budget = Budget.load("a100-80g")
    plan = make_plan(llama, budget, CTX, split=assumed(llama, budget, 0.5))
    pages = -(-CTX // 64) - 1 - 1  # the last is the tail, the first the exact sink page
    heads = 128
    expected = {
        "retrieval pages": heads * pages * (4096 + 4096 + 256),
        "page index (key scales)": heads * pages * 512,
        "sink pages": heads * 2 * 64 * 128 * 2,
        "tails": heads * 2 * 64 * 128 * 2,
        "rings": 128 * (64 + 256) * 2 * 128 * 2,
        "page tables": 2 * heads * pages * 4,
        "prefill scratch": 2 * 4 * 65536 * 128 * 2,
        "runtime base": 850_000_000,
    }
    found = items(plan)
    assert {name: found[name] for name in expected} == expected
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    tables_and_norms = (2 * 128256 * 4096 + 65 * 4096) * 2
    assert found["weights"] == linears // 2 + linears // 32 * 2 + tables_and_norms
    assert plan.cache.bytes_per_token == 17_920
    assert plan.host_bytes == 0
    assert plan.cache.host_pages == 0
    assert plan.device_bytes == plan.total_bytes == sum(found.values()) <= 80 * 10**9
    assert plan.cache_bytes == pytest.approx(CTX * 17_920, rel=0.002)


def test_full_bf16_cache_costs_131072_bytes_a_token(llama):
    budget = Budget(gpu_bytes=10**12, kv_format="bf16")
    assert make_plan(llama, budget, 1000).cache.bytes_per_token == 131_072


def test_the_device_is_filled_before_the_host_is_used(llama):
    budget = Budget.load("rtx4090-24g")
    plan = make_plan(llama, budget, CTX, split=assumed(llama, budget, 0.5))
    cache = plan.cache
    assert 0 < cache.device_pages_per_head < cache.pages_per_head
    one_more_page_each = cache.total_retrieval_heads * cache.page_format.payload_bytes
    assert plan.device_bytes <= budget.gpu_bytes < plan.device_bytes + one_more_page_each
    assert plan.host_bytes == cache.host_pages * 8448 <= budget.host_bytes
    assert cache.fetch_pages >= max(cache.retrieval_heads)
    assert cache.fetch_pages * 8448 <= 2 * 256 * 2**20
    assert items(plan)["fetch buffer"] == cache.fetch_pages * 8448


def test_device_share_puts_pages_on_the_host_although_there_is_room(small):
    budget = Budget(gpu_bytes=2 * 10**9, host_bytes=10**9, weight_format="fp32")
    plan = make_plan(small, budget, 4096, device_type="cpu", device_share=0.5)
    assert plan.cache.pages_per_head == 62
    assert plan.cache.device_pages_per_head == 31
    assert plan.cache.fetch_pages == 31 * 4
    with pytest.raises(NoFitError, match="host memory"):
        make_plan(small, replace(budget, host_bytes=1000), 4096, device_type="cpu", device_share=0.5)


def test_no_item_is_empty_and_a_plan_without_retrieval_heads_has_no_limit(small):
    budget = Budget(gpu_bytes=2 * 10**9, weight_format="fp32")
    split = HeadSplit(((False,) * 4,) * 6, 4, 8)
    plan = make_plan(small, budget, 10**8, split=split, device_type="cpu")
    assert all(item.bytes > 0 for item in plan.items)
    assert plan.max_ctx == MAX_CTX
    assert plan.cache.bytes_per_token == 0


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("host", [0, 3 * 10**8])
@pytest.mark.parametrize("kv_format", ["int4", "fp32"])
def test_the_largest_context_fits_and_one_token_more_does_not(small, ratio, host, kv_format):
    budget = Budget(gpu_bytes=10**9, host_bytes=host, weight_format="nf4", kv_format=kv_format)
    split = assumed(small, budget, ratio)
    plan = make_plan(small, budget, 1000, split=split, device_type="cpu")
    most = make_plan(small, budget, plan.max_ctx, split=split, device_type="cpu")
    assert most.max_ctx == plan.max_ctx > 10_000
    assert (most.host_bytes > 0) == (host > 0)
    with pytest.raises(NoFitError):
        make_plan(small, budget, plan.max_ctx + 1, split=split, device_type="cpu")


def test_a_context_beyond_the_trained_window_is_a_warning_with_both_numbers(small):
    budget = Budget(gpu_bytes=2 * 10**9)
    assert make_plan(small, budget, 4096, device_type="cpu").warnings == ()
    (warning,) = make_plan(small, budget, 4097, device_type="cpu").warnings
    assert "4,097" in warning
    assert "4,096" in warning


def test_default_context_is_the_trained_window_or_what_fits(small):
    assert make_plan(small, Budget(gpu_bytes=2 * 10**9), device_type="cpu").ctx == 4096
    needed = make_plan(small, Budget(gpu_bytes=2 * 10**9), 4096, device_type="cpu").device_bytes
    tight = Budget(gpu_bytes=needed - 1)
    plan = make_plan(small, tight, device_type="cpu")
    assert plan.ctx == plan.max_ctx < 4096
    assert "4,096" in plan.warnings[0]


def test_a_sliding_window_checkpoint_runs_within_its_window_only():
    config = ModelConfig.from_dict(
        {**SMALL, "architectures": ["MistralForCausalLM"], "sliding_window": 2048}, "config.json"
    )
    budget = Budget(gpu_bytes=2 * 10**9)
    assert make_plan(config, budget, 2048, device_type="cpu").ctx == 2048
    assert make_plan(config, budget, device_type="cpu").ctx == 2048
    with pytest.raises(PlanError, match='"sliding_window": null') as error:
        make_plan(config, budget, 2049, device_type="cpu")
    assert "2,049" in str(error.value)
    assert "2,048" in str(error.value)


def test_chunk_and_scratch_never_exceed_the_context(small):
    budget = Budget(gpu_bytes=2 * 10**9, chunk_size=1024)
    plan = make_plan(small, budget, 100, device_type="cpu")
    assert plan.chunk_size == plan.attention.chunk_size == 100
    assert plan.attention.scratch_tokens == 128


def test_a_tiny_cache_still_leaves_room_to_load_the_weights(small):
    plan = make_plan(small, Budget(gpu_bytes=2 * 10**9, weight_format="fp32", chunk_size=1), 1, device_type="cpu")
    largest_tensor = 1000 * 256 * 4
    assert plan.device_bytes >= items(plan)["weights"] + items(plan)["runtime base"] + largest_tensor


# --- refusals: what is suggested fits, and one step beyond it does not ---


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


def test_every_suggestion_fits_and_one_step_beyond_does_not(llama):
    budget = Budget.load("rtx4090-24g").override(kv_format="bf16", weight_format="int8", chunk_size=16384)
    split = assumed(llama, budget, 0.5)
    ctx = 990_000
    error, found = refused(llama, budget, ctx, split)
    assert error.host_short > 0
    assert set(found) >= {"ctx", "retrieval_ratio", "host", "kv", "weights"}

    assert does_fit(llama, budget, found["ctx"], split)
    assert not does_fit(llama, budget, found["ctx"] + 1, split)

    heads = round(found["retrieval_ratio"] * 256)
    assert 0 < heads < 128
    assert does_fit(llama, budget, ctx, assumed(llama, budget, found["retrieval_ratio"]))
    assert not does_fit(llama, budget, ctx, assumed(llama, budget, (heads + 1) / 256))

    assert does_fit(llama, replace(budget, host_bytes=found["host"]), ctx, split)
    assert not does_fit(llama, replace(budget, host_bytes=found["host"] - 10**8), ctx, split)

    assert found["kv"] == "int4"
    assert does_fit(llama, budget.override(kv_format="int4"), ctx, split)
    assert found["weights"] == "int4"
    assert does_fit(llama, budget.override(weight_format="int4"), ctx, split)


def test_the_shortfall_is_what_is_missing(llama):
    budget = Budget.load("rtx4090-24g")
    split = assumed(llama, budget, 0.5)
    error, _ = refused(llama, budget, 10_000_000, split)
    assert error.device_short == 0
    assert does_fit(llama, replace(budget, host_bytes=budget.host_bytes + error.host_short), 10_000_000, split)
    assert not does_fit(llama, replace(budget, host_bytes=budget.host_bytes + error.host_short - 1), 10_000_000, split)
    alone = replace(budget, host_bytes=0)
    error, _ = refused(llama, alone, CTX, split)
    assert error.host_short == 0
    assert does_fit(llama, replace(alone, gpu_bytes=alone.gpu_bytes + error.device_short), CTX, split)
    assert not does_fit(llama, replace(alone, gpu_bytes=alone.gpu_bytes + error.device_short - 1), CTX, split)


def test_a_smaller_chunk_is_suggested_where_it_is_enough(llama):
    split = HeadMap.uniform(32, 8, 0.5).split(0.5)
    needed = make_plan(llama, Budget(gpu_bytes=10**12, chunk_size=1024, weight_format="nf4"), 100_000, split=split)
    budget = Budget(gpu_bytes=needed.device_bytes, chunk_size=65536, weight_format="nf4")
    _, found = refused(llama, budget, 100_000, split)
    assert found["chunk_size"] == 1024
    assert does_fit(llama, replace(budget, chunk_size=1024), 100_000, split)
    assert not does_fit(llama, replace(budget, chunk_size=1025), 100_000, split)


def test_suggested_ratio_follows_the_given_head_map(small):
    # every head of the last three layers first: the busiest layer has four retrieval heads at any such ratio
    scores = tuple((float(layer >= 3),) * 4 for layer in range(6))
    budget = Budget(gpu_bytes=800 * 10**6, weight_format="nf4")
    split = choose_split(small, budget, HeadMap(scores), 0.5)
    _, found = refused(small, budget, 2_000_000, split, device_type="cpu")
    heads = round(found["retrieval_ratio"] * 24)
    assert 0 < heads < 12
    again = choose_split(small, budget, HeadMap(scores), found["retrieval_ratio"])
    beyond = choose_split(small, budget, HeadMap(scores), (heads + 1) / 24)
    assert does_fit(small, budget, 2_000_000, again, device_type="cpu")
    assert not does_fit(small, budget, 2_000_000, beyond, device_type="cpu")


def test_a_budget_that_cannot_hold_the_weights_says_so(llama):
    budget = Budget(gpu_bytes=10 * 10**9, weight_format="bf16", source="mine")
    error, found = refused(llama, budget, 8192, None)
    assert "mine does not even hold the weights: 16.1 GB in bf16" in str(error)
    assert error.device_short == 16_060_522_496 + 850_000_000 - 10 * 10**9
    assert found == {"weights": "int4"}
    assert does_fit(llama, replace(budget, weight_format="int4"), 8192, None)
    assert not does_fit(llama, replace(budget, weight_format="int8"), 8192, None)
    _, found = refused(llama, budget, 8192, None, device_type="cpu")
    assert found == {"weights": "nf4"}  # where it is the faster one of the two with 4 bits


def test_where_no_other_setting_helps_the_memory_needed_is_named(llama):
    budget = Budget(gpu_bytes=2 * 10**9, weight_format="nf4")
    _, found = refused(llama, budget, 8192, None)
    assert set(found) == {"gpu"}
    assert does_fit(llama, replace(budget, gpu_bytes=found["gpu"]), 8192, None)
    assert not does_fit(llama, replace(budget, gpu_bytes=found["gpu"] - 10**8), 8192, None)


# --- which heads ---


def test_full_attention_without_a_head_map_and_the_budgets_ratio_unused(llama):
    budget = Budget.load("a100-80g")
    chosen = choose_split(llama, budget)
    assert chosen.split.is_full
    assert chosen.note == "full attention: no head map given"
    assert "retrieval_ratio 0.5 is not used" in chosen.notes[0]
    assert choose_split(llama, budget, "full").note == "full attention"


def test_head_map_takes_the_callers_ratio_then_the_budgets(small, tmp_path):
    head_map = HeadMap(tuple(tuple(head / 4 for head in range(4)) for _ in range(6)), 7, 9)
    head_map.save(tmp_path / "map")
    budget = Budget(gpu_bytes=10**9, retrieval_ratio=0.25)
    assert choose_split(small, budget, tmp_path / "map").split.total_retrieval == 6
    assert choose_split(small, budget, tmp_path / "map", 0.75).split.total_retrieval == 18
    by_score = choose_split(small, replace(budget, retrieval_ratio=None), str(tmp_path / "map")).split
    assert by_score == head_map.split(threshold=0.5)
    assert (by_score.sink_size, by_score.recent_size) == (7, 9)
    windowed = choose_split(small, replace(budget, sink_size=1, recent_size=2), head_map).split
    assert (windowed.sink_size, windowed.recent_size) == (1, 2)


def test_splits_that_make_no_sense(small, llama):
    budget = Budget(gpu_bytes=10**9)
    with pytest.raises(InputError, match="needs a head map"):
        choose_split(small, budget, None, 0.5)
    with pytest.raises(InputError, match="needs a head map"):
        choose_split(small, budget, "full", 0.5, assume=True)
    with pytest.raises(HeadMapError, match="the model has 32 of 8"):
        choose_split(llama, budget, HeadMap.full(6, 4))
    with pytest.raises(HeadMapError, match="outside"):
        choose_split(small, budget, None, 1.5, assume=True)


# --- the command ---


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return str(folder)


def run_plan(*arguments, program=("-m", "longrun.plan")):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_table_says_what_is_planned(model_dir):
    options = ("--ctx", "3.3M", "--budget", "a100-80g", "--retrieval-ratio", "0.5")
    result = run_plan("--model", model_dir, *options)
    assert result.returncode == 0, result.stderr
    for text in ["3.3M tokens", "128 of 256 KV heads", "assumed", "55,755,177,984", "17,920 bytes per token", "8,192"]:
        assert text in result.stdout


def test_json_is_the_plan(model_dir, llama):
    options = ("--ctx", "1M", "--budget", "a100-80g", "--kv", "bf16", "--weights", "int8", "--chunk-size", "4096")
    result = run_plan("--model", model_dir, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    budget = Budget.load("a100-80g").override(kv_format="bf16", weight_format="int8", chunk_size=4096)
    plan = make_plan(llama, budget, 10**6)
    assert json.loads(result.stdout) == json.loads(json.dumps(plan.to_dict()))


def test_no_fit_leaves_with_status_2_and_the_same_facts_in_json(model_dir):
    options = ("--model", model_dir, "--ctx", "20M", "--budget", "a100-80g")
    result = run_plan(*options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: a100-80g (gpu 80.0 GB, host 107 GB) does not hold 20,000,000 tokens")
    as_json = run_plan(*options, "--json")
    assert as_json.returncode == 2
    facts = json.loads(as_json.stdout)
    assert facts["fits"] is False
    assert f"error: {facts['error']}\n" == result.stderr
    assert facts["suggestions"][0]["setting"] == "ctx"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ctx", "0"], "at least 1"),
        (["--ctx", "-5"], "'-5'"),
        (["--ctx", "3.3X"], "'3.3X'"),
        (["--budget", "a100"], "shipped budget"),
        (["--head-map", "/no/such/map"], "/no/such/map is not a folder"),
        (["--retrieval-ratio", "half"], "'half'"),
        (["--chunk-size", "0"], "chunk_size = 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(model_dir, arguments, words):
    result = run_plan("--model", model_dir, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_missing_model_folder():
    result = run_plan("--model", "/no/such/model")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model folder /no/such/model does not exist")


def test_planning_is_quick_and_imports_nothing_heavy(model_dir):
    script = (
        "import sys; from longrun.plan_cli import plan_command; plan_command(sys.argv[1:]); "
        "sys.exit(str({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    arguments = ("--model", model_dir, "--ctx", "3.3M", "--budget", "rtx4090-24g", "--retrieval-ratio", "0.5")
    start = time.perf_counter()
    result = run_plan(*arguments, program=("-c", script))
    assert result.stderr == "set()\n"
    assert "3.3M tokens" in result.stdout
    assert time.perf_counter() - start < 5.0  # well under a second on an idle machine
