"""What a GPU's allocator takes beyond the tensors: hand arithmetic, and the memory measured on an H200."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model

from longrun.config.model_config import ModelConfig
from longrun.model.checkpoint import load_decoder
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan
from longrun.specs.device_allocator import rounding_bytes
from longrun.specs.model_bytes import model_weight_bytes, model_weight_tensors

MIB = 2**20
MEASURED = Path(__file__).parent.parent / "docs" / "results" / "h200-real-qwen2.5-coder-1.5b.json"
QWEN_JSON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
QWEN = ModelConfig.from_dict(QWEN_JSON, "config.json")


@pytest.mark.parametrize(
    ("sizes", "lost"),
    [
        ([], 0),
        ([0], 0),
        ([1], 2 * MIB - 1),
        ([MIB, MIB], 0),
        ([MIB, MIB - 512, 512], 0),
        ([MIB, MIB - 511, 512], 2 * MIB - 1),  # the first segment is full
        ([MIB + 1], 19 * MIB - 1),
        ([10 * MIB], 0),
        ([10 * MIB - 512, 10 * MIB - 512], 1024),
        ([10 * MIB + 1], 2 * MIB - 1),
        ([52 * MIB + MIB // 2], 3 * MIB // 2),
        ([52 * MIB + MIB // 2, 3 * MIB // 2], 0),  # the rest of 1.5 MiB serves again
        ([53 * MIB, MIB + 512], MIB + 19 * MIB - 512),  # a rest of 1 MiB does not
        ([6 * MIB, 12 * MIB, 15 * MIB, 14 * MIB], 3 * MIB),  # 12 went where 14 would have fitted
        ([16 * MIB + 512, 6 * MIB, 2 * MIB - 512, 14 * MIB], 0),
    ],
)
def test_segments_that_hold_nothing(sizes, lost):
    assert rounding_bytes(sizes) == lost


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_the_tensors_of_the_arithmetic_are_those_that_are_loaded(tmp_path, weight_format):
    tiny_model("qwen3", attention_bias=True).save_pretrained(tmp_path)
    config = ModelConfig.from_dir(tmp_path)
    order = [range(config.num_kv_heads)] * config.num_layers
    loaded = load_decoder(tmp_path, config, order, weight_format, "cpu")
    assert sorted(model_weight_tensors(config, weight_format, "cpu")) == sorted(x.nbytes for x in loaded.tensors())


def test_llamas_matrices_lose_nothing():
    """Only the vectors do: 65 norms of 8,192 bytes in one small segment."""
    llama = ModelConfig.from_dict(
        QWEN_JSON
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256},
        "config.json",
    )
    assert rounding_bytes(model_weight_tensors(llama, "bf16", "cuda")) == 2 * MIB - 65 * 8192


def test_loading_took_what_the_arithmetic_says():
    """bf16 weights on a GPU: besides them a piece of 16 MiB stood there."""
    (load,) = [row for row in json.loads(MEASURED.read_text())["loads"] if row.get("weight_format") == "bf16"]
    assert load["weight_bytes"] == model_weight_bytes(QWEN, "bf16", "cuda")
    beyond = load["memory"]["torch_peak_reserved_bytes"] - load["weight_bytes"]
    assert beyond > 100 * MIB
    assert abs(rounding_bytes(model_weight_tensors(QWEN, "bf16", "cuda")) + 16 * MIB - beyond) < 20 * MIB


def test_the_plan_holds_what_was_used():
    rows = [row for row in json.loads(MEASURED.read_text())["rows"] if "memory" in row]
    assert len(rows) == 4
    for row in rows:
        budget = Budget.load("h100-80g").override(weight_format=row["weight_format"])
        plan = make_plan(QWEN, budget, row["length"] + 256, device_type="cuda")
        rounding = next(item.bytes for item in plan.items if item.name == "allocator rounding")
        planned_then, used = row["memory"]["plan_device_bytes"], row["memory"]["used_bytes"]
        assert abs(plan.device_bytes - planned_then) < 100  # the same settings
        assert used / (planned_then - rounding) > 1.005
        assert used / plan.device_bytes == pytest.approx(1, abs=0.005)


def test_a_cpu_rounds_nothing():
    plan = make_plan(QWEN, Budget.load("cpu"), 2000, device_type="cpu")
    assert "allocator rounding" not in {item.name for item in plan.items}
