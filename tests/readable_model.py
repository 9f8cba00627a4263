"""A tiny random model that reads text: one token a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_readable(folder: Path, **overrides: Any) -> Path:
    """Save a tiny Llama (3 layers of 3 KV heads) with a tokenizer of single characters; returns the folder."""
    save_tiny(folder, "llama", **overrides)
    characters = [*map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?unk", *characters])}, unk_token="?unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?unk").save_pretrained(folder)
    return folder
