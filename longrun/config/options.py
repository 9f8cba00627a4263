"""Keys of a config.json that ask for other arithmetic than the decoder's: refused, or named in a warning.

transformers silently drops a key that a family's class does not have, and a checkpoint that came with code of its own
then runs as another model. Here a key is read, known to change nothing, refused, or named in a warning.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from longrun.config.values import Values
from longrun.errors import CheckpointError, ConfigError, quoted, short_path, shortened


class ConfigWarning(NamedTuple):
    """`text` is for a person whose context has more than `above` tokens."""

    above: int
    text: str


# Another model whatever the length, unless the value is one of these (null always is, and false where 1 is none).
_OTHER_ARITHMETIC: dict[str, tuple[Any, ...]] = {
    # attention
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (),
    "rotary_interleaved": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "attention_chunk_size": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attention_scale": (),
    "attention_sinks": (),
    "use_attention_sinks": (),
    "use_bidirectional_attention": (),
    "alibi": (),
    "use_alibi": (),
    "clip_qkv": (0,),
    "cross_attention_layers": ([],),
    "add_cross_attention": (),
    "is_encoder_decoder": (),
    "num_kv_shared_layers": (0,),
    "kv_lora_rank": (0,),
    "q_lora_rank": (0,),
    "use_mrope": (),
    # width, scale and depth (muP and its relatives)
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "lm_head_multiplier": (1,),
    "key_multiplier": (1,),
    "attention_in_multiplier": (1,),
    "attention_out_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "mup_enabled": (),
    "use_mup": (),
    # layers
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "parallel_attn": (),
    "use_parallel_residual": (),
    "post_norm": (),
    "quantization_config": (),
}
_QK_NORM_KEYS = ("qk_norm", "use_qk_norm", "qk_layernorm")

# What a model does only to positions beyond those it was trained on.
_BEYOND_THE_WINDOW = (
    "dual_chunk_attention_config",
    "sparse_attention_config",
    "use_logn_attn",
    "use_dynamic_ntk",
    "attn_temperature_tuning",
)

# Names that would be suspicious and are known: read here, used in training only, or settings of other programs.
_HARMLESS = {
    "attention_bias", "attention_dropout", "attn_dropout", "attn_pdrop", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "attn_implementation_autoset", "_attn_implementation_autoset", "hidden_act",
    "layer_types", "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_key_value_heads",
    "original_max_position_embeddings", "output_attentions", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "use_sliding_window", "use_flash_attn", "use_flash_attention",
    "use_flash_attention_2", "flash_attention", "flash_attn", "attn_bias", "attention_probs_dropout_prob",
    "expert_parallel", "initializer_range", "layer_norm_eps", "norm_eps", "norm_type", "position_embedding_type",
    "rotary_emb_base", "rope_base", "router_aux_loss_coef", "output_router_logits", "scale_attn_weights",
}  # fmt: skip
_SUSPICIOUS = re.compile(
    r"attn|attention|rope|rotary|window|softcap|multiplier|alibi|yarn|ntk|chunk_size$|multi_?query|expert|mup", re.I
)


def refuse_own_code(data: dict[str, Any], source: str) -> None:
    """Code of a checkpoint is never run, and without it such a checkpoint is another model than its author's.

    Args:
        data: content of a config.json or tokenizer_config.json.
        source: what messages call it.

    Raises:
        CheckpointError: the file names code of its own.
    """
    if data.get("auto_map"):
        raise CheckpointError(
            f"{short_path(source)} names code of its own (auto_map {quoted(data['auto_map'])}), and longrun never "
            f"runs code of a checkpoint: if the model needs none, remove auto_map from that file"
        )


def refuse_other_arithmetic(values: Values, model_type: str) -> None:
    """Raise ConfigError for an option that would make another model than the decoder runs."""
    data, source = values.data, values.source
    if data.get("hidden_act") != "silu":
        raise ConfigError(f"{source}: hidden_act {quoted(data.get('hidden_act'))} is not supported: only silu is")
    if data.get("quantization_config") is not None:
        raise ConfigError(
            f"{source}: quantization_config means weights that are already quantized, which is not supported: use the "
            f"original checkpoint and ask for weight_format int8, nf4 or int4"
        )
    if model_type in ("qwen2", "qwen3") and values.flag("use_sliding_window"):
        raise ConfigError(f"{source}: use_sliding_window true is not supported: only full attention models are")
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"{source}: layer_types other than full_attention are not supported: {quoted(layer_types)}")
    if data.get("is_causal") is False:
        raise ConfigError(f"{source}: is_causal false is not supported: only models that read left to right are")
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(values.rope_dict(key), key, source)
    for key, neutral in _OTHER_ARITHMETIC.items():
        _refuse_unless(data, key, neutral, source)
    if model_type != "qwen3":
        for key in _QK_NORM_KEYS:
            _refuse_unless(data, key, (), source)


def warnings_of(values: Values) -> tuple[ConfigWarning, ...]:
    """Warnings for a person about keys that longrun does not follow."""
    data, source, found = values.data, values.source, []
    window = data["max_position_embeddings"]
    for key in _BEYOND_THE_WINDOW:
        value = data.get(key)
        if not value:
            continue
        own = value.get("original_max_position_embeddings") if isinstance(value, dict) else None
        above = own if isinstance(own, int) and 0 < own < window else window
        found.append(
            ConfigWarning(
                above,
                f"{source} asks for {key} beyond {above:,} tokens, which longrun does not follow: answers about "
                f"longer texts will be worse than this model's own",
            )
        )
    known = {*_OTHER_ARITHMETIC, *_QK_NORM_KEYS, *_BEYOND_THE_WINDOW, *_HARMLESS}
    unknown = [key for key, value in data.items() if value and key not in known and _SUSPICIOUS.search(key)]
    if unknown:
        names = ", ".join(shortened(key, 40) for key in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        found.append(
            ConfigWarning(
                0,
                f"{source} sets {names}, which longrun does not know and does not follow: see what the model's own "
                f"code does with it",
            )
        )
    return tuple(found)


def _check_rope(rope: dict[str, Any], key: str, source: str) -> None:
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        names = shortened(", ".join(nested))
        raise ConfigError(f"{source}: {key} differs by layer type ({names}), which is not supported")
    if "mrope_section" in rope:
        raise ConfigError(f"{source}: {key} has mrope_section of a multimodal model, which is not supported")
    for name, neutral in (("partial_rotary_factor", (1,)), ("llama_4_scaling_beta", (0,))):
        _refuse_unless(rope, name, neutral, source)


def _refuse_unless(place: dict[str, Any], key: str, neutral: tuple[Any, ...], source: str) -> None:
    value = place.get(key)
    if value is None or (value is False and 1 not in neutral):
        return
    if not isinstance(value, bool) and value in neutral:
        return
    only = f" (only {' or '.join(map(str, neutral))})" if neutral else ""
    raise ConfigError(
        f"{source}: {key} {quoted(value)} is not supported{only}, for it makes another model than longrun runs: use "
        f"another checkpoint"
    )
