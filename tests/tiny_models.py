"""Tiny random checkpoints of every supported family and RoPE type, made by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def tiny_model(family: str, rope: str = "default", seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model in float32: 3 layers, 6 query and 3 KV heads of 16, 64 trained positions (128 for llama3, yarn).

    Weights are large enough that attention is peaked and RoPE matters; biases and norms are random as well.
    """
    config_class, model_class = _CLASSES[family]
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "rope_parameters": dict(ROPES[rope]),
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
        "head_dim": 16,
    }
    if family == "mistral":
        settings["sliding_window"] = None
    model = model_class(config_class(**{**settings, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.dim() == 1 else 1.0 if "embed" in name else 0.15
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    return model.eval()


def save_tiny(folder: Path, family: str, rope: str = "default", **overrides: Any) -> transformers.PreTrainedModel:
    """Make a tiny model and save it to `folder` in one safetensors file."""
    model = tiny_model(family, rope, **overrides)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a saved config.json; None removes a key."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    file.write_text(json.dumps(data))


def save_tokenizer(folder: Path, vocab_size: int = 97) -> None:
    """A tokenizer of single characters next to a tiny model: BOS 0, EOS 1, unknown 2; whatever is text comes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(32, 127)][: vocab_size - 3]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
