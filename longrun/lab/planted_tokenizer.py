"""The planted model's tokenizer: one token a word, a digit or a punctuation mark, over the needle generator's words."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from longrun.errors import ConfigError
from longrun.needles.needles import ANSWER, HEAD, NEEDLE, QUESTION
from longrun.needles.words import NAMES, PATTERNS, SLOTS

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2


def cue_words() -> tuple[str, ...]:
    """The words whose codes should lie far apart, because needles differ by them alone: digits and names."""
    return (*string.digits, *NAMES)


def build_vocabulary(vocab_size: int) -> list[str]:
    """Words by token id: specials, cue words, punctuation, every haystack word in both cases, filler entries.

    Raises:
        ConfigError: vocab_size is smaller than the words.
    """
    literals = re.sub(r"\{\w+\}", " ", " ".join((*PATTERNS, HEAD, NEEDLE, QUESTION, ANSWER)))
    plain = sorted(set(re.findall(r"[A-Za-z]+", literals)).union(*SLOTS.values()) | {"an"})
    words = [UNK, BOS, EOS, *cue_words(), *string.punctuation]
    words += [word for word in dict.fromkeys([*plain, *(w.capitalize() for w in plain)]) if word not in NAMES]
    if len(words) > vocab_size:
        raise ConfigError(f"vocab_size {vocab_size:,} cannot hold the {len(words):,} words of the needle generator")
    return words + [f"<filler_{number}>" for number in range(vocab_size - len(words))]


def write_tokenizer(folder: Path, vocabulary: list[str], max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; no chat template, and nothing is added to a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words joined by spaces, none before a comma
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
