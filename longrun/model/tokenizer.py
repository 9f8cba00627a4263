"""The tokenizer of a checkpoint: checked files, no code of the checkpoint, and one sentence where it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.config.gguf_header import gguf_file, read_gguf_header
from longrun.config.options import refuse_own_code
from longrun.errors import CheckpointError, short_path, shortened
from longrun.files.user_files import read_object
from longrun.model.gguf_tokenizer import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TRIAL = "A trial: 1 + 1 = 2.\n"
_ADVICE = "restore the folder's tokenizer files"


def has_tokenizer(model_dir: str | Path) -> bool:
    """Whether the folder holds the vocabulary of a tokenizer, in any of the usual files, or the GGUF file does.

    Raises:
        CheckpointError: a damaged GGUF file.
    """
    gguf = gguf_file(model_dir)
    if gguf is not None:
        return read_gguf_header(gguf).has_tokenizer
    return any(os.path.exists(Path(model_dir) / name) for name in _ONE_OF)


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint folder or a GGUF file, after a text went through it and back.

    Code of the checkpoint is never run, and nothing is asked for on stdin.

    Raises:
        CheckpointError: the folder has none, it calls for code of its own, its files are damaged or of a version that
            the installed libraries do not read.
    """
    folder = Path(model_dir)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{short_path(folder)} has no tokenizer, which is needed to turn text into tokens: put the model's "
            f"tokenizer files there, or use a GGUF file that holds one"
        )
    gguf = gguf_file(folder)
    for name in _SETTINGS if gguf is None else ():
        if os.path.exists(folder / name):
            refuse_own_code(read_object(folder / name, CheckpointError, _ADVICE), str(folder / name))
    try:
        return _tried(_load(folder) if gguf is None else gguf_tokenizer(gguf))
    except BaseException as error:
        # tokenizers raises plain Exception, and where its Rust code panics a class that is no Exception at all.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AssertionError) else error
        raise CheckpointError(
            f"the tokenizer in {short_path(folder)} cannot be loaded ({shortened(why, 200)}): "
            f"{_ADVICE if gguf is None else 'fetch another file of the model'}, or use newer versions of tokenizers "
            f"and transformers"
        ) from error


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    template: Any = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise ValueError(f"chat_template is of type {type(template).__name__}")
    ids = tokenizer(_TRIAL)["input_ids"]
    if not isinstance(tokenizer.decode(ids), str) or not all(isinstance(token_id, int) for token_id in ids):
        raise ValueError("a text does not come back as text")
    if not ids:
        raise ValueError("a text becomes no tokens")
    return tokenizer
