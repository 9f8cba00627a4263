"""config.json against transformers' own configuration classes and models."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from tiny_models import FAMILIES, tiny_model

from longrun.config.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from longrun.errors import CheckpointError, ConfigError
from longrun.model.rope import RopeParameters
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan

NAMES = {model_type: name for name, model_type in SUPPORTED_ARCHITECTURES.items()}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CASES = {
    "llama defaults": ("llama", {}),
    "mistral defaults": ("mistral", {}),
    "qwen2 defaults": ("qwen2", {}),
    "qwen3 defaults": ("qwen3", {}),
    "llama 2": ("llama", {"num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "llama 3 old spelling": (
        "llama",
        {
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 96},
    ),
    "llama with type instead of rope_type": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 160}),
    "llama null key heads": ("llama", {"num_key_value_heads": None}),
    "qwen2 window off": ("qwen2", {"use_sliding_window": False, "sliding_window": 131072, "rope_theta": 1e6}),
    "qwen2 yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    "qwen3 new spelling": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 64}),
    "qwen3 bias": ("qwen3", {"attention_bias": True}),
}


def write(folder, family: str, data: dict) -> None:
    content = {"architectures": [NAMES[family]], "model_type": family, **data}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_translation_equals_transformers(tmp_path, case):
    family, data = CASES[case]
    write(tmp_path, family, data)
    ours, theirs = ModelConfig.from_dir(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.model_type == theirs.model_type
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_qo_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.group_size == theirs.num_attention_heads // theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    same = ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings")
    for field in (*same, "tie_word_embeddings"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_type == theirs.rope_parameters["rope_type"] == RopeParameters.from_dir(tmp_path).rope_type


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in FAMILIES]
    + [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    ],
)
def test_weights_are_those_of_transformers(family, options):
    model = tiny_model(family, **options)
    data = {**model.config.to_dict(), "architectures": [NAMES[family]]}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = list(ModelConfig.from_dict(data, "test").weights())
    assert {spec.name: spec.shape for spec in specs} == wanted
    assert len(specs) == len(wanted)
    assert {spec.kind for spec in specs} <= {"embedding", "linear", "norm", "bias", "lm_head"}
    assert all((spec.kind == "bias") == spec.name.endswith(".bias") for spec in specs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            CheckpointError,
            r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, CheckpointError, "Qwen3MoeForCausalLM"),
        ({"architectures": []}, CheckpointError, "architectures"),
        ({"model_type": "mistral"}, CheckpointError, "contradict"),
        ({"hidden_act": "gelu"}, ConfigError, "gelu"),
        ({"hidden_size": 0}, ConfigError, "hidden_size is 0"),
        ({"hidden_size": "4096"}, ConfigError, "hidden_size is '4096'"),
        ({"num_hidden_layers": True}, ConfigError, "num_hidden_layers"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, ConfigError, "multiple"),
        ({"head_dim": 63}, ConfigError, "head_dim 63"),
        ({"rms_norm_eps": -1e-5}, ConfigError, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, ConfigError, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, ConfigError, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, ConfigError, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, ConfigError, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope"}}, ConfigError, r"longrope.*yarn"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, ConfigError, "multimodal"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ConfigError, "layer type"),
        ({"rope_scaling": "linear"}, ConfigError, "rope_scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ConfigError, "layer_types"),
        ({"model_type": None}, CheckpointError, '"model_type": "llama"'),
        ({"auto_map": {"AutoConfig": "own.OwnConfig"}}, CheckpointError, "auto_map.*never runs code"),
        ({"attention_chunk_size": 8192}, ConfigError, "attention_chunk_size 8192"),
        ({"attn_logit_softcapping": 30.0}, ConfigError, "attn_logit_softcapping 30.0"),
        ({"embedding_multiplier": 12.0}, ConfigError, r"embedding_multiplier 12.0.*only 1"),
        ({"rope_interleaved": True}, ConfigError, "rope_interleaved True"),
        ({"is_causal": False}, ConfigError, "is_causal false"),
        ({"num_local_experts": 8}, ConfigError, "num_local_experts 8"),
        ({"qk_layernorm": True}, ConfigError, "qk_layernorm"),
        ({"rope_theta": -1.0}, ConfigError, "rope_theta is -1.0"),
        ({"rope_theta": "1e4"}, ConfigError, "rope_theta is '1e4'"),
        ({"rope_parameters": {"rope_theta": 0}}, ConfigError, "rope_parameters.rope_theta is 0"),
        ({"rope_scaling": {"type": "linear"}}, ConfigError, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, ConfigError, "factor is inf"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, ConfigError, "factor is 0"),
        ({"rope_scaling": {"type": ["yarn"]}}, ConfigError, "RoPE type"),
        ({"rms_norm_eps": float("nan")}, ConfigError, "rms_norm_eps is nan"),
        ({"hidden_act": "x" * 100_000}, ConfigError, "hidden_act 'xxx"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        ModelConfig.from_dict({**LLAMA, **changes}, "some/config.json")
    assert "some/config.json" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500


@pytest.mark.parametrize("count", [10**6, 10**9, 10**12, 10**30, -1, 1e30])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"]
)
def test_impossible_counts_are_refused_before_a_table_is_built(key, count):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict({**LLAMA, key: count}, "config.json")
    assert time.perf_counter() - began < 0.1


def test_keys_that_change_nothing_are_taken():
    """What published checkpoints of these families carry."""
    plain = ModelConfig.from_dict(LLAMA, "x")
    extra = {
        "pretraining_tp": 1, "rope_interleaved": False, "use_mrope": False, "attn_logit_softcapping": None,
        "partial_rotary_factor": 1.0, "embedding_multiplier": 1, "is_llama_config": True, "num_experts": 0,
        "attention_dropout": 0.1, "_attn_implementation_autoset": True, "torch_dtype": "bfloat16", "is_causal": True,
        "transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True, "layer_types": ["full_attention"] * 32,
    }  # fmt: skip
    assert ModelConfig.from_dict({**LLAMA, **extra}, "x") == plain and plain.warnings == ()


def test_a_key_that_acts_beyond_the_window_is_a_warning_there():
    chunked = {"chunk_size": 2048, "original_max_position_embeddings": 1024}
    with_key = ModelConfig.from_dict({**LLAMA, "dual_chunk_attention_config": chunked}, "x")
    (warning,) = with_key.warnings
    assert warning.above == 1024 and "dual_chunk_attention_config beyond 1,024 tokens" in warning.text
    budget = Budget.load("cpu").override(host_bytes=10**12, device_bytes=10**12)
    assert warning.text in make_plan(with_key, budget, 1025, device_type="cpu").warnings
    assert warning.text not in make_plan(with_key, budget, 1024, device_type="cpu").warnings
    assert with_key.arithmetic() == ModelConfig.from_dict(LLAMA, "x").arithmetic()


def test_an_unknown_key_of_attention_is_named():
    (warning,) = ModelConfig.from_dict({**LLAMA, "spiral_attention_turns": 3, "colour": "red"}, "x").warnings
    assert warning.above == 0 and "spiral_attention_turns" in warning.text and "colour" not in warning.text


def test_qwen_sliding_window_is_refused():
    with pytest.raises(ConfigError, match="use_sliding_window"):
        ModelConfig.from_dict({"model_type": "qwen2", "use_sliding_window": True}, "x")


def test_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelConfig.from_dir(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        ModelConfig.from_dir(tmp_path)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        ModelConfig.from_dir(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        ModelConfig.from_dir(tmp_path)


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, longrun.config.model_config, longrun.specs.model_bytes; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("family", "changes", "tokens"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ("qwen3", {"max_position_embeddings": 40960, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
         "original_max_position_embeddings": 32768}}, 131072),
        ("llama", {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", "factor": 32.0,
         "original_max_position_embeddings": 4096}}, 131072),
        ("llama", {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", "factor": None,
         "original_max_position_embeddings": 4096}}, 131072),
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ("llama", {"max_position_embeddings": 32768, "original_max_position_embeddings": 4096,
         "rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ("llama", {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 32.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, 131072),
        ("llama", {"max_position_embeddings": 8192}, 8192),
    ],
)  # fmt: skip
def test_the_trained_window_counts_what_rope_stretches(family, changes, tokens):
    config = ModelConfig.from_dict({"architectures": [NAMES[family]], "model_type": family, **changes}, "config.json")
    assert config.trained_positions == tokens
    assert make_plan(config, Budget.load("a100-80g")).capacity == tokens
    beyond = f"{tokens + 1:,} tokens are more than the {tokens:,} that the model was trained for"
    plan = make_plan(config, Budget.load("a100-80g"), tokens + 1)
    assert [text for text in plan.warnings if "trained for" in text] == [f"{beyond}: answers may degrade beyond that"]
    assert not any("trained for" in text for text in make_plan(config, Budget.load("a100-80g"), tokens).warnings)
