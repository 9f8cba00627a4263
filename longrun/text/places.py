"""Where tokens stand in the texts that they were made from: lines and bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AROUND = 80  # characters shown on either side of a passage, within its lines
_MOST_SHOWN = 400
_LOST = "\ufffd"
_WORD = re.compile(r"\S+")


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
        lines: first and last line, from 1; None where the text is not known, or its tokens spell something else than it
            beside white space.
        bytes: [first, stop) of the text in UTF-8, without white space at its ends; None where lines are.
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
        return Place(None, None, None, shown_text(tokenizer, token_ids[first:stop]))
    first, stop = max(first, held.first), min(stop, held.stop)
    ids, span = token_ids[held.first : held.stop], (first - held.first, stop - held.first)
    found = None if held.text is None else char_ranges(tokenizer, ids, held.text, [span])
    if found is None or held.text is None:
        return Place(held.name, None, None, shown_text(tokenizer, token_ids[first:stop]))
    return place_in(held.name, held.text, *found[0])


def char_ranges(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, int]] | None:
    """Where tokens [first, stop) of each span stand in a text: characters [begin, end) without white space at its ends.

    Args:
        ids: tokens that end with the text; what stands before it may be anything.

    Returns:
        None where the tokens spell something else than the text beside white space.
    """
    known, whole = _without_space(text), _without_space(_decoded(tokenizer, ids))
    at, counts = whole.rfind(known) if known else -1, sorted({len(ids)}.union(*spans))
    offsets = dict(zip(counts, _offsets(tokenizer, ids, counts), strict=True))
    if at < 0 or offsets[len(ids)] != len(whole):
        return None
    within = [[min(max(0, offsets[place] - at), len(known)) for place in span] for span in spans]
    return [_range_of(text, begin, end) for begin, end in within]


def place_in(name: str | None, text: str, begin: int, end: int) -> Place:
    """The place of characters [begin, end) of a text of this name."""
    line = text.count("\n", 0, begin) + 1
    start = len(text[:begin].encode())
    around = text[_line_start(text, begin) : begin][-_AROUND:], text[end : _line_end(text, end)][:_AROUND]
    return Place(
        name, (line, line + text.count("\n", begin, end)),
        (start, start + len(text[begin:end].encode())), _shown(text[begin:end].join(around)),
    )  # fmt: skip


def shown_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What the tokens spell, in one line."""
    return _shown(_decoded(tokenizer, ids))


def _without_space(text: str) -> str:
    """Decoders differ in the white space they give back, and in nothing else."""
    return "".join(text.split())


def _range_of(text: str, begin: int, end: int) -> tuple[int, int]:
    """Where characters [begin, end) of the text without its white space stand in it; of none, where the next stands."""
    count, start = 0, None
    for match in _WORD.finditer(text):
        size = match.end() - match.start()
        if start is None and begin < count + size:
            start = match.start() + begin - count
        if start is not None and end <= count + size:
            return start, max(start, match.start() + end - count)
        count += size
    return (len(text), len(text)) if start is None else (start, len(text))


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


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], places: Sequence[int]) -> list[int]:
    """Characters but white space that the first tokens decode to, for each of some numbers of tokens in ascending
    order. A number that would cut a character in two counts without that character's tokens."""
    found, done, count = [], 0, 0
    for place in places:
        while done < place < len(ids) and _decoded(tokenizer, ids[max(done, place - 8) : place]).endswith(_LOST):
            place -= 1
        count += len(_without_space(_decoded(tokenizer, ids[done:place])))
        done = place
        found.append(count)
    return found
