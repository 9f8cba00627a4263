"""The tokenizer and chat template of a GGUF file, built from its metadata with the tokenizers library.

A file names one of two kinds of tokenizer. `gpt2` is byte-level BPE, whose merges are listed and whose text is first
split in a way that the file names, too; `llama` is SentencePiece BPE, whose merges follow from the tokens' scores.
transformers' reader takes ten seconds for 150,000 tokens, and where it does not know how text is split, it splits it in
GPT-2's way; here such a file is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.config.gguf_header import read_gguf_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_KEY = "tokenizer.ggml."
_ARRAYS = tuple(f"{_KEY}{name}" for name in ("tokens", "token_type", "scores", "merges"))
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LONGEST_TOKEN = 4096  # characters
_BLANK = "\u2581"  # SentencePiece's space

# How text is split before merges are made, as the tokenizers' authors publish it: a word with at most one character
# before it, numbers, and runs of signs and of white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{NUMBER}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA3 = _SPLIT.replace("{NUMBER}", r"\p{N}{1,3}")
_QWEN2 = _SPLIT.replace("{NUMBER}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name -> (pattern; None is GPT-2's own, "digits" the same with every digit for itself, whether a word that is a token
# is taken whole without merges, whether a begin-of-sequence token stands first where the file does not say).
_SPLITS: dict[str, tuple[str | None, bool, bool]] = {
    "default": (None, False, False),
    "gpt-2": (None, False, False),
    "smollm": ("digits", False, False),
    "llama-bpe": (_LLAMA3, True, True),
    "llama3": (_LLAMA3, True, True),
    "llama-v3": (_LLAMA3, True, True),
    "qwen2": (_QWEN2, False, False),
    "deepseek-r1-qwen": (_QWEN2, False, False),
    "tekken": (_TEKKEN, True, True),
}


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """transformers' fast tokenizer over the vocabulary of the file, with the file's chat template.

    Raises:
        ValueError: metadata that are missing, of the wrong kind or contradict each other, a kind of tokenizer that is
            not supported.
        CheckpointError: see `read_gguf_header`.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    metadata = read_gguf_header(file, keep=_ARRAYS).metadata
    tokens = _list_of(metadata, "tokens", str)
    kinds = _list_of(metadata, "token_type", int, len(tokens), [_NORMAL] * len(tokens))
    if len(set(tokens)) != len(tokens) or max(map(len, tokens), default=0) > _LONGEST_TOKEN:
        raise ValueError(f"tokens are missing, stand twice or have more than {_LONGEST_TOKEN:,} characters")
    model = metadata.get(f"{_KEY}model")
    special = {name: _token(metadata, f"{key}_token_id", tokens) for name, key in _SPECIAL.items()}
    if model == "gpt2":
        backend, begins = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, begins = _sentencepiece(metadata, tokens, kinds, special["unk_token"]), True
    else:
        raise ValueError(f"its kind {model!r} is not supported, only gpt2 and llama are")
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)
    _frame(backend, metadata, special, begins)
    template = metadata.get("tokenizer.chat_template")
    # As the library's own classes do it: a `tokenizer_object` is copied, which takes as long as building it.
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer._tokenizer = backend
    tokenizer.__init__(
        chat_template=template, clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )  # fmt: skip
    if len(tokenizer) != len(tokens):
        raise ValueError(f"{len(tokenizer) - len(tokens)} of its control tokens are no tokens of the vocabulary")
    return tokenizer


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(metadata: dict[str, Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether a begin-of-sequence token belongs first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = metadata.get(f"{_KEY}pre", "default")
    if name not in _SPLITS:
        raise ValueError(f"its way {name!r} of splitting text is not supported, only {', '.join(_SPLITS)}")
    pattern, whole_words, begins = _SPLITS[name]
    merges = [tuple(merge.split(" ")) for merge in _list_of(metadata, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("a merge does not name two tokens")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))]
    if pattern == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, begins


def _sentencepiece(
    metadata: dict[str, Any], tokens: Sequence[str], kinds: Sequence[int], unknown: str | None
) -> Tokenizer:
    """SentencePiece BPE with bytes for characters that no token has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if unknown is None:
        unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    if f"{_KEY}merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in _list_of(metadata, "merges", str)]
    else:
        scores = _list_of(metadata, "scores", float, len(tokens))
        text = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (_NORMAL, _UNUSED)}
        merges = _merges_by_score(vocab, scores, text)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_by_score(vocab: dict[str, int], scores: Sequence[float], text: set[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two, the token with the highest score first, as SentencePiece merges."""
    found = []
    for token in text:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in text and right in text:
                found.append((-scores[vocab[token]], vocab[token], vocab[left], vocab[right], left, right))
    return [pair[4:] for pair in sorted(found)]


def _frame(backend: Tokenizer, metadata: dict[str, Any], special: dict[str, str | None], begins: bool) -> None:
    """Let the tokenizer put the begin and end tokens around a text that the file asks for."""
    from tokenizers import processors

    begin = special["bos_token"] if metadata.get(f"{_KEY}add_bos_token", begins) else None
    end = special["eos_token"] if metadata.get(f"{_KEY}add_eos_token", False) else None
    names = [name for name in (begin, "$A", end) if name is not None]
    if len(names) > 1:
        ids = [(name, backend.token_to_id(name)) for name in {begin, end} - {None}]
        backend.post_processor = processors.TemplateProcessing(single=names, special_tokens=ids)


def _list_of(metadata: dict[str, Any], name: str, kind: type, length: int | None = None, default: Any = None) -> Any:
    values = metadata.get(_KEY + name, default)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"{_KEY}{name} is missing or no list of type {kind.__name__}")
    if length is not None and len(values) != length:
        raise ValueError(f"{_KEY}{name} has {len(values):,} items for {length:,} tokens")
    return values


def _token(metadata: dict[str, Any], key: str, tokens: Sequence[str]) -> str | None:
    token_id = metadata.get(_KEY + key)
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise ValueError(f"{_KEY}{key} is {token_id!r}, which is no token of its {len(tokens):,}")
    return tokens[token_id]
