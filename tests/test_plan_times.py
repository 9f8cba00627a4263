"""How long a plan says that a run takes: within 20% of what was measured, and right where hand arithmetic can tell."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from longrun.config.model_config import ModelConfig
from longrun.machine.speeds import CPU_ATTENTION, DATA_SHEETS, Speeds
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.plan import Plan, make_plan
from longrun.plan.shapes import SHAPES
from longrun.plan.times import host_bytes, predict, read_seconds, token_seconds

RESULTS = Path(__file__).parent.parent / "docs" / "results"
WITHIN = 0.20
H100 = DATA_SHEETS["H100"]

DECODE = ("h100-decode-k5v3", "h100-decode-int4-weights", "h100-decode", "h100-decode-4m", "h100-decode-memory")
OFFLOAD = ("h100-offload-1m", "h100-offload-6m")
PREFILL = ("h100-prefill-128k", "h100-prefill", "h100-prefill-int4-pages", "h100-prefill-bf16", "h100-prefill-int8",
           "h100-needle-3.3m")  # fmt: skip
FORMATS = ("h100-prefill-formats", "h100-prefill-page-formats")

QWEN_1_5B = {
    **SHAPES["Llama-3-8B"],
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""Qwen2.5-Coder-1.5B-Instruct, as its makers published it."""


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def plan_of(settings: dict, capacity: int, **more: object) -> Plan:
    """The plan of a run on an H100 that a results file describes."""
    layers, queries, heads, _ = map(int, re.findall(r"\d+", settings["shape"]))
    shape = {"num_hidden_layers": layers, "num_attention_heads": queries, "num_key_value_heads": heads}
    config = ModelConfig.from_dict({**SHAPES["Llama-3-8B"], **shape}, "Llama-3-8B")
    head_map = HeadMap.uniform(layers, heads, ratio := settings["retrieval_heads"] / settings["kv_heads"])
    budget = Budget.load("h100-80g").override(
        weight_format=more.get("weight_format", settings["weight_format"]),
        kv_format=more.get("kv_format", settings["kv_format"]),
        chunk_size=settings["chunk_size"],
        pages_per_head=more.get("pages_per_head"),
    )
    split = head_map.with_window(settings["sink_size"], settings["recent_size"]).split(ratio)
    assert split.total_retrieval == settings["retrieval_heads"]
    return make_plan(config, budget, capacity, split=split)


def measured_there(found: dict) -> Speeds:
    """The figures of the run itself, where it has them."""
    names = {
        "matmul_tflops": ("matmul_tflops", 1),
        "attention_tflops": ("attention_tflops", 1),
        "memory_gb_s": ("memory_tb_s", 1e3),
        "link_gb_s": ("host_to_device_gb_s", 1),
    }
    figures = {own: found["ceilings"][name] * by for own, (name, by) in names.items() if name in found["ceilings"]}
    assert figures
    return replace(H100, measured=True, **figures)


def both(found: dict) -> tuple[Speeds, Speeds]:
    return H100, measured_there(found)


def check(predicted: float, measured: float) -> None:
    assert abs(predicted / measured - 1) < WITHIN, f"{predicted:.4g} predicted, {measured:.4g} measured"


@pytest.mark.parametrize("name", DECODE)
def test_tokens_on_an_h100(name: str) -> None:
    found = results(name)
    rows = [row for row in found["rows"] if row["runner"] == "longrun"]
    assert rows
    for row in rows:
        plan = plan_of(found["settings"], row["length"] + 512)
        for speeds in both(found):
            check(1e3 * token_seconds(plan, speeds, row["length"]), row["ms"]["median"])


@pytest.mark.parametrize("name", OFFLOAD)
def test_tokens_whose_pages_are_on_the_host(name: str) -> None:
    found = results(name)
    for row in found["rows"]:
        plan = plan_of(found["settings"], row["length"] + 128)
        # The plan of those days left room for other pages on the device: as many as the file says.
        cache, page = plan.cache, plan.cache.page_format
        away = row["host_bytes_per_token"] // (cache.total_retrieval_heads * page.payload_bytes)
        here = page.pooled_pages(row["length"]) - away
        plan = replace(plan, cache=replace(cache, device_pages_per_head=here, fetch_pages=cache.fetch_pages or 1))
        assert host_bytes(plan, row["length"]) == row["host_bytes_per_token"]
        for speeds in both(found):
            check(1e3 * token_seconds(plan, speeds, row["length"]), row["ms"]["median"])


@pytest.mark.parametrize("name", PREFILL)
def test_reading_on_an_h100(name: str) -> None:
    found = results(name)
    rows = [row for row in found["rows"] if row["runner"] == "longrun"]
    assert rows
    for row in rows:
        plan = plan_of(found["settings"], row["tokens"] + 512)
        for speeds in both(found):
            check(read_seconds(plan, speeds, row["tokens"]), row["seconds"])


@pytest.mark.parametrize("name", FORMATS)
def test_reading_by_format(name: str) -> None:
    found = results(name)
    for row in found["rows"]:
        one = {key: row[key] for key in ("weight_format", "kv_format") if key in row}
        plan = plan_of(found["settings"], found["length"] + 512, **one)
        for speeds in both(found):
            check(read_seconds(plan, speeds, found["length"]), row["median_seconds"])


