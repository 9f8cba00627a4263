"""Shapes of well-known models by name, so that a plan needs no download: what their published config.json say.

Sources: config.json of meta-llama/Meta-Llama-3-8B, meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B,
mistralai/Mistral-7B-v0.3 and Qwen/Qwen3-8B on the Hugging Face Hub. Only what a plan reads is kept.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from longrun.config.key_biases import KeyBiases, read_key_biases
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.hub.find import find_config

_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_LLAMA_31_8B: dict[str, Any] = {
    **_LLAMA_8B,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA_8B,
    "Llama-3.1-8B": _LLAMA_31_8B,
    "Llama-3.1-70B": {
        **_LLAMA_31_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Mistral-7B-v0.3": {
        **_LLAMA_8B,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "Qwen3-8B": {
        **_LLAMA_8B,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}


def config_of(name_or_folder: str | Path) -> tuple[ModelConfig, KeyBiases | None, str | None]:
    """The config of a checkpoint folder, of a shape of that name (in any case) or of a model on the Hugging Face hub,
    its key biases where its weights are here, and a note where it is a shape.

    Raises:
        CheckpointError, ConfigError, InputError: none of them, or as `find_config` and `ModelConfig.from_dir`.
    """
    text = str(name_or_folder)
    name = next((name for name in SHAPES if name.lower() == text.lower()), None)
    if name is not None and not os.path.exists(text):
        note = f"there is no folder {text} here: this is the shape of {name} as it was published"
        return ModelConfig.from_dict(SHAPES[name], name), None, note
    try:
        folder = find_config(name_or_folder)
        config = ModelConfig.from_dir(folder)
        return config, read_key_biases(folder, config), None
    except CheckpointError as error:
        if os.sep in text or os.path.exists(text):
            raise
        near = difflib.get_close_matches(text, SHAPES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise CheckpointError(f"{error}, or one of the shapes {', '.join(SHAPES)}{hint}") from None
