"""Metadata of a GGUF file as the content of a config.json: translated here, at the border, and read like any other.

llama.cpp's names and defaults stand only in this file. A key that asks for other arithmetic becomes the config.json key
that `longrun.config.options` refuses; one that is not known here is handed on under its own name, so that a warning
names it where it sounds like one.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from longrun.config.gguf_header import GgufEntry, GgufHeader, PassedOver
from longrun.errors import CheckpointError, ConfigError, quoted, short_path, shortened

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`general.architecture` -> architecture. A Mistral model is of architecture llama; one that limits its attention to a
window is translated as MistralForCausalLM, the only family with that option."""

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_COUNTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# What another model than ours would need, under the name by which a config.json asks for it.
_OTHER_ARITHMETIC = {
    "expert_count": "num_experts",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "attention.clamp_kqv": "clip_qkv",
    "attention.max_alibi_bias": "alibi",
    "attention.causal": "is_causal",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
_READ_ELSEWHERE = {
    *_COUNTS, "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier",
    "rope.scaling.alpha", "rope.scaling.finetuned", "expert_used_count", "pooling_type", "tensor_data_layout",
}  # fmt: skip
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_of_gguf(header: GgufHeader) -> dict[str, Any]:
    """What a config.json of this model would hold.

    Raises:
        CheckpointError: an architecture that is not supported, or metadata that a model needs is missing.
        ConfigError: metadata that differs from layer to layer, or RoPE scaling that is not supported.
    """
    if header.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{short_path(header.file)}: architecture {shortened(header.architecture)} is not supported: use a GGUF "
            f"file of one of {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(header)
    model_type = header.architecture
    data: dict[str, Any] = {name: keys.needed(key) for key, name in _COUNTS.items()}
    data["num_key_value_heads"] = keys.get("attention.head_count_kv", data["num_attention_heads"])
    data["rms_norm_eps"] = keys.needed("attention.layer_norm_rms_epsilon")
    data["vocab_size"] = _vocab_size(header, keys)
    data["tie_word_embeddings"] = OUTPUT not in header.tensors
    window = keys.get("attention.sliding_window", 0)
    if window and model_type == "llama":
        model_type, data["sliding_window"] = "mistral", window
    elif window:
        data["use_sliding_window"] = True
    data["model_type"] = model_type
    data["architectures"] = ["MistralForCausalLM" if model_type == "mistral" else ARCHITECTURES[model_type]]
    data["head_dim"] = _head_dim(keys, data)
    if model_type in ("llama", "qwen3"):
        data["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if model_type == "llama":
        data["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    data["rope_parameters"] = _rope(keys, data)
    for key, name in _OTHER_ARITHMETIC.items():
        value = keys.get(key)
        if value or value is False:  # 0 switches each of them off
            data[name] = value
    ends = [header.metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    data["eos_token_id"] = [token_id for token_id in ends if token_id is not None] or None
    data.update({f"{header.architecture}.{key}": keys.get(key) for key in keys.unknown()})
    return data


def rope_factors(header: GgufHeader, head_dim: int) -> tuple[float, ...] | None:
    """What the frequencies of RoPE are divided by, head_dim / 2 numbers; None where the file holds no such tensor.

    Files of models with RoPE type llama3 hold these in place of the type's parameters.

    Raises:
        CheckpointError: a tensor of another type or length, or with values that are no positive numbers.
    """
    entry: GgufEntry | None = header.tensors.get(ROPE_FACTORS)
    if entry is None:
        return None
    values: tuple[float, ...] = ()
    if entry.type == "F32" and entry.shape == (head_dim // 2,):
        with open(header.file, "rb") as stream:
            stream.seek(entry.offset)
            values = struct.unpack(f"<{head_dim // 2}f", stream.read(entry.num_bytes))
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise CheckpointError(
            f"{short_path(header.file)}: tensor {ROPE_FACTORS} ({entry.type}, {quoted(list(entry.shape))}) does not "
            f"hold {head_dim // 2} positive numbers of type F32: fetch the file again"
        )
    return values


class _Keys:
    """Metadata below the architecture's name."""

    def __init__(self, header: GgufHeader) -> None:
        self.where = short_path(header.file)
        self._prefix = f"{header.architecture}."
        self._metadata = header.metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a list of one value for each layer counts as that value where all are the same."""
        value = self._metadata.get(self._prefix + key, default)
        if isinstance(value, list | PassedOver):
            if isinstance(value, PassedOver) or len(set(value)) != 1:
                raise ConfigError(
                    f"{self.where}: {self._prefix}{key} differs from layer to layer, which is not supported: use a "
                    f"model whose layers are all alike"
                )
            value = value[0]
        return value

    def needed(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.where}: metadata lacks {self._prefix}{key}: fetch the file again")
        return value

    def unknown(self) -> list[str]:
        """Keys that nothing here reads."""
        keys = [key.removeprefix(self._prefix) for key in self._metadata if key.startswith(self._prefix)]
        return [key for key in keys if key not in _READ_ELSEWHERE and key not in _OTHER_ARITHMETIC]


def _vocab_size(header: GgufHeader, keys: _Keys) -> Any:
    """Rows of the embedding: a vocabulary may be padded in either place."""
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"{keys.where} lacks tensor {EMBEDDING}: fetch it again, or give a file of a whole model")
    return embedding.shape[0]


def _head_dim(keys: _Keys, data: dict[str, Any]) -> Any:
    hidden, heads = data["hidden_size"], data["num_attention_heads"]
    whole = type(hidden) is int and type(heads) is int and heads > 0
    head_dim = keys.get("attention.key_length", hidden // heads if whole else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise ConfigError(
                f"{keys.where}: {key} is {quoted(keys.get(key))} where a head has {quoted(head_dim)} channels, which "
                f"is not supported: use a model whose keys and values are of one width and turn by RoPE as a whole"
            )
    return head_dim


def _rope(keys: _Keys, data: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters in the spelling of a config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    kind = keys.get("rope.scaling.type", "linear")
    for key, neutral in (("yarn_ext_factor", (1, -1)), ("yarn_log_multiplier", (0,)), ("alpha", (0, 1))):
        value = keys.get(f"rope.scaling.{key}")
        if value is not None and value not in neutral:
            raise ConfigError(f"{keys.where}: rope.scaling.{key} {quoted(value)} is not supported: use another model")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return rope
    rope["rope_type"], rope["factor"] = kind, factor
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.get(
            "rope.scaling.original_context_length", data["max_position_embeddings"]
        )
        for key in ("beta_fast", "beta_slow"):
            value = keys.get(f"rope.scaling.yarn_{key}")
            if value is not None:
                rope[key] = value
        attention = _yarn_attention(keys, factor)
        if attention is not None:
            rope["attention_factor"] = attention
    return rope


def _yarn_attention(keys: _Keys, factor: Any) -> Any:
    """The factor on cos and sin where the file names one. Converters write a config.json's `attention_factor` as
    `yarn_attn_factor`; `attn_factor` multiplies the type's own."""
    whole = keys.get("rope.scaling.yarn_attn_factor")
    more = keys.get("rope.scaling.attn_factor", 1.0)
    if whole is not None or more == 1 or not isinstance(factor, float) or not factor >= 1:
        return whole
    return more * (0.1 * math.log(factor) + 1.0)
