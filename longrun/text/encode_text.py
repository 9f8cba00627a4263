"""A long text as token ids, a piece at a time.

A tokenizer holds some hundred bytes a token while it works: for a text of 5 MB 0.7 GB that no plan knows.

The ids are those of the text in one piece. A text is cut only where the tokenizer itself cuts: at a place where its
pre-tokenizer begins a new word, or, where it has none, where no token of its vocabulary reaches across. Each place is
tried before it is taken: what stands around it must give the same ids cut and whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from longrun.errors import InputError
from longrun.machine.host_memory import available_bytes
from longrun.units import format_bytes

PIECE_CHARS = 2**17
# What the tokenizer holds while it works, a character of a text of single-character tokens (tokenizers 0.23, measured).
_WORKING_BYTES_PER_CHAR = 600

_AROUND = 1000  # characters on either side of a cut that are encoded to try it
_ANCHOR = 16  # characters before a cut that go before the next piece, so that it does not begin a text
_STRETCH = 2**13
_TRIES = 64  # places tried in a stretch
# Before a line, between two words, and before a punctuation mark, for scripts without spaces.
_CANDIDATE = re.compile(r"(?<=\S\n)(?=\S)|(?<=\w)(?= \w)|(?<=\w)(?=[^\w\s])")
_LINE_END, _SPACE = "\nĊ", " ▁Ġ"  # as vocabularies spell them

Encode = Callable[[str], list[int]]


def encode_in_pieces(tokenizer: Any, text: str, encode: Encode, piece_chars: int = PIECE_CHARS) -> list[int]:
    """The ids of `encode(text)`, with memory for one piece of the text.

    A text without a place to cut for longer than a piece (no space, line end or punctuation mark) makes that piece
    longer.

    Args:
        tokenizer: transformers' tokenizer, whose pre-tokenizer and vocabulary say where a text may be cut.
        encode: ids of a text by this tokenizer; it must neither add ids of its own before or after the text's nor
            treat an added token in it as anything but text.
        piece_chars: characters of a piece.

    Raises:
        InputError: memory is too short for a piece that had to be longer.
    """
    if len(text) <= piece_chars:
        return encode(text)
    cuts = _Cuts(tokenizer, encode)
    ids: list[int] = []
    start = 0
    while start < len(text):
        stop = cuts.find(text, start + piece_chars)
        _check_memory(stop - start, piece_chars)
        ids += cuts.encode_from(text, start, stop)
        start = stop
    return ids


class _Cuts:
    """Places where a text may be cut, for one tokenizer."""

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._tokenizer, self._encode = tokenizer, encode
        self._crossed: tuple[bool, bool] | None = None

    def find(self, text: str, wanted: int) -> int:
        """The first good place at or after `wanted`; the end of the text where there is none."""
        while wanted < len(text):
            for place in self._candidates(text, wanted):
                if self._is_certain(text, place) and self._holds(text, place):
                    return place
            wanted += _STRETCH
        return len(text)

    def encode_from(self, text: str, start: int, stop: int) -> list[int]:
        """Ids of text[start:stop], where `start` is the text's beginning or a place that `find` gave."""
        anchor = self._encode(text[max(0, start - _ANCHOR) : start]) if start else []
        ids = self._encode(text[max(0, start - _ANCHOR) : stop])
        assert ids[: len(anchor)] == anchor, "the tokenizer cuts this text otherwise than around the place alone"
        return ids[len(anchor) :]

    @staticmethod
    def _candidates(text: str, first: int) -> Iterator[int]:
        found = _CANDIDATE.finditer(text, first, first + _STRETCH)
        for _, match in zip(range(_TRIES), found, strict=False):
            yield match.start()

    def _holds(self, text: str, place: int) -> bool:
        """Around the place, the ids cut are those in one piece."""
        before, after = max(0, place - _AROUND), place + _AROUND
        anchor = self._encode(text[place - _ANCHOR : place])
        right = self._encode(text[place - _ANCHOR : after])
        if right[: len(anchor)] != anchor:
            return False
        return self._encode(text[before:after]) == self._encode(text[before:place]) + right[len(anchor) :]

    def _is_certain(self, text: str, place: int) -> bool:
        """No token can reach across: the pre-tokenizer starts a word there, or the vocabulary has no such token."""
        before = max(0, place - _AROUND)
        pre_tokenizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
        if pre_tokenizer is not None:
            words = pre_tokenizer.pre_tokenize_str(text[before : place + _AROUND])
            if len(words) > 1:
                return any(before + start == place for _, (start, _) in words)
        if self._crossed is None:
            added = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}
            tokens = [token for token in self._tokenizer.get_vocab() if token not in added]
            line = re.compile(rf"[{_LINE_END}][^{_LINE_END}]")
            space = re.compile(rf"[^{_SPACE}][{_SPACE}]")
            self._crossed = any(map(line.search, tokens)), any(map(space.search, tokens))
        line_crossed, space_crossed = self._crossed
        return (text[place - 1] == "\n" and not line_crossed) or (text[place] == " " and not space_crossed)


def _check_memory(chars: int, piece_chars: int) -> None:
    if chars <= 2 * piece_chars:
        return
    needed, free = chars * _WORKING_BYTES_PER_CHAR, available_bytes()
    if needed > free:
        raise InputError(
            f"the text holds {chars:,} characters without a space, line end or punctuation mark where it could be cut: "
            f"the tokenizer needs up to {format_bytes(needed)} for them and {format_bytes(free)} are free: break the "
            f"text into lines"
        )
