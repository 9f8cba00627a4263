"""A small tokenizer with a chat template, texts and corpora for the tests of long tasks and of their training."""

from __future__ import annotations

import json
import lzma
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from longrun.lab import long_words as words
from longrun.lab.long_tasks import Corpus
from longrun.model.fingerprint import weights_fingerprint
from longrun.needles.needles import generate_sentences

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@lru_cache(maxsize=1)
def sentences() -> tuple[str, ...]:
    return tuple(islice(generate_sentences("long text"), 3000))


@lru_cache(maxsize=1)
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 1,000 entries; every digit is a token."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    own.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    forms = [text for form in words.TRAIN_FORMS for text in (*form.statements, *form.questions, *form.answers)]
    own.train_from_iterator([*sentences()[:1000], *forms], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def texts(count: int = 30, first: int = 0) -> list[str]:
    """Texts of 50 sentences, no two with a sentence in common."""
    found = sentences()[first:]
    return [". ".join(found[start : start + 50]) + ".\n" for start in range(0, 50 * count, 50)]


def save_corpus(folder: Path) -> None:
    """A data folder as make_long_data.py writes it."""
    folder.mkdir()
    head = {}
    for split, first in (("train", 0), ("held_out", 1500)):
        corpus = Corpus.of_texts(tokenizer(), texts(30, first))
        (folder / f"{split}.tokens.xz").write_bytes(lzma.compress(corpus.tokens.astype("<u2").tobytes(), preset=0))
        lengths = [len(document) for document in corpus.documents()]
        head[split] = {"lengths": lengths, "kinds": list(corpus.kinds)}
    (folder / "corpus.json").write_text(json.dumps(head))


def save_model(folder: Path) -> None:
    """A Llama of two layers with random weights, for the vocabulary of `tokenizer`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.1, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def save_all(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Model with its tokenizer, texts, and the settings of an adapter for them, as train_long.py makes it."""
    model, data = folder / "model", folder / "data"
    save_model(model)
    tokenizer().save_pretrained(model)
    save_corpus(data)
    settings = {"r": 2, "lora_alpha": 2, "rope_theta": 5000.0, "max_position_embeddings": 4096}
    return model, data, {**settings, "base_weights": weights_fingerprint(model)}
