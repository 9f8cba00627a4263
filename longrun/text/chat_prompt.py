"""A list of messages as token ids, the way the model's chat template writes them in one piece.

The template gets the messages themselves, so that what it does with them (stripping, leaving out) happens; only the
spelling of a control token in a message is hidden from it, and becomes the characters it is written with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun.arguments import check_text
from longrun.errors import InputError
from longrun.text.chat_template import Chat, TemplateError, has_template, render_chats
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlacedMessage:
    """A message within a text.

    Attributes:
        number: in the conversation.
        first, stop: its characters [first, stop) of the text.
        skipped: characters of the message before those: templates strip white space.
    """

    number: int
    first: int
    stop: int
    skipped: int


@dataclass(frozen=True)
class PromptText:
    """What stands between two control tokens of a prompt.

    Attributes:
        text: with what the template writes around messages.
        first, stop: its tokens [first, stop) of the prompt.
        messages: those that stand in it as they are, or stripped, in order.
    """

    text: str
    first: int
    stop: int
    messages: tuple[PlacedMessage, ...]


class ChatPrompts:
    """Writes chat prompts for one tokenizer.

    Raises:
        InputError: the model has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not has_template(tokenizer):
            raise InputError("this model has no chat template: send the text itself, as a completion")
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)

    def ids(self, chat: Chat, now: float | None = None) -> list[int]:
        """The ids of `read`."""
        return self.read(chat, now)[0]

    def read(
        self, chat: Chat, now: float | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
        more: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[PromptText]]:  # fmt: skip
        """Token ids of a conversation, up to where its next message, the answer, begins, and the texts among them.

        Args:
            chat: (role, content) of each message; a control token's spelling in a content is only text.
            now: the time that the template may write, in seconds since 1970; None is the clock's.
            tools, more: see `render_chats`; texts in them are only text as well.

        Raises:
            InputError: the template refuses the messages, or a text is none.
            CheckpointError: the template cannot be rendered within its bounds.
        """
        for number, (_, content) in enumerate(chat):
            check_text(content, f"message {number}")
        contents, roles = [content for _, content in chat], [role for role, _ in chat]
        (hidden, tools, more), spellings = self._hide([contents, tools, more])
        try:
            (text,) = render_chats(
                self._tokenizer, [list(zip(roles, hidden, strict=True))], now=now, tools=tools, more=more
            )
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses these messages ({error}): send messages as it takes them"
            ) from error
        ids: list[int] = []
        texts: list[PromptText] = []
        start, places = 0, _places(text, hidden)
        for match in (*self._encoder.pattern.finditer(text), None):
            stop = len(text) if match is None else match.start()
            if start < stop:
                first, shown = len(ids), _spelled(text[start:stop], spellings)
                ids += self._encoder.ids(shown, start > 0)
                inner = [
                    PlacedMessage(
                        each.number, len(_spelled(text[start : each.first], spellings)),
                        len(_spelled(text[start : each.stop], spellings)), each.skipped,
                    )
                    for each in places
                    if start <= each.first and each.stop <= stop
                ]  # fmt: skip
                texts.append(PromptText(shown, first, len(ids), tuple(inner)))
            if match is not None:
                ids.append(self._encoder.control[match.group()])
                start = match.end()
        return ids, texts

    def _hide(self, value: Any) -> tuple[Any, dict[str, str]]:
        """A JSON value with a stand-in for every control token's spelling, and what each stand-in stands for."""
        texts: list[str] = []
        _map_texts(value, lambda text: texts.append(text) or text)
        found = sorted({match.group() for text in texts for match in self._encoder.pattern.finditer(text)})
        if not found:
            return value, {}
        number = 0
        while any(f"\ufdd0{number}:" in text for text in texts):
            number += 1
        names = {spelling: f"\ufdd0{number}:{index}\ufdd1" for index, spelling in enumerate(found)}
        hidden = _map_texts(value, lambda text: self._encoder.pattern.sub(lambda match: names[match.group()], text))
        return hidden, {name: spelling for spelling, name in names.items()}


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, names of fields among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _map_texts(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(each, change) for each in value]
    return value


def _places(text: str, contents: Sequence[str]) -> list[PlacedMessage]:
    """The messages that are found in the text, one after the other."""
    found, start = [], 0
    for number, content in enumerate(contents):
        stripped = content.strip()
        for part in (content, stripped):
            if stripped and (place := text.find(part, start)) >= 0:
                start = place + len(part)
                found.append(PlacedMessage(number, place, start, content.find(part)))
                break
    return found


def _spelled(text: str, spellings: dict[str, str]) -> str:
    """The text with what its stand-ins stand for."""
    if not spellings:
        return text
    return re.sub("|".join(map(re.escape, spellings)), lambda match: spellings[match.group()], text)
