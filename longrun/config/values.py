"""Typed reads from the content of a config.json: every value of the right kind and of a size that a model can have."""

from __future__ import annotations

import math
from typing import Any

from longrun.errors import ConfigError, quoted, short_path

# A table has a row or a column for each of these, so a count of a damaged file is refused before one is built. The
# largest published model of these families has 126 layers, 128 heads and 16,384 channels.
_MOST = {
    "num_hidden_layers": 512,
    "num_attention_heads": 512,
    "num_key_value_heads": 512,
    "head_dim": 1_024,
    "hidden_size": 2**18,
    "intermediate_size": 2**23,
    "vocab_size": 2**24,
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
}
_ROPE_NUMBERS = {
    # name: (least, most); angles are positions times powers of rope_theta, and a factor divides them
    "rope_theta": (2.0, 1e38),
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 10**9),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
SUPPORTED_ROPE_TYPES = ("default", *_ROPE_NEEDS)


class Values:
    """The keys of one config.json, read with errors that name file, key and value.

    Args:
        data: its content, with the family's defaults for what it leaves out.
        source: what messages call it.
    """

    def __init__(self, data: dict[str, Any], source: str) -> None:
        self.data = data
        self.source = short_path(source)

    def fail(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {quoted(self.data.get(key))}, and must be {wanted}")

    def count(self, key: str, if_none: int | None = None) -> int:
        """A whole number from 1 to what a model can have."""
        value = self.data[key]
        if value is None and if_none is not None:
            value = if_none
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST[key]:
            raise self.fail(key, f"a whole number from 1 to {_MOST[key]:,}")
        return value

    def positive(self, key: str) -> float:
        value = self.data[key]
        if not is_number(value) or not 0 < value < 1:
            raise self.fail(key, "a number above 0 and below 1")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def rope_dict(self, key: str) -> dict[str, Any]:
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object or null")
        return value or {}

    def rope_type(self) -> str:
        """RoPE type in either spelling, after checking that every parameter is a possible one; `rope_scaling` (old)
        wins over `rope_parameters` (new), as in transformers."""
        key = "rope_scaling" if self.rope_dict("rope_scaling") else "rope_parameters"
        rope = self.rope_dict(key)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in SUPPORTED_ROPE_TYPES:
            raise ConfigError(
                f"{self.source}: RoPE type {quoted(rope_type)} is not supported: use a checkpoint with one of "
                f"{', '.join(SUPPORTED_ROPE_TYPES)}"
            )
        for name in _ROPE_NEEDS.get(rope_type, ()):
            if name not in rope:
                raise ConfigError(f"{self.source}: {key} of type {rope_type} lacks {name}: fetch the checkpoint again")
        for place, found in (("", {"rope_theta": self.data.get("rope_theta")}), (f"{key}.", rope)):
            for name, (least, most) in _ROPE_NUMBERS.items():
                value = found.get(name)
                optional = name not in _ROPE_NEEDS.get(rope_type, ()) or (rope_type, name) == ("yarn", "factor")
                if value is None and (optional or not place):
                    continue
                if not is_number(value) or not least <= value <= most:
                    raise ConfigError(
                        f"{self.source}: {place}{name} is {quoted(value)}, and must be a number from {least:g} to "
                        f"{most:g}"
                    )
        if rope_type == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise ConfigError(
                f"{self.source}: {key} has low_freq_factor {rope['low_freq_factor']} and high_freq_factor "
                f"{rope['high_freq_factor']}, and the first must be the smaller one"
            )
        return rope_type

    def rope_window(self) -> tuple[float, int | None]:
        """By how much the RoPE type stretches the window, and the window from before if it is named; after
        `rope_type` has checked both."""
        rope = self.rope_dict("rope_scaling") or self.rope_dict("rope_parameters")
        if self.rope_type() not in ("linear", "dynamic", "yarn") or rope.get("factor") is None:
            return 1.0, None
        original = rope.get("original_max_position_embeddings", self.data.get("original_max_position_embeddings"))
        return float(rope["factor"]), original if isinstance(original, int) and original > 0 else None


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that a float can hold (true and false are none)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() <= 1023  # math.isfinite of a longer one is an OverflowError
    return isinstance(value, float) and math.isfinite(value)
