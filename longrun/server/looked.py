"""Where the texts of a prompt stand, so that what an answer looked at has a name: messages, a document, its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from longrun.documents.parts import file_part
from longrun.server.document_prompts import SEPARATOR, numbers_with_document
from longrun.text.chat_prompt import PlacedMessage, PromptText
from longrun.text.places import char_ranges, place_in, shown_text

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.session.passages import Passage

_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True)
class Part:
    """A text that a client knows, within a message of the prompt.

    Attributes:
        first, stop: its characters [first, stop) of the message, with what is written between it and the part before.
        text: its own, which ends there.
        document: its name; message: its number in the request.
    """

    first: int
    stop: int
    text: str
    document: str | None = None
    message: int | None = None


class PromptSources:
    """Names passages of one prompt.

    Args:
        ids: the prompt's.
        texts: of the prompt.
        parts: of each message, in order.
        before: tokens from this position on are not shown: the question's.
    """

    def __init__(
        self, runtime: Runtime, ids: list[int], texts: Sequence[PromptText], parts: Sequence[Sequence[Part]],
        before: int,
    ) -> None:  # fmt: skip
        assert runtime.tokenizer is not None
        self._tokenizer, self._ids, self._texts, self._parts = runtime.tokenizer, ids, texts, parts
        self.before = before

    def told(self, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        """What a client is told of each passage: lines from 1; bytes in UTF-8 and tokens of the prompt, [first, stop).

        Of a passage that reaches into several texts the longest piece is told.
        """
        places: dict[int, dict[str, Any]] = {}
        for text in self._texts:
            own = [each for each in passages if _most(self._texts, each.first, each.stop) is text]
            ids = self._ids[text.first : text.stop]
            spans = [(max(each.first - text.first, 0), min(each.stop, text.stop) - text.first) for each in own]
            ranges = char_ranges(self._tokenizer, ids, text.text, spans) if own else []
            for each, found in zip(own, ranges or [None] * len(own), strict=True):
                places[each.first] = self._place(text, found)
        return [
            {"document": None, "file": None, "message": None, "lines": None, "bytes": None}
            | {"tokens": [each.first, each.stop], "share": round(each.share, 4)}
            | {"text": shown_text(self._tokenizer, self._ids[each.first : each.stop])}
            | places.get(each.first, {})
            for each in passages
        ]

    def _place(self, text: PromptText, found: tuple[int, int] | None) -> dict[str, Any]:
        """Names and place of characters of a text of the prompt; of none that are known, only the names, where the text
        holds a single part."""
        if found is None:
            within = [part for message in text.messages for part in self._parts[message.number]]
            return _names(within[0]) if len(within) == 1 else {}
        message = _most(text.messages, *found)
        if message is None:
            return {}
        begin, end = (min(max(at, message.first), message.stop) - message.first + message.skipped for at in found)
        part = _most(self._parts[message.number], begin, end)
        if part is None:
            return {}
        before = part.stop - len(part.text)
        place = place_in(None, part.text, max(begin - before, 0), min(max(end - before, 0), len(part.text)))
        assert place.lines is not None and place.bytes is not None
        told = _names(part) | {"lines": list(place.lines), "bytes": list(place.bytes), "text": place.shown}
        held = None if part.document is None else file_part(part.text, *place.bytes)
        if held is not None:
            told |= {"file": held.name, "lines": list(held.lines), "bytes": list(held.bytes)}
        return told


def chat_sources(
    runtime: Runtime, ids: list[int], texts: Sequence[PromptText], chat: Sequence[tuple[str, str]],
    document: tuple[str, str] | None,
) -> PromptSources:  # fmt: skip
    """The sources of a chat.

    Args:
        ids, texts: of the prompt.
        chat: (role, content) of each message of the request.
        document: name and text of the one that stands in it.
    """
    numbers = [[number] for number in range(len(chat))] if document is None else numbers_with_document(chat)
    parts = [_message_parts(held, chat, document) for held in numbers]
    last, (role, _) = parts[-1][-1], chat[-1]
    asked = last.stop
    if role == "user":
        asked -= len(last.text)
        asked += question_start(last.text, alone=len(chat) == 1) if document is None else 0
    return PromptSources(runtime, ids, texts, parts, _token_at(runtime, texts, len(parts) - 1, asked, len(ids)))


def text_sources(runtime: Runtime, ids: list[int], text: str) -> PromptSources:
    """The sources of a completion of a text."""
    texts = [PromptText(text, 0, len(ids), (PlacedMessage(0, 0, len(text), 0),))]
    asked = question_start(text, alone=True)
    return PromptSources(
        runtime, ids, texts, [[Part(0, len(text), text)]], _token_at(runtime, texts, 0, asked, len(ids))
    )


def question_start(text: str, alone: bool) -> int:
    """Where the question in a message begins: behind its last empty line, or else at its last line.

    Args:
        alone: there is nothing else that could be looked at: then a single line counts as a text without a question.
    """
    body = text.rstrip()
    found = max((match.end() for match in _EMPTY_LINE.finditer(body)), default=body.rfind("\n") + 1)
    return len(text) if alone and not found else found


def _message_parts(
    numbers: Sequence[int | None], chat: Sequence[tuple[str, str]], document: tuple[str, str] | None
) -> list[Part]:
    """The parts of a message of the prompt that holds these messages of the request; None is the document."""
    parts: list[Part] = []
    at = 0
    for number in numbers:
        first = parts[-1].stop if parts else 0
        if number is None:
            assert document is not None
            name, text = document
            parts.append(Part(first, at + len(text), text, document=name))
        else:
            text = chat[number][1]
            parts.append(Part(first, at + len(text), text, message=number))
        at += len(text) + len(SEPARATOR)
    return parts


def _token_at(runtime: Runtime, texts: Sequence[PromptText], number: int, char: int, most: int) -> int:
    """The token with which a character of a message begins; `most` where the template changed that message."""
    for text in texts:
        for message in text.messages:
            if message.number == number:
                place = min(max(message.first + char - message.skipped, message.first), message.stop)
                return max(text.first, text.stop - len(runtime.encode(text.text[place:], begins=False)))
    return most


class _Range(Protocol):
    @property
    def first(self) -> int: ...
    @property
    def stop(self) -> int: ...


Ranged = TypeVar("Ranged", bound=_Range)


def _most(ranges: Sequence[Ranged], first: int, stop: int) -> Ranged | None:
    """The one that holds the most of [first, stop), or of the place where that is empty; None where none does."""
    stop = max(stop, first + 1)

    def shared(each: Ranged) -> int:
        return min(each.stop, stop) - max(each.first, first)

    best = max(ranges, key=shared, default=None)
    return None if best is None or shared(best) <= 0 else best


def _names(part: Part) -> dict[str, Any]:
    return {"document": part.document, "message": part.message}
