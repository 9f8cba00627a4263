"""From a stream of token ids to a stream of printable text: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 8  # tokens; a character has at most four bytes, and a token at least one


class TextStream:
    """Decodes token by token; text is given out as soon as its last character is complete.

    Each step decodes a short window that starts one emitted piece earlier, so that decoders which treat the first
    token of a text differently (a leading space) see a neighbour, and the cost does not grow with the answer.
    Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens at the start of the window that were given out before

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _LONGEST_CHARACTER:
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        return self._give_out(self._decode(self._ids))

    def _give_out(self, text: str) -> str:
        before = self._decode(self._ids[: self._shown])
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]


class StopStrings:
    """Cuts a stream of text at the first stop string, also where it comes in pieces.

    Args:
        strings: none is empty; text that could still become one of them is held back.

    Raises:
        InputError: an empty stop string.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if "" in strings:
            raise InputError("a stop string is empty: give at least one character, or leave --stop out")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The part of the text so far that is sure to stand before any stop string; sets `found` at the first one."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(text.find(string), string) for string in self._strings if string in text]
        if places:
            start, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            self._held = ""
            return text[:start]
        keep = max((self._overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of `text` that is a beginning of `string`."""
        for length in range(min(len(text), len(string) - 1), 0, -1):
            if text.endswith(string[:length]):
                return length
        return 0
