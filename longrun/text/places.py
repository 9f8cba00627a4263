"""Where tokens stand in the texts that they were made from: lines and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 80  # characters shown on either side of a passage, within its lines
_MOST_SHOWN = 400
_LOST = "\ufffd"


@dataclass(frozen=True)
class TextSource:
    """A text that was read.

    Attributes:
        name: of the text.
        text: None where it is not known any more.
        first, stop: tokens [first, stop) of the sequence end with it; what stands before it may be anything.
    """

    name: str
    text: str | None
    first: int
    stop: int


@dataclass(frozen=True)
class Place:
    """A part of a text.

    Attributes:
        name: of the text; None where the tokens belong to none of them.
        lines: first and last line, from 1; None where the text is not known, or not what its tokens spell.
        bytes: [first, stop) of the text in UTF-8; None where lines are.
        shown: the part with what stands around it in its lines, in one line.
    """

    name: str | None
    lines: tuple[int, int] | None
    bytes: tuple[int, int] | None
    shown: str


def place_of(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], sources: Sequence[TextSource], first: int, stop: int
) -> Place:
    """The place of tokens [first, stop): in the source that holds most of them.

    Args:
        token_ids: of the whole sequence, as the sources' positions count them.
    """
    held = max(sources, key=lambda source: min(stop, source.stop) - max(first, source.first), default=None)
    if held is None or min(stop, held.stop) <= max(first, held.first):
        return Place(None, None, None, _shown(_decoded(tokenizer, token_ids[first:stop])))
    first, stop = max(first, held.first), min(stop, held.stop)
    ids = token_ids[held.first : held.stop]
    whole = _decoded(tokenizer, ids)
    at = -1 if held.text is None else whole.rfind(held.text)
    begin, end, length = _offsets(tokenizer, ids, (first - held.first, stop - held.first, len(ids)))
    if at < 0 or held.text is None or length != len(whole):
        return Place(held.name, None, None, _shown(_decoded(tokenizer, token_ids[first:stop])))
    text = held.text
    begin, end = (min(max(0, place - at), len(text)) for place in (begin, end))
    lines = text.count("\n", 0, begin) + 1, text.count("\n", 0, max(begin, end - 1)) + 1
    start = len(text[:begin].encode())
    around = text[_line_start(text, begin) : begin][-_AROUND:], text[end : _line_end(text, end)][:_AROUND]
    return Place(held.name, lines, (start, start + len(text[begin:end].encode())), _shown(text[begin:end].join(around)))


def _line_start(text: str, place: int) -> int:
    return text.rfind("\n", 0, place) + 1


def _line_end(text: str, place: int) -> int:
    if place and text[place - 1] == "\n":
        return place
    found = text.find("\n", place)
    return len(text) if found < 0 else found


def _shown(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _MOST_SHOWN else one_line[: _MOST_SHOWN - 4] + " ..."


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: int) -> Sequence[int]:
    """The fewest tokens before `stop` that begin and end with a character."""
    for start in range(stop - 1, max(0, stop - 8) - 1, -1):
        if _LOST not in _decoded(tokenizer, ids[start:stop]):
            return ids[start:stop]
    return ids[:0]


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], places: Sequence[int]) -> list[int]:
    """Characters that the first tokens decode to, for each of some numbers of tokens in ascending order.

    A number that would cut a character in two counts without that character's tokens.
    """
    found, done, count = [], 0, 0
    for place in places:
        while done < place < len(ids) and _decoded(tokenizer, ids[max(done, place - 8) : place]).endswith(_LOST):
            place -= 1
        before = _whole_characters(tokenizer, ids, done)  # some tokenizers drop the space that a text begins with
        count += len(_decoded(tokenizer, [*before, *ids[done:place]])) - len(_decoded(tokenizer, before))
        done = place
        found.append(count)
    return found
