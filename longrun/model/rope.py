"""Rotary position embedding with angles in float64, cast last.

In float32, position times frequency is off by a quarter radian at three million tokens; in float64 by 1e-9.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrun.config.config_file import read_config
from longrun.config.model_config import SUPPORTED_ROPE_TYPES, ModelConfig
from longrun.errors import CheckpointError, ConfigError, LongrunError, quoted, short_path, shortened

# The library computes in float32: a power, a division and a blend, each rounded.
_CHECK_TOLERANCE = 3e-5
_GIVEN = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class RopeParameters:
    """RoPE of one checkpoint as transformers standardises it (`config.rope_parameters`).

    Attributes:
        values: the standardised dictionary: rope_type, rope_theta, and what the type needs.
        max_position_embeddings: trained positions; the base of `dynamic`.
        factors: what the type's inverse frequencies are divided by (head_dim / 2 numbers), which only GGUF files name.
    """

    values: dict[str, Any]
    max_position_embeddings: int
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in SUPPORTED_ROPE_TYPES:
            raise ConfigError(
                f"RoPE type {quoted(self.rope_type)} is not supported: use a checkpoint with one of "
                f"{', '.join(SUPPORTED_ROPE_TYPES)}"
            )

    @property
    def rope_type(self) -> str:
        return self.values.get("rope_type", "default")

    def parts(self) -> list[Any]:
        """What a model's fingerprint takes in."""
        return [self.values] if self.factors is None else [self.values, self.factors]

    @classmethod
    def from_dir(cls, model_dir: str | Path, yarn: float | None = None) -> RopeParameters:
        """Standardised by transformers, from the old or the new spelling; no code of the checkpoint is run.

        Args:
            yarn: as of `ModelConfig.stretched`.

        Raises:
            CheckpointError: transformers cannot read these of config.json, or what stands for it in a GGUF file.
            ConfigError: a RoPE type outside `SUPPORTED_ROPE_TYPES`, or whatever `ModelConfig` refuses.
            InputError: see `ModelConfig.stretched`.
        """
        file = read_config(model_dir)
        shape = ModelConfig.from_dict(file.data, str(file.path))
        given = copy.deepcopy({name: file.data[name] for name in _GIVEN if name in file.data})
        try:
            config = _library_config(shape.head_dim, shape.max_position_embeddings, given.pop("rope_parameters", None))
            config.convert_rope_params_to_dict(**given)
            own = cls(config.rope_parameters, shape.max_position_embeddings, file.rope_factors(shape.head_dim))
        except LongrunError:
            raise
        except Exception as error:  # the library's checks raise what they like
            raise CheckpointError(
                f"transformers cannot read {short_path(file.path)} ({shortened(error, 200)}): correct that file"
            ) from error
        if yarn is None:
            return own
        shape = ModelConfig.from_dir(model_dir).stretched(yarn)
        values = {
            "rope_type": shape.rope_type, "rope_theta": own.values["rope_theta"], "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.rope_original,
        }  # fmt: skip
        return cls(values, shape.max_position_embeddings)


