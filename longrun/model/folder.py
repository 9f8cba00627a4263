"""All that a model is loaded from, checked before the first of its weights is read.

Whatever is wrong with config.json, tokenizer, generation config, RoPE parameters, adapter, or with the name, shape,
dtype or place of any tensor in any shard, is refused within seconds, and not after minutes of loading.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.config.config_file import read_config
from longrun.config.gguf_header import gguf_file
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, ConfigError, quoted, short_path
from longrun.files.user_files import read_object
from longrun.model.adapter import Adapter
from longrun.model.checkpoint_tensors import find_tensors
from longrun.model.fingerprint import check_base
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.model.tokenizer import has_tokenizer, load_tokenizer
from longrun.text.chat_template import TemplateError
from longrun.text.turn_end import template_ends, tokenizer_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint folder, and an adapter with it, that can be loaded.

    Attributes:
        path: the checkpoint.
        config: its shape, with what the adapter overrides.
        adapter: what is added to the weights, or None.
        rotary: RoPE of checkpoint and adapter, on the CPU.
        tokenizer: transformers' tokenizer, or None where the folder has none.
        eos_token_ids: what ends a generation: the tokens that generation_config.json, config.json and the tokenizer
            name, and the one that the chat template puts behind an answer.
        notices: sentences that a person should be shown once.
    """

    path: Path
    config: ModelConfig
    adapter: Adapter | None
    rotary: RotaryTable
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: frozenset[int]
    notices: tuple[str, ...] = ()


def check_folder(model_dir: str | Path, config: ModelConfig, adapter: Adapter | None = None) -> ModelFolder:
    """Check everything but the weights' values.

    Args:
        config: `ModelConfig.from_dir(model_dir)`, `stretched` or not, with what the adapter overrides.

    Raises:
        CheckpointError: tensors that are not the ones config.json describes, an adapter of another checkpoint, a
            tokenizer or generation config that cannot be used.
        ConfigError: RoPE parameters that are impossible or that the installed transformers understands otherwise.
    """
    path = Path(model_dir)
    ends = read_eos_token_ids(path, config)
    tensors = find_tensors(path, config)
    if adapter is not None:
        check_base(adapter, tensors, config, path)
    rope = RopeParameters.from_dir(path, config.yarn)
    if adapter is not None:
        rope = adapter.adapted_rope(rope)
    rotary = RotaryTable(rope, config.head_dim)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    more, notices = (frozenset(), ()) if tokenizer is None else ends_and_notices(tokenizer)
    return ModelFolder(path, config, adapter, rotary, tokenizer, ends | more, notices)


def ends_and_notices(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], tuple[str, ...]]:
    """What ends a turn by the tokenizer and its chat template, and sentences for a person about the template.

    Raises:
        CheckpointError: the template goes beyond its bounds.
    """
    ends = tokenizer_ends(tokenizer)
    try:
        return ends | template_ends(tokenizer), ()
    except TemplateError as error:
        return ends, (
            f"the chat template refuses a question and its answer ({error}): what ends an answer is known from the "
            f"other files alone",
        )


def read_eos_token_ids(model_dir: Path, config: ModelConfig) -> frozenset[int]:
    """End-of-sequence ids that generation_config.json and config.json (or a GGUF file) name; empty where none does.

    Raises:
        CheckpointError: a file that is damaged, or ids that are no token ids of this model.
    """
    settings = read_config(model_dir)
    files = [(settings.path, settings.data)]
    generation = model_dir / "generation_config.json"
    if gguf_file(model_dir) is None and os.path.exists(generation):
        files.insert(0, (generation, read_object(generation, CheckpointError, "fetch the file again")))
    found: frozenset[int] = frozenset()
    for file, data in files:
        value = data.get("eos_token_id")
        if value is not None:
            found |= token_ids(value, "eos_token_id", file, config.vocab_size)
    return found


def token_ids(value: Any, key: str, file: Path, vocab_size: int) -> frozenset[int]:
    """One token id or a list of them, as a settings file of a model holds them.

    Raises:
        ConfigError: anything else than whole numbers from 0 to vocab_size - 1.
    """
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"{short_path(file)}: {key} is {quoted(value)}, and must be one token id or a list of them, whole "
                f"numbers from 0 to {vocab_size - 1:,}"
            )
    return frozenset(ids)
