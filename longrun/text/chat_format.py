"""A chat template as token ids, a piece at a time, so that what was read once is never tokenized again.

The template is rendered once with markers in place of the messages and cut at the markers. What stands between them
(`<|im_start|>user` and the like) becomes ids with control tokens; a user's text and a system prompt never do:
`<|im_end|>` inside a document is read as those characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun.errors import CheckpointError, InputError
from longrun.text.chat_template import TemplateError, cut_at, has_template, render_chats
from longrun.text.encoder import TextEncoder, leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER, _NEXT = "LongrunUserMarker", "LongrunAnswerMarker", "LongrunNextMarker"
_SYSTEM = "LongrunSystemMarker"
_SEPARATOR = "\n\n"
_ANCHOR = "\n"


@dataclass(frozen=True)
class TurnText:
    """What a template writes around a user's message: `opening` before, `closing` after it, up to the answer."""

    opening: str
    closing: str


def system_size(
    tokenizer: PreTrainedTokenizerBase | None, system: str | None = None, options: Mapping[str, Any] | None = None
) -> int:
    """Tokens before the first message of a chat: the system prompt, with what the template writes around it.

    Args:
        system: the prompt; None for the template's own.
        options: of the template.

    Raises:
        InputError: the model has no tokenizer or no chat template, or as `ChatFormat`.
        CheckpointError: as `ChatFormat`.
    """
    if tokenizer is None or not has_template(tokenizer):
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise InputError(f"keep system needs a system prompt, and this model has no {missing}: give a number of tokens")
    chat = ChatFormat(tokenizer, system, options=options)
    return len(chat.opening_ids(None, False)) + len(chat.tail_ids(True))


