"""The memory plan: its sums, where the device ends and the host begins, and the largest context."""

from dataclasses import replace

import pytest
from planned_models import CTX, LLAMA, SMALL, SMALL_JSON, assumed

from longrun.config.model_config import ModelConfig
from longrun.errors import PlanError
from longrun.patterns.head_map import HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.plan import NoFitError, make_plan
from longrun.plan.search import MAX_CAPACITY


def items(plan):
    assert len({item.name for item in plan.items}) == len(plan.items)
    return {item.name: item.bytes for item in plan.items}


def test_llama_3_8b_at_3_3m_on_80_gb_equals_hand_arithmetic():
    budget = Budget.load("a100-80g")
    plan = make_plan(LLAMA, budget, CTX, split=assumed(LLAMA, budget, 0.5))
    pages = -(-CTX // 64) - 1 - 1  # the last is the tail, the first the exact sink page
    heads = 128
    expected = {
        "retrieval pages": heads * pages * (4096 + 4096 + 256),
        "page index (key scales)": heads * pages * 512,
        "sink pages": heads * 2 * 64 * 128 * 2,
        "tails": heads * 2 * 64 * 128 * 2,
        "rings": 128 * (64 + 256) * 2 * 128 * 2,
        "marks": 2 * (heads * 2 * 64 * 128 * 2 + 128 * (64 + 256) * 2 * 128 * 2),
        "page tables": (4 * heads * pages + pages + (7 * 32 + 2) * 4) * 4,
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
    assert plan.cache_bytes == pytest.approx(CTX * 17_920, rel=0.004)


def test_full_bf16_cache_costs_131072_bytes_a_token():
    budget = Budget(device_bytes=10**12, kv_format="bf16")
    assert make_plan(LLAMA, budget, 1000).cache.bytes_per_token == 131_072


def test_a_servers_plan_counts_what_only_a_server_holds():
    budget = Budget(device_bytes=10**12)
    plans = {
        device: [items(make_plan(LLAMA, budget, 1000, device_type=device, serves=serves)) for serves in (False, True)]
        for device in ("cpu", "cuda")
    }
    plain, served = plans["cpu"]
    assert served == plain | {"server": 25_000_000 + 1350 * 128256} and "server" not in plain
    assert plans["cuda"][0] == plans["cuda"][1]


def test_the_device_is_filled_before_the_host_is_used():
    budget = Budget.load("rtx4090-24g")
    plan = make_plan(LLAMA, budget, CTX, split=assumed(LLAMA, budget, 0.5))
    cache = plan.cache
    assert 0 < cache.device_pages_per_head < cache.pages_per_head
    one_more_page_each = cache.total_retrieval_heads * cache.page_format.payload_bytes
    assert plan.device_bytes <= budget.device_bytes < plan.device_bytes + one_more_page_each
    assert plan.host_bytes == cache.host_pages * 8448 <= budget.host_bytes
    assert cache.fetch_pages >= max(cache.retrieval_heads)
    assert cache.fetch_pages * 8448 <= 2 * 256 * 2**20
    assert items(plan)["fetch buffer"] == cache.fetch_pages * 8448


def test_device_share_puts_pages_on_the_host_although_there_is_room():
    budget = Budget(device_bytes=2 * 10**9, host_bytes=10**9, weight_format="fp32")
    plan = make_plan(SMALL, budget, 4096, device_type="cpu", device_share=0.5)
    assert plan.cache.pages_per_head == 62
    assert plan.cache.device_pages_per_head == 31
    assert plan.cache.fetch_pages == 0  # a CPU reads them where they stand
    with pytest.raises(NoFitError, match="host memory"):
        make_plan(SMALL, replace(budget, host_bytes=1000), 4096, device_type="cpu", device_share=0.5)


def test_no_item_is_empty_and_a_plan_without_retrieval_heads_has_no_limit():
    budget = Budget(device_bytes=2 * 10**9, weight_format="fp32")
    split = HeadSplit(((False,) * 4,) * 6, 4, 8)
    plan = make_plan(SMALL, budget, 10**8, split=split, device_type="cpu")
    assert all(item.bytes > 0 for item in plan.items)
    assert plan.max_capacity == MAX_CAPACITY
    assert plan.cache.bytes_per_token == 0


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("host", [0, 3 * 10**8])
@pytest.mark.parametrize("kv_format", ["int4", "fp32"])
def test_the_largest_context_fits_and_one_token_more_does_not(ratio, host, kv_format):
    budget = Budget(device_bytes=10**9, host_bytes=host, weight_format="nf4", kv_format=kv_format)
    split = assumed(SMALL, budget, ratio)
    plan = make_plan(SMALL, budget, 1000, split=split, device_type="cpu")
    most = make_plan(SMALL, budget, plan.max_capacity, split=split, device_type="cpu")
    assert most.max_capacity == plan.max_capacity > 10_000
    assert (most.host_bytes > 0) == (host > 0)
    with pytest.raises(NoFitError):
        make_plan(SMALL, budget, plan.max_capacity + 1, split=split, device_type="cpu")


def test_a_context_beyond_the_trained_window_is_a_warning_with_both_numbers():
    budget = Budget(device_bytes=2 * 10**9)
    assert make_plan(SMALL, budget, 4096, device_type="cpu").warnings == ()
    (warning,) = make_plan(SMALL, budget, 4097, device_type="cpu").warnings
    assert "4,097" in warning
    assert "4,096" in warning


def test_default_context_is_the_trained_window_or_what_fits():
    assert make_plan(SMALL, Budget(device_bytes=2 * 10**9), device_type="cpu").capacity == 4096
    needed = make_plan(SMALL, Budget(device_bytes=2 * 10**9), 4096, device_type="cpu").device_bytes
    tight = Budget(device_bytes=needed - 1)
    plan = make_plan(SMALL, tight, device_type="cpu")
    assert plan.capacity == plan.max_capacity < 4096
    assert "4,096" in plan.warnings[0]


def test_a_sliding_window_checkpoint_runs_within_its_window_only():
    config = ModelConfig.from_dict(
        {**SMALL_JSON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 2048},
        "config.json",
    )
    budget = Budget(device_bytes=2 * 10**9)
    assert make_plan(config, budget, 2048, device_type="cpu").capacity == 2048
    assert make_plan(config, budget, device_type="cpu").capacity == 2048
    with pytest.raises(PlanError, match='"sliding_window": null') as error:
        make_plan(config, budget, 2049, device_type="cpu")
    assert "2,049" in str(error.value)
    assert "2,048" in str(error.value)


def test_chunk_and_scratch_never_exceed_the_context():
    budget = Budget(device_bytes=2 * 10**9, chunk_size=1024)
    plan = make_plan(SMALL, budget, 100, device_type="cpu")
    assert plan.chunk_size == plan.attention.chunk_size == 100
    assert plan.attention.scratch_tokens == 128


def test_a_tiny_cache_still_leaves_room_to_load_the_weights():
    plan = make_plan(SMALL, Budget(device_bytes=2 * 10**9, weight_format="fp32", chunk_size=1), 1, device_type="cpu")
    largest_tensor = 1000 * 256 * 4
    assert plan.device_bytes >= items(plan)["weights"] + items(plan)["runtime base"] + largest_tensor
