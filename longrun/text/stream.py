"""From a stream of token ids to a stream of printable text: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from longrun.errors import ContextFullError, InputError, quoted
from longrun.text.encoder import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 8  # tokens; a character has at most four bytes, and a token at least one


class TextStream:
    """Decodes token by token; text is given out as soon as its last character is complete.

    Each step decodes a short window that starts one emitted piece earlier, so that decoders which treat the first
    token of a text differently (a leading space) see a neighbour, and the cost does not grow with the answer.
    Special tokens are left out.

    Args:
        before: token ids of the text that this one continues; it was given out, but for a character that they leave
            incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_LONGEST_CHARACTER:])
        self._shown = len(self._ids)  # tokens at the start of the window that were given out before
        while self._shown > 1 and self._decode(self._ids[: self._shown]).endswith(_REPLACEMENT):
            self._shown -= 1

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
        strings: none is empty; text that could still become one of them is held back. One str is a list of one.
        before: text that was given out already and in which a stop string may begin.

    Raises:
        InputError: an empty stop string, or one that is no text.
    """

    def __init__(self, strings: Sequence[str] = (), before: str = "") -> None:
        self._strings = _checked(strings)
        self._held = before[len(before) - self._keep(before) :]
        self._shown = "0" * len(self._held)  # a "1" for every held character that is to be given out
        self.found: str | None = None

    def feed(self, text: str, shown: bool = True) -> str:
        """The part of the text so far that is sure to stand before any stop string; sets `found` at the first one.

        Args:
            shown: whether this text is given out; a control token's spelling is compared and not shown.
        """
        if self.found is not None:
            return ""
        self._shown += ("1" if shown else "0") * len(text)
        text = self._held + text
        places = [(text.find(string), string) for string in self._strings if string in text]
        if places:
            start, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            self._held = text[start:]
            return self._release(text, start)
        keep = self._keep(text)
        return self._release(text, len(text) - keep)

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        return "" if self.found is not None else self._release(self._held, len(self._held))

    def _release(self, text: str, count: int) -> str:
        given = "".join(c for c, shown in zip(text[:count], self._shown, strict=False) if shown == "1")
        self._held, self._shown = text[count:], self._shown[count:]
        return given

    def _keep(self, text: str) -> int:
        return max((self._overlap(text, string) for string in self._strings), default=0)

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of `text` that is a beginning of `string`."""
        for length in range(min(len(text), len(string) - 1), 0, -1):
            if text.endswith(string[:length]):
                return length
        return 0


def _checked(strings: Sequence[str]) -> tuple[str, ...]:
    if isinstance(strings, str):
        strings = (strings,)
    elif not isinstance(strings, Collection):
        raise InputError(f"stop {quoted(strings)} is no list of texts: give str, or a list of them")
    for string in strings:
        if not isinstance(string, str):
            raise InputError(f"the stop string {quoted(string)} is no text: give a str")
    if "" in strings:
        raise InputError("a stop string is empty: give at least one character, or leave --stop out")
    return tuple(strings)


class AnswerText:
    """The printable text of an answer, up to a stop string or the spelling of a control token given as one.

    Args:
        stop: what ends the answer; `found` is the one that did.
        before: token ids of the beginning of this answer, which was given out already.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._control = {token_id: text for text, token_id in control_tokens(tokenizer).items()}
        self._stream = TextStream(tokenizer, before)
        longest = max(map(len, _checked(stop)), default=0)
        said = tokenizer.decode(list(before[-longest:]), clean_up_tokenization_spaces=False) if longest else ""
        self._stop = StopStrings(stop, said)

    @property
    def found(self) -> str | None:
        """The stop string that ended the answer, None while none has."""
        return self._stop.found

    def step(self, token_id: int) -> str:
        """What this token adds to the text; empty where that is not sure yet."""
        hidden = self._control.get(token_id)
        if hidden is None or self._tokenizer.decode([token_id], skip_special_tokens=True):
            return self._stop.feed(self._stream.step(token_id))
        given = self._stop.feed(self._stream.flush())
        return given + self._stop.feed(hidden, shown=False)

    def flush(self) -> str:
        """What is left at the end."""
        return self._stop.feed(self._stream.flush()) + self._stop.flush()


def text_pieces(token_ids: Iterable[int], end_ids: Collection[int], text: AnswerText) -> Iterator[str]:
    """The text of generated tokens, piece by piece, up to a token of `end_ids` or a stop string.

    Raises:
        ContextFullError: from `token_ids`; what was known of the text has been yielded.
    """
    full = None
    try:
        for token_id in token_ids:
            if token_id in end_ids:
                break
            if piece := text.step(token_id):
                yield piece
            if text.found is not None:
                break
    except ContextFullError as error:
        full = error
    if piece := text.flush():
        yield piece
    if full is not None:
        raise full