class ChatFormat:
    """Turns messages into token ids, for one tokenizer and system prompt.

    A tokenizer without chat template gives plain text: begin-of-sequence ids as the tokenizer adds them, then the
    messages as they are, a newline between an answer and the next message.

    Args:
        tokenizer: transformers' tokenizer.
        system: system prompt; None leaves it to the template (many have a default one).
        first: the first turn as it was rendered when a saved session began (some templates write the date).
        options: JSON values of names that the template asks for, such as `enable_thinking`.

    Raises:
        InputError: a system prompt or an option that the template does not take.
        CheckpointError: a template that cannot be rendered, not within its bounds, or does not show the messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        first: TurnText | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._encoder = TextEncoder(tokenizer)
        self.has_template = has_template(tokenizer)
        self._start_ids: list[int] = []
        self._system: tuple[int, int] | None = None  # where it stands in the opening of the first turn
        self._later_system: tuple[int, int] | None = None  # and of the later ones: some templates repeat it
        if self.has_template:
            self._control = self._encoder.pattern
            rendered, self._later = self._render(system)
            self.first = first or rendered
            if system is not None:
                marked = self._render(_SYSTEM)
                self._system = self._find_system(system, self.first.opening, marked[0].opening)
                self._later_system = self._find_system(system, self._later.opening, marked[1].opening)
            return
        if system is not None:
            raise InputError("this model has no chat template and takes no system prompt: leave --system out")
        if options:
            raise InputError("this model has no chat template and takes no options of one: leave --template-option out")
        self._start_ids = leading_ids(tokenizer)
        self._control = re.compile(r"(?!)")
        self.first = first or TurnText("", "")
        self._later = TurnText("\n", "")

    def opening_ids(self, previous_id: int | None, is_end: bool) -> list[int]:
        """Ids before a user's text.

        Args:
            previous_id: last token of the conversation so far, None at its start.
            is_end: whether that is an end-of-sequence token; it, or another control token that ended the answer, is
                not repeated where the template begins with it.
        """
        if previous_id is None:
            return self._start_ids + self._encode_head(True)
        ids = self._encode_head(False)
        if (is_end or previous_id in self._encoder.control.values()) and previous_id in ids:
            place = ids.index(previous_id)
            if not self._tokenizer.decode(ids[:place]).strip():
                return ids[place + 1 :]
        return ids

    def tail_ids(self, first_turn: bool) -> list[int]:
        """Ids of the opening's end, which `text_ids` otherwise tokenizes together with the user's text."""
        head, tail = self._head_and_tail(first_turn)
        return self._encoder.ids(tail, after_control=bool(head))

    def text_ids(self, texts: Sequence[str], first_turn: bool, begins: bool, ends: bool) -> list[list[int]]:
        """Ids of the texts of one user's message, each of which may be read at another time.

        Args:
            texts: documents and question, in their order.
            first_turn: whether it is the first message of the conversation.
            begins: whether the first text begins the message (else it goes on).
            ends: whether the last text ends it (`closing_ids` follow).
        """
        head, tail = self._head_and_tail(first_turn)
        found = []
        for number, text in enumerate(texts):
            inside = number > 0 or not begins
            before = _SEPARATOR if inside else tail
            after = self._lead_out(self._turn(first_turn)) if ends and number == len(texts) - 1 else ""
            continues = inside or (not first_turn and not head)
            found.append(self._encode_text(before + text + after, continues, bool(head)))
        return found

    @property
    def leads(self) -> tuple[str, ...]:
        """What may stand before a text in the ids that `text_ids` gives for it."""
        return _SEPARATOR, self._head_and_tail(True)[1], self._head_and_tail(False)[1]

    def closing_ids(self, first_turn: bool) -> list[int]:
        """Ids after a user's text, up to where the answer starts."""
        turn = self._turn(first_turn)
        return self._encode(turn.closing[len(self._lead_out(turn)) :])

    def _turn(self, first_turn: bool) -> TurnText:
        return self.first if first_turn else self._later

    def _system_place(self, first_turn: bool) -> tuple[int, int]:
        """Where the system prompt stands in the opening; (its length, its length) where it does not."""
        end = len(self._turn(first_turn).opening)
        return (self._system if first_turn else self._later_system) or (end, end)

    def _head_and_tail(self, first_turn: bool) -> tuple[str, str]:
        """The opening up to its last control token, and what follows: tokenized together with the user's text."""
        opening = self._turn(first_turn).opening
        start, stop = self._system_place(first_turn)
        ends = [match.end() for match in self._control.finditer(opening[:start])]
        ends += [match.end() + stop for match in self._control.finditer(opening[stop:])]
        place = ends[-1] if ends else 0
        return opening[:place], opening[place:]

    def _lead_out(self, turn: TurnText) -> str:
        """The closing before its first control token: it is tokenized together with the user's text."""
        match = self._control.search(turn.closing)
        return turn.closing[: match.start()] if match else turn.closing

    def _encode_head(self, first_turn: bool) -> list[int]:
        """Ids of the opening up to its last control token, a system prompt in it as text."""
        head, _ = self._head_and_tail(first_turn)
        start, stop = self._system_place(first_turn)
        if start >= len(head):
            return self._encode(head)
        before = [match.end() for match in self._control.finditer(head[:start])]
        after = self._control.search(head[stop:])
        assert after is not None, "the head ends with a control token"
        begins, ends = before[-1] if before else 0, stop + after.start()
        text = self._encoder.ids(head[begins:ends], after_control=begins > 0)
        return self._encode(head[:begins]) + text + self._encode(head[ends:])

    def _encode(self, text: str) -> list[int]:
        """Ids of the template's own text, with control tokens."""
        if not text:
            return []
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_text(self, text: str, continues: bool, after_control: bool) -> list[int]:
        """Ids of a user's text; one that continues another gets no begin-of-text space from the tokenizer."""
        if continues:
            anchor = self._encoder.ids(_ANCHOR)
            ids = self._encoder.ids(_ANCHOR + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self._encoder.ids(text, after_control and not continues)

    def _find_system(self, system: str, opening: str, marked: str) -> tuple[int, int] | None:
        """Where the system prompt stands in an opening, told apart from the template's words by a rendered marker.

        Raises:
            InputError: it holds a control token, and the template changed it so that it cannot be found.
        """
        expected = marked.find(_SYSTEM)
        if expected < 0:
            return None
        for text in (system, system.strip()):
            places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", opening)] if text else []
            if places:
                start = min(places, key=lambda place: abs(place - expected))
                return start, start + len(text)
        found = self._control.search(system)
        if found and found.group() in opening:
            raise InputError(
                f"the system prompt holds {found.group()}, a control token of this model, and its chat template "
                f"changes the prompt so that it cannot be told from the template's own: leave that out"
            )
        return None

    def _render(self, system: str | None) -> tuple[TurnText, TurnText]:
        """The first turn and the later ones."""
        turns = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
        if system is not None:
            turns.insert(0, ("system", system))
        try:
            first, later = render_chats(self._tokenizer, [turns[:-2], turns], options=self._options)
        except TemplateError as error:
            if system is not None:
                raise InputError(
                    f"the chat template refuses the system prompt ({error}): leave --system out"
                ) from error
            raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {error}") from error
        if system is not None and system.strip() not in first:
            raise InputError("the model's chat template ignores the system prompt: leave --system out")
        _, after = cut_at(later, _ANSWER)
        return TurnText(*cut_at(first, _USER)), TurnText(*cut_at(after, _NEXT))
