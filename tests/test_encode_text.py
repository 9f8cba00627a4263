"""A text encoded in pieces: the ids of the text in one piece, for tokenizers of every kind, and never a long piece."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longrun.errors import InputError
from longrun.text import encode_text
from longrun.text.encode_text import encode_in_pieces

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PARTS = (
    "the parser reads", " lines.\n", "\n\n", "    return x\n", "\t", "  ", " ", ".", ",\n", "(self)", "don't", "2,048",
    "1234567", "日本語の文章。", "、", "naïve e\u0301", "😀👩‍👩‍👧",
    "<|im_end|>", "aaaaaaaa", "\r\n", "--- ", "_x_", "\u00a0", "▁", "Ġ",
)  # fmt: skip


def _text(seed: int, parts: int) -> str:
    chosen = random.Random(seed).choices(PARTS, k=parts)
    return "".join(chosen)


def _trained(model, pre_tokenizer, normalizer=None, unk=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if unk is None else []
    settings = {"vocab_size": 700, "show_progress": False, "initial_alphabet": alphabet}
    if isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(unk_token=unk, special_tokens=[unk], **settings)
    else:
        trainer = trainers.BpeTrainer(special_tokens=[unk] if unk else [], **settings)
    tokenizer.train_from_iterator(_text(0, 3000).split("\n"), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk)


def _split(pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama_2():
    """Trained on words, as sentencepiece does it, but used without any pre-tokenizer."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _trained(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), None, "<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = prepend
    return tokenizer


TOKENIZERS = {
    "GPT-2": lambda: _trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2 with a leading space": lambda: _trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": lambda: _trained(models.BPE(), _split(LLAMA_3), normalizers.NFC()),
    "Llama 2": _llama_2,
    "metaspace": lambda: _trained(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), None, "<unk>"),
    "unigram": lambda: _trained(models.Unigram(), pre_tokenizers.Metaspace(), normalizers.Strip(), "<unk>"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_the_text_in_one_piece(kind):
    tokenizer = TOKENIZERS[kind]()
    longest = 0

    def encode(text):
        nonlocal longest
        longest = max(longest, len(text))
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for seed in range(1, 9):
        text = _text(seed, 2500)
        longest = 0
        got = encode_in_pieces(tokenizer, text, encode, piece_chars=2000)
        in_pieces = longest
        assert got == encode(text)
        assert in_pieces < len(text) / 2, "it was not cut"


def test_a_place_is_cut_only_where_no_token_reaches_across():
    """Without pre-tokenizer, and with tokens that hold a line end or a space inside, there is no certain place."""
    vocab = {text: number for number, text in enumerate(["a", "b", "\n", " ", "a\n", "a\nb", "a ", "a b"])}
    model = models.BPE(vocab, [("a", "\n"), ("a\n", "b"), ("a", " "), ("a ", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    lengths = []

    def encode(text):
        lengths.append(len(text))
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    text = "a\nb" * 400 + "a b" * 400
    assert encode_in_pieces(tokenizer, text, encode, piece_chars=300) == encode(text) == [5] * 400 + [7] * 400
    assert lengths[-2] == len(text)


def test_a_long_stretch_without_a_place_is_weighed_against_memory(monkeypatch):
    tokenizer = TOKENIZERS["GPT-2"]()

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    text = "some words " * 30 + "acgt" * 2000
    assert encode_in_pieces(tokenizer, text, encode, piece_chars=200) == encode(text)
    monkeypatch.setattr(encode_text, "available_bytes", lambda: 10**6)
    with pytest.raises(InputError, match=r"8,1\d\d characters without a space.*1\.00 MB are free: break"):
        encode_in_pieces(tokenizer, text, encode, piece_chars=200)
