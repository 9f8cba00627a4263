"""How the makers of a model sample from it: generation_config.json, or the header of a GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from longrun.config.gguf_header import gguf_file, read_gguf_header
from longrun.errors import CheckpointError, ConfigError, InputError, quoted, short_path
from longrun.files.user_files import read_object

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_IN_GGUF = dict(zip(_NAMES, ("temp", "top_k", "top_p", "min_p", "penalty_repeat"), strict=True))


@dataclass(frozen=True)
class SamplingDefaults:
    """Settings of a model, by the names of `SamplingParams`; those that its file does not name are missing.

    Attributes:
        source: the file.
    """

    settings: dict[str, float | int]
    source: Path

    def told(self) -> str:
        """The settings in words, for a person."""
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())


def read_sampling_defaults(model_dir: str | Path) -> SamplingDefaults:
    """What the model's file says about sampling. As in transformers, without `do_sample` in a generation_config.json
    the likeliest token is taken (temperature 0), and a temperature that is not named is 1.

    Raises:
        InputError: there is no such file, or it says nothing.
        CheckpointError, ConfigError: it is damaged, or a setting is no number.
    """
    gguf = gguf_file(model_dir)
    if gguf is not None:
        source, data = gguf, read_gguf_header(gguf).metadata
        found = {name: data.get(f"general.sampling.{key}") for name, key in _IN_GGUF.items()}
    else:
        source = Path(model_dir) / "generation_config.json"
        data = read_object(source, CheckpointError, "fetch the file again") if os.path.exists(source) else {}
        found = {name: data.get(name) for name in _NAMES}
        if any(value is not None for value in found.values()) and not data.get("do_sample"):
            found = {"temperature": 0, "repetition_penalty": found["repetition_penalty"]}
    settings = {name: value for name, value in found.items() if value is not None}
    if not settings:
        raise InputError(
            f"{short_path(source)} says nothing about sampling, or is not there: leave --sampling model out, or give "
            f"--temperature and the like"
        )
    settings.setdefault("temperature", 1)
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{short_path(source)}: {name} is {quoted(value)}, and must be a number")
    return SamplingDefaults(settings, source)
