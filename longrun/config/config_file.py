"""The settings of a checkpoint, wherever they stand: config.json of a folder, or the metadata of a GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrun.config.gguf_config import ROPE_FACTORS, config_of_gguf, rope_factors
from longrun.config.gguf_header import GgufHeader, gguf_file, read_gguf_header
from longrun.errors import CheckpointError, short_path
from longrun.files.user_files import read_object
from longrun.paths import user_path


@dataclass(frozen=True)
class ConfigFile:
    """A model's settings.

    Attributes:
        path: config.json, or the GGUF file.
        data: content of the config.json, or what it would be.
        header: of the GGUF file, or None.
    """

    path: Path
    data: dict[str, Any]
    header: GgufHeader | None = None

    @property
    def has_rope_factors(self) -> bool:
        return self.header is not None and ROPE_FACTORS in self.header.tensors

    def rope_factors(self, head_dim: int) -> tuple[float, ...] | None:
        """See `longrun.config.gguf_config.rope_factors`; None for a config.json."""
        return None if self.header is None else rope_factors(self.header, head_dim)


def read_config(model: str | Path) -> ConfigFile:
    """Settings of a checkpoint folder, or of a GGUF file (or the folder of one).

    Raises:
        CheckpointError: nothing there that is a model, or settings that cannot be read.
        ConfigError: see `config_of_gguf`.
    """
    path = user_path(model, "model folder", CheckpointError)
    gguf = gguf_file(path)
    if gguf is not None:
        header = read_gguf_header(gguf)
        return ConfigFile(gguf, config_of_gguf(header), header)
    if not os.path.isdir(path):
        if path.suffix == ".gguf" and not os.path.lexists(path):
            raise CheckpointError(f"there is no GGUF file {short_path(path)}: check the path")
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(
            f"model folder {short_path(path)} {what}: give a folder with config.json and *.safetensors, or a GGUF file"
        )
    file = path / "config.json"
    if not os.path.isfile(file):
        raise CheckpointError(
            f"model folder {short_path(path)} holds no config.json: give a Hugging Face checkpoint folder or a GGUF "
            f"file"
        )
    return ConfigFile(file, read_object(file, CheckpointError, "fetch the checkpoint again"))