def test_the_demo_model_on_a_cpu(demo_shape: ModelConfig) -> None:
    found = results("cpu-llama-cpp-smollm2-135m")
    product, memory = found["ceilings"]["matmul_tflops"], 1e3 * found["ceilings"]["memory_tb_s"]
    speeds = Speeds("the machine of the file", product, CPU_ATTENTION * product, memory, memory / 3, measured=True)
    rows = [row for row in found["rows"] if row["runner"].startswith("longrun")]
    assert len(rows) == 6
    split = HeadMap.full(demo_shape.num_layers, demo_shape.num_kv_heads).split()
    for row in rows:
        weight_format = next((name for name in ("int4", "int8") if name in row["runner"]), "fp32")
        budget = Budget.load("cpu").override(weight_format=weight_format)
        plan = make_plan(demo_shape, budget, row["length"] + 64, split=split, device_type="cpu")
        check(1e3 * token_seconds(plan, speeds, row["length"]), row["decode_ms"])
        if row["length"] > 1000:  # short texts take up to a third longer than that
            check(read_seconds(plan, speeds, row["length"]), row["length"] / row["prefill_tokens_per_s"])


@pytest.fixture
def demo_shape() -> ModelConfig:
    """SmolLM2-135M's."""
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelConfig.from_dict({**SHAPES["Llama-3-8B"], **shape}, "SmolLM2-135M")


def test_a_model_of_1_5b_by_hand() -> None:
    """At round speeds: 1 PFLOP/s, 1 TB/s, 10 GB/s."""
    config = ModelConfig.from_dict(QWEN_1_5B, "Qwen2.5-1.5B")
    speeds = Speeds("round", 1000, 1000, 1000, 10)
    plan = make_plan(config, Budget.load("h100-80g").override(weight_format="bf16"), 32768)
    weights = 28 * (1536 * (1536 + 2 * 256) + 1536 * 1536 + 3 * 1536 * 8960)  # 1.31e9
    lm_head = 151936 * 1536 * 2
    assert (plan.work.linear_weights, plan.work.dense_bytes) == (weights, 2 * weights)
    assert plan.work.linear_bytes == 2 * weights + 28 * 2 * (1536 + 2 * 256), "biases of q, k and v"
    assert 0 <= plan.work.other_bytes - lm_head < 10**6, "norms"

    pages = 32768 // 64 - 2  # the first is exact, and so are the newest 64 tokens
    cache = 56 * (pages * 64 * 128 * 2 * 0.5 + pages * 768 + 128 * 2 * 128 * 2)
    seconds = (2 * weights / 0.90 + lm_head + cache) / 1e12 + 28 * 20e-6
    assert token_seconds(plan, speeds, 32768) == pytest.approx(seconds, rel=0.01)

    attention = 4 * 128 * 12 * 28 * 32768**2 / 2 / 1e15
    seconds = 2 * weights * 32768 / 1e15 / 0.72 + attention + 2 * weights / 1e12
    assert read_seconds(plan, speeds, 32768) == pytest.approx(seconds, rel=0.01)


def test_pages_on_the_host_cost_the_link() -> None:
    """The largest of link and device, of a token as of a chunk; at a link so slow nothing else counts."""
    config = ModelConfig.from_dict(SHAPES["Llama-3-8B"], "Llama-3-8B")
    budget = replace(Budget.load("rtx4090-24g"), device_bytes=14 * 10**9)
    plan = make_plan(config, budget, 500_000, split=HeadMap.uniform(32, 8, 0.5).split(0.5))
    assert plan.cache.host_pages > 0
    slow = replace(DATA_SHEETS["4090"], link_gb_s=0.01)
    moved = plan.cache.host_pages * plan.cache.page_format.payload_bytes
    assert host_bytes(plan, plan.capacity) == moved
    assert token_seconds(plan, slow, plan.capacity) == pytest.approx(moved / 0.01e9 / 0.92)
    fast = replace(slow, link_gb_s=1e6)
    hidden = read_seconds(plan, fast, 500_000)
    assert hidden == read_seconds(plan, DATA_SHEETS["4090"], 500_000) < read_seconds(plan, slow, 500_000)
    assert "; each moves" in predict(plan, slow).line()


def test_smaller_chunks_read_more_slowly_and_longer_contexts_take_longer() -> None:
    config = ModelConfig.from_dict(SHAPES["Llama-3-8B"], "Llama-3-8B")
    budget = Budget.load("h100-80g")
    times = [
        read_seconds(make_plan(config, budget.override(chunk_size=chunk), 262_144), H100, 262_144)
        for chunk in (32768, 4096, 512)
    ]
    assert times == sorted(times) and times[-1] > 1.1 * times[0]
    plan = make_plan(config, budget, 262_144)
    for of in (read_seconds, token_seconds):
        steps = [of(plan, H100, tokens) for tokens in (1, 1000, 100_000, 262_144)]
        assert steps == sorted(steps) and steps[0] > 0


def test_nothing_is_said_of_what_nobody_measured() -> None:
    config = ModelConfig.from_dict(SHAPES["Llama-3-8B"], "Llama-3-8B")
    budget = Budget.load("h100-80g")
    assert predict(make_plan(config, budget, 1000), None) is None
    assert predict(make_plan(config, budget.override(kv_format="bf16"), 1000), H100) is None
    assert predict(make_plan(config, budget.override(weight_format="fp32"), 1000), H100) is None
    times = predict(make_plan(config, budget, 1_000_000), H100)
    assert re.fullmatch(
        r"reading 1M tokens takes about \d+ min, each token after them about \d+ ms \(an estimate for an H100 80 GB "
        r"SXM\)", times.line(),
    )  # fmt: skip
    assert "by what this machine measured" in replace(times, speeds=replace(H100, measured=True)).line()
    assert json.loads(json.dumps(times.to_dict()))["speeds"]["matmul_tflops"] == H100.matmul_tflops