class RotaryTable:
    """cos and sin of any run of positions."""

    def __init__(self, params: RopeParameters, head_dim: int, device: torch.device | str = "cpu") -> None:
        """Compute the inverse frequencies in float64 and compare them with transformers' own in float32.

        Raises:
            ConfigError: a missing or impossible RoPE parameter, or frequencies that differ from transformers'.
        """
        self.params = params
        self.head_dim = head_dim
        self.device = torch.device(device)
        try:
            self._inv_freq, self.scaling = _frequencies(params, head_dim, params.max_position_embeddings)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(
                f"RoPE of type {params.rope_type} lacks or misstates {shortened(error)} in "
                f"{quoted(params.values, 160)}: correct config.json"
            ) from error
        _check_against_transformers(params, head_dim, self._inv_freq, self.scaling)
        if params.factors is not None:
            self._inv_freq = self._inv_freq / torch.tensor(params.factors, dtype=torch.float64)
        self._inv_freq = self._inv_freq.to(self.device)

    def to(self, device: torch.device | str) -> RotaryTable:
        """The same table on another device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        moved._inv_freq = self._inv_freq.to(moved.device)
        return moved

    def cos_sin(self, start: int, num_tokens: int, rope_seq_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions `start` .. `start + num_tokens - 1`, times the type's attention scaling.

        Args:
            rope_seq_len: total length that decides the base of type `dynamic` (start + all tokens of the user-level
                call), as transformers does for one forward call over these tokens; other types ignore it.

        Returns:
            cos, sin: [num_tokens, head_dim] float32 on the table's device; the second half repeats the first.
        """
        inv_freq = self._frequencies_at(rope_seq_len)
        positions = torch.arange(start, start + num_tokens, dtype=torch.float64, device=self.device)
        angles = torch.outer(positions, inv_freq)
        half = self.head_dim // 2
        tables = []
        for function in (torch.cos, torch.sin):
            table = torch.empty(num_tokens, self.head_dim, dtype=torch.float32, device=self.device)
            table[:, :half] = function(angles).mul_(self.scaling)
            table[:, half:] = table[:, :half]
            tables.append(table)
        return tables[0], tables[1]

    def cos_sin_of(self, position: int, rope_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """`cos_sin` of a single position: float32 [head_dim] numpy arrays, from a table in host memory."""
        angles = position * self._frequencies_at(rope_seq_len).numpy()
        half = self.head_dim // 2
        tables = np.empty((2, self.head_dim), dtype=np.float32)
        tables[0, :half], tables[1, :half] = np.cos(angles) * self.scaling, np.sin(angles) * self.scaling
        tables[:, half:] = tables[:, :half]
        return tables[0], tables[1]

    def _frequencies_at(self, rope_seq_len: int) -> Tensor:
        """Inverse frequencies for a call of this total length; only type `dynamic` looks at it."""
        if self.params.rope_type == "dynamic" and rope_seq_len > self.params.max_position_embeddings:
            return _frequencies(self.params, self.head_dim, rope_seq_len)[0].to(self.device)
        return self._inv_freq


def apply_rope_(heads: Tensor, cos: Tensor, sin_signed: Tensor) -> Tensor:
    """Turn all heads in place: channel i with channel i + head_dim/2, as Llama checkpoints pair them.

    Args:
        heads: [T, n, head_dim], any strides with contiguous channels; float32 or bf16 (computed in float32).
        cos: [T, 1, head_dim] float32.
        sin_signed: [T, 1, head_dim] float32, sin with its first half negated (see `signed_sin`).
    """
    half = heads.shape[-1] // 2
    if heads.dtype == torch.float32:
        partner = heads.roll(half, -1)
        return heads.mul_(cos).addcmul_(partner, sin_signed)
    turned = (heads * cos).addcmul_(heads.roll(half, -1), sin_signed)
    return heads.copy_(turned)


def signed_sin(sin: Tensor) -> Tensor:
    """sin [T, head_dim] with its first half negated: turning a head is then x * cos + swapped halves * result."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)


def _frequencies(params: RopeParameters, head_dim: int, seq_len: int) -> tuple[Tensor, float]:
    """float64 inverse frequencies [head_dim / 2] and the factor on cos and sin.

    `linear` divides positions; `dynamic` is the NTK-aware base; `llama3` rescales wavelengths beyond the trained
    window; `yarn` blends by rotations within the trained window and scales attention (arXiv 2309.00071).
    """
    values, rope_type = params.values, params.rope_type
    base = float(values["rope_theta"])
    if rope_type == "dynamic":
        factor, trained = values["factor"], params.max_position_embeddings
        stretch = factor * max(seq_len, trained) / trained - (factor - 1)
        base *= stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    inv_freq = base**-exponents
    if rope_type == "linear":
        return inv_freq / values["factor"], 1.0
    if rope_type == "llama3":
        return _llama3(inv_freq, values), 1.0
    if rope_type == "yarn":
        return _yarn(inv_freq, base, head_dim, values, params.max_position_embeddings)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, values: dict[str, Any]) -> Tensor:
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    turns = values["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / values["factor"])


def _yarn(
    inv_freq: Tensor, base: float, head_dim: int, values: dict[str, Any], max_position_embeddings: int
) -> tuple[Tensor, float]:
    trained = values["original_max_position_embeddings"]
    factor = values["factor"]
    if factor is None:
        factor = max_position_embeddings / trained

    def channel(turns: float) -> float:
        """Channel pair (as a real number) that makes `turns` turns within the trained window."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(values.get("beta_fast") or 32), channel(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    inv_freq = inv_freq * (1 - slowed) + inv_freq / factor * slowed

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaling = values.get("attention_factor")
    if scaling is None:
        mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
        scaling = magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)
    return inv_freq, float(scaling)


def _library_config(head_dim: int, max_position_embeddings: int, rope_parameters: dict[str, Any] | None) -> Any:
    """What transformers' functions for RoPE need of a model's configuration: the part of its classes for RoPE alone.
    Importing one of these whole takes two to five seconds, most of them for what only training uses."""
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

    config: Any = RotaryEmbeddingConfigMixin()
    config.hidden_size, config.num_attention_heads, config.head_dim = head_dim, 1, head_dim
    config.max_position_embeddings, config.rope_parameters = max_position_embeddings, rope_parameters
    return config


def _check_against_transformers(params: RopeParameters, head_dim: int, inv_freq: Tensor, scaling: float) -> None:
    """Another version of the library may read the same parameters differently: then say so, never run another model."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = dict(params.values)
    if params.rope_type == "default":  # the library keeps these frequencies with each model: they are these of linear
        values["rope_type"], values["factor"] = "linear", 1.0
    try:
        config = _library_config(head_dim, params.max_position_embeddings, values)
        theirs, their_scaling = ROPE_INIT_FUNCTIONS[values["rope_type"]](config)
        difference = ((theirs.double() - inv_freq) / inv_freq).abs().max().item()
    except Exception as error:  # the library's checks raise what they like
        raise ConfigError(
            f"transformers cannot use the RoPE parameters {quoted(params.values, 160)} ({shortened(error, 160)}): "
            f"correct config.json"
        ) from error
    if not difference <= _CHECK_TOLERANCE or not math.isclose(scaling, their_scaling, rel_tol=_CHECK_TOLERANCE):
        raise ConfigError(
            f"RoPE frequencies of {quoted(params.values, 160)} differ from the installed transformers' by "
            f"{difference:.1e} (limit "
            f"{_CHECK_TOLERANCE:.0e}; scaling {scaling} against {their_scaling}): use a transformers version that "
            f"longrun supports"
        )
