"""Shape of a model, read from a config.json or a GGUF file's metadata alone: no torch, no transformers.

Field names and defaults are those of the published configuration classes of each family; tests compare this
translation with transformers' own classes, field by field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from longrun.arguments import MAX_YARN, number
from longrun.config.config_file import read_config
from longrun.config.options import ConfigWarning, refuse_other_arithmetic, refuse_own_code, warnings_of
from longrun.config.values import SUPPORTED_ROPE_TYPES, Values
from longrun.errors import CheckpointError, ConfigError, quoted, short_path, shortened

__all__ = ["SUPPORTED_ARCHITECTURES", "SUPPORTED_ROPE_TYPES", "ConfigWarning", "ModelConfig", "WeightSpec"]

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# What a family's config.json means where it leaves a key out.
_QWEN2: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128},
}
_COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}


class WeightSpec(NamedTuple):
    """One tensor that a checkpoint must hold: `kind` is embedding, linear, norm, bias or lm_head."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of one decoder of the Llama family.

    Attributes:
        architecture: one of `SUPPORTED_ARCHITECTURES`.
        model_type: llama, mistral, qwen2 or qwen3.
        rope_type: one of `SUPPORTED_ROPE_TYPES`.
        rope_factor, rope_original: what `rope_window` found; see `trained_positions`.
        rope_table: whether the file holds a table that frequencies are divided by (GGUF files of type llama3).
        from_gguf: whether it was read from a GGUF file's header.
        yarn: the factor of `stretched`, None without it.
        qkv_bias, out_bias, mlp_bias: whether these linear layers carry a bias.
        qk_norm: RMS norm of each query and key head over head_dim, before RoPE (Qwen3).
        sliding_window: the checkpoint's own attention window in tokens, None where it is absent or switched off.
        warnings: sentences for a person about keys of config.json that are not followed.
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original: int | None = None
    rope_table: bool = False
    from_gguf: bool = False
    yarn: float | None = None
    warnings: tuple[ConfigWarning, ...] = ()

    def arithmetic(self) -> dict[str, Any]:
        """Every field that decides what a checkpoint's own files compute: what its fingerprint takes in."""
        fields = asdict(self)
        # said only, not RoPE's own parameters
        for name in ("warnings", "rope_factor", "rope_original", "rope_table", "from_gguf", "yarn"):
            del fields[name]
        return fields

    @property
    def trained_positions(self) -> int:
        """Tokens that the model was trained or extended for.

        Types `yarn`, `linear` and `dynamic` stretch a window by their factor, and most such checkpoints leave
        max_position_embeddings at the window from before; with `llama3` it is the longer one already.
        """
        stretched = int((self.rope_original or self.max_position_embeddings) * self.rope_factor)
        return max(self.max_position_embeddings, stretched)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_qo_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Config of the checkpoint in folder `path`, or of the GGUF file there.

        Raises:
            CheckpointError: no such folder, no config.json in it, or one that is not a JSON object; a GGUF file that is
                damaged; an architecture that is not supported.
            ConfigError: a value that is missing, of the wrong type, impossible, or asks for what is not supported.
        """
        file = read_config(path)
        config = cls.from_dict(file.data, str(file.path))
        return replace(config, rope_table=file.has_rope_factors, from_gguf=file.header is not None)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str) -> ModelConfig:
        """Config from the content of a config.json; `source` names it in errors. Raises as `from_dir`."""
        architecture = _architecture(data, short_path(source))
        model_type = SUPPORTED_ARCHITECTURES[architecture]
        refuse_own_code(data, source)
        values = Values({**_COMMON_DEFAULTS, **_FAMILY_DEFAULTS[model_type], **data}, source)
        refuse_other_arithmetic(values, model_type)

        hidden_size = values.count("hidden_size")
        num_qo_heads = values.count("num_attention_heads")
        num_kv_heads = values.count("num_key_value_heads", if_none=num_qo_heads)
        head_dim = values.count("head_dim", if_none=hidden_size // num_qo_heads)
        if num_qo_heads % num_kv_heads:
            raise ConfigError(
                f"{values.source}: num_attention_heads {num_qo_heads} is not a multiple of num_key_value_heads "
                f"{num_kv_heads}, so query heads cannot be grouped: correct one of them"
            )
        if head_dim % 2:
            raise ConfigError(
                f"{values.source}: head_dim {head_dim} is odd, and RoPE turns pairs of channels: correct it"
            )
        rope_factor, rope_original = values.rope_window()
        attention_bias = values.flag("attention_bias") if model_type in ("llama", "qwen3") else False
        return cls(
            architecture=architecture,
            model_type=model_type,
            num_layers=values.count("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=values.count("intermediate_size"),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=values.count("vocab_size"),
            rms_norm_eps=values.positive("rms_norm_eps"),
            max_position_embeddings=values.count("max_position_embeddings"),
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            qkv_bias=attention_bias or model_type == "qwen2",
            out_bias=attention_bias,
            mlp_bias=values.flag("mlp_bias") if model_type == "llama" else False,
            qk_norm=model_type == "qwen3",
            sliding_window=(
                values.count("sliding_window")
                if model_type == "mistral" and values.data["sliding_window"] is not None
                else None
            ),
            rope_type=values.rope_type(),
            rope_factor=rope_factor,
            rope_original=rope_original,
            warnings=warnings_of(values),
        )

    def stretched(self, yarn: float | None) -> ModelConfig:
        """The model with its window stretched by YaRN (arXiv 2309.00071), as if its config.json said so; None changes
        nothing. The window from before is max_position_embeddings, also for Qwen3, which has 40,960 there and whose
        makers count from 32,768.

        Raises:
            InputError: a factor that is no number above 1 and at most `MAX_YARN`.
            ConfigError: the model has RoPE scaling of its own.
        """
        if yarn is None:
            return self
        yarn = number(yarn, "yarn", 1, MAX_YARN, above=True)
        if self.rope_type != "default" or self.rope_table:
            own = "llama3 (a table in its file)" if self.rope_table else self.rope_type
            raise ConfigError(
                f"yarn {yarn:g} stretches a model without RoPE scaling, and this one has RoPE scaling of type {own}, "
                f"which brings it to {self.trained_positions:,} positions: leave yarn out"
            )
        trained = self.max_position_embeddings
        return replace(
            self, rope_type="yarn", rope_factor=yarn, rope_original=trained, yarn=yarn,
            max_position_embeddings=int(trained * yarn),
        )  # fmt: skip

    def layer_weights(self, layer_idx: int) -> Iterator[WeightSpec]:
        """The tensors of one layer, under their names in the checkpoint."""
        prefix = f"model.layers.{layer_idx}."
        hidden = self.hidden_size
        linears = (
            ("self_attn.q_proj", self.q_size, hidden, self.qkv_bias),
            ("self_attn.k_proj", self.kv_size, hidden, self.qkv_bias),
            ("self_attn.v_proj", self.kv_size, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, self.q_size, self.out_bias),
            ("mlp.gate_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.up_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, self.intermediate_size, self.mlp_bias),
        )
        for name, rows, columns, bias in linears:
            yield WeightSpec(f"{prefix}{name}.weight", (rows, columns), "linear")
            if bias:
                yield WeightSpec(f"{prefix}{name}.bias", (rows,), "bias")
        if self.qk_norm:
            yield WeightSpec(f"{prefix}self_attn.q_norm.weight", (self.head_dim,), "norm")
            yield WeightSpec(f"{prefix}self_attn.k_norm.weight", (self.head_dim,), "norm")
        yield WeightSpec(f"{prefix}input_layernorm.weight", (hidden,), "norm")
        yield WeightSpec(f"{prefix}post_attention_layernorm.weight", (hidden,), "norm")

    def weights(self) -> Iterator[WeightSpec]:
        """Every tensor that the checkpoint holds; lm_head.weight only where it is not tied to the embedding."""
        yield WeightSpec("model.embed_tokens.weight", (self.vocab_size, self.hidden_size), "embedding")
        for layer_idx in range(self.num_layers):
            yield from self.layer_weights(layer_idx)
        yield WeightSpec("model.norm.weight", (self.hidden_size,), "norm")
        if not self.tie_word_embeddings:
            yield WeightSpec("lm_head.weight", (self.vocab_size, self.hidden_size), "lm_head")


def _architecture(data: dict[str, Any], source: str) -> str:
    """The one supported architecture that config.json names, or that its model_type implies."""
    model_type, names = data.get("model_type"), data.get("architectures")
    if names is None:
        by_type = {model_type: name for name, model_type in SUPPORTED_ARCHITECTURES.items()}
        known = isinstance(model_type, str) and model_type in by_type
        names = [by_type[model_type] if known else f"of model_type {quoted(model_type)}"]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{source}: architectures is {quoted(names)}, and must be a list of one name")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{source}: architecture {shortened(names[0])} is not supported: use a checkpoint of one of "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    meant = SUPPORTED_ARCHITECTURES[names[0]]
    if model_type is None:
        raise CheckpointError(
            f'{source} has no model_type, without which transformers would look for code to run: add "model_type": '
            f'"{meant}" if the model is a plain {names[0]}'
        )
    if model_type != meant:
        raise CheckpointError(
            f"{source}: architecture {names[0]} and model_type {quoted(model_type)} contradict each other: "
            f"model_type must be {meant!r}"
        )
    return names[0]
