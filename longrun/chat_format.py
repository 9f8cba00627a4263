"""A chat template as token ids, a piece at a time, so that what was read once is never tokenized again.

The template is rendered once with markers in place of the messages and cut at the markers. What stands between them
(`<|im_start|>user` and the like) becomes ids with control tokens; a user's text never does: `<|im_end|>` inside a
document is read as those characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrun.encode_text import encode_in_pieces
from longrun.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER, _NEXT = "LongrunUserMarker", "LongrunAnswerMarker", "LongrunNextMarker"
_SEPARATOR = "\n\n"
_ANCHOR = "\n"


@dataclass(frozen=True)
class TurnText:
    """What a template writes around a user's message: `opening` before, `closing` after it, up to the answer."""

    opening: str
    closing: str


class ChatFormat:
    """Turns messages into token ids, for one tokenizer and system prompt.

    A tokenizer without chat template gives plain text: begin-of-sequence ids as the tokenizer adds them, then the
    messages as they are, a newline between an answer and the next message.

    Args:
        tokenizer: transformers' tokenizer.
        system: system prompt; None leaves it to the template (many have a default one).
        first: the first turn as it was rendered when a saved session began (some templates write the date).

    Raises:
        InputError: a system prompt that the template does not take.
        CheckpointError: a template that cannot be rendered or does not show the messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, first: TurnText | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._start_ids: list[int] = []
        if self.has_template:
            control = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
            self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
            self.first = first or self._render_first(system)
            self._later = self._render_later(system)
            return
        if system is not None:
            raise InputError("this model has no chat template and takes no system prompt: leave --system out")
        plain, whole = self._encode("a"), self._encode("a", add_special_tokens=True)
        if plain and plain[0] in whole:
            self._start_ids = whole[: whole.index(plain[0])]
        self._control = re.compile(r"(?!)")
        self.first = first or TurnText("", "")
        self._later = TurnText("\n", "")

    def opening_ids(self, previous_id: int | None, is_end: bool) -> list[int]:
        """Ids before a user's text.

        Args:
            previous_id: last token of the conversation so far, None at its start.
            is_end: whether that is an end-of-sequence token; it is not repeated where the template begins with it.
        """
        if previous_id is None:
            return self._start_ids + self._encode_template(self._head(self.first))
        ids = self._encode_template(self._head(self._later))
        if is_end and previous_id in ids:
            place = ids.index(previous_id)
            if not self._tokenizer.decode(ids[:place]).strip():
                return ids[place + 1 :]
        return ids

    def tail_ids(self, first_turn: bool) -> list[int]:
        """Ids of the opening's end, which `text_ids` otherwise tokenizes together with the user's text."""
        turn = self.first if first_turn else self._later
        return self._encode(turn.opening[len(self._head(turn)) :])

    def text_ids(self, texts: Sequence[str], first_turn: bool, begins: bool, ends: bool) -> list[list[int]]:
        """Ids of the texts of one user's message, each of which may be read at another time.

        Args:
            texts: documents and question, in their order.
            first_turn: whether it is the first message of the conversation.
            begins: whether the first text begins the message (else it goes on).
            ends: whether the last text ends it (`closing_ids` follow).
        """
        turn = self.first if first_turn else self._later
        found = []
        for number, text in enumerate(texts):
            inside = number > 0 or not begins
            before = _SEPARATOR if inside else turn.opening[len(self._head(turn)) :]
            after = self._lead_out(turn) if ends and number == len(texts) - 1 else ""
            continues = inside or (not first_turn and not self._head(turn))
            found.append(self._encode_text(before + text + after, continues))
        return found

    def closing_ids(self, first_turn: bool) -> list[int]:
        """Ids after a user's text, up to where the answer starts."""
        turn = self.first if first_turn else self._later
        return self._encode_template(turn.closing[len(self._lead_out(turn)) :])

    def _head(self, turn: TurnText) -> str:
        """The opening up to its last control token: what follows is tokenized together with the user's text."""
        ends = [match.end() for match in self._control.finditer(turn.opening)]
        return turn.opening[: ends[-1]] if ends else ""

    def _lead_out(self, turn: TurnText) -> str:
        """The closing before its first control token: it is tokenized together with the user's text."""
        match = self._control.search(turn.closing)
        return turn.closing[: match.start()] if match else turn.closing

    def _encode(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        if not text:
            return []
        return self._tokenizer(
            text, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens, verbose=False
        )["input_ids"]

    def _encode_template(self, text: str) -> list[int]:
        return self._encode(text)

    def _encode_text(self, text: str, continues: bool) -> list[int]:
        """Ids of a user's text; one that continues another gets no begin-of-text space from the tokenizer."""
        if continues:
            anchor = self._encode(_ANCHOR)
            ids = self._encode_in_pieces(_ANCHOR + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self._encode_in_pieces(text)

    def _encode_in_pieces(self, text: str) -> list[int]:
        return encode_in_pieces(self._tokenizer, text, lambda piece: self._encode(piece, split_special_tokens=True))

    def _render_first(self, system: str | None) -> TurnText:
        rendered = self._render(system, [("user", _USER)])
        opening, closing = self._cut(rendered, _USER)
        return TurnText(opening, closing)

    def _render_later(self, system: str | None) -> TurnText:
        rendered = self._render(system, [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)])
        _, after = self._cut(rendered, _ANSWER)
        opening, closing = self._cut(after, _NEXT)
        return TurnText(opening, closing)

    def _render(self, system: str | None, turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the checkpoint's and may raise anything
            reason = " ".join(str(error).split())[:200]
            if system is not None:
                raise InputError(
                    f"the chat template refuses the system prompt ({reason}): leave --system out"
                ) from error
            raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {reason}") from error
        assert isinstance(text, str)
        if system is not None and system.strip() not in text:
            raise InputError("the model's chat template ignores the system prompt: leave --system out")
        return text

    @staticmethod
    def _cut(text: str, marker: str) -> tuple[str, str]:
        parts = text.split(marker)
        if len(parts) != 2:
            raise CheckpointError(
                f"the checkpoint's chat template shows a message {len(parts) - 1} times instead of once: it cannot be "
                f"used for a chat that is read piece by piece"
            )
        return parts[0], parts[1]
