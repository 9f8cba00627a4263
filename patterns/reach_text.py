"""The text on which the method "reach" of `identify` measures: what it asks of heads, and where.

A stretch of the given text with a few facts hidden in it (a name and its number), then requests to repeat parts of the
stretch, with the parts as they should be repeated, then a question for each fact with its answer, as turns of a chat
where the model has a template for one. Three kinds of tokens are sampled: in the second half of the stretch (what
running text needs), in the parts (what copying needs), and in the numbers (what a fact from far back needs).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.errors import InputError
from longrun.needles.asked import AskedText
from longrun.needles.needles import KEY_DIGITS, Needle, make_needles
from longrun.patterns.identify_settings import FIRST_PROMPT, NEXT_PROMPT
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS, PART_SIZE, QUOTE_SIZE = 8, 64, 8
TEXT_ROWS = 512
FACTS = 8
MOST_ROWS = TEXT_ROWS + PARTS * PART_SIZE + FACTS * (KEY_DIGITS + 1)
"""Of one text, where a digit is a token at least."""


@dataclass(frozen=True)
class SampledText:
    """int64 token ids [T], and positions whose next tokens are sampled, ascending in each kind: in the stretch, where
    parts of it are repeated, and in the numbers of the facts."""

    ids: Tensor
    text_rows: Tensor
    repeat_rows: Tensor
    fact_rows: Tensor

    @property
    def kinds(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.text_rows, self.repeat_rows, self.fact_rows

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.kinds)


def sampled_text(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, length: int, draw: random.Random
) -> SampledText:
    """`length` tokens, from the first of `token_ids`; a short text has fewer than `FACTS` facts.

    Raises:
        InputError: no room for a stretch between the parts and one fact.
        CheckpointError: as `ChatFormat`.
    """
    encode, writer = TextEncoder(tokenizer).ids, AskedText(tokenizer)
    opening, first, following = writer.opening_ids(), encode(FIRST_PROMPT), encode(NEXT_PROMPT)
    facts, least = make_needles(FACTS, str(draw.random())), 4 * (PART_SIZE + QUOTE_SIZE)
    room = length - len(opening) - len(first) - PARTS * (len(following) + QUOTE_SIZE + PART_SIZE)
    for count in range(FACTS, 0, -1):
        hidden = [encode(f"\n{fact.sentence}\n") for fact in facts[:count]]
        questions, fact_rows = _questions(writer, draw.sample(facts[:count], count))
        stretch = room - sum(map(len, hidden)) - len(questions)
        if stretch >= least:
            break
    else:
        raise InputError(
            f"a context of {length:,} tokens leaves {max(0, stretch):,} beside {PARTS} repeated parts of {PART_SIZE} "
            f"and a fact: give at least {length - stretch + least:,}"
        )
    ids, own, before = [*opening], [False] * len(opening), 0  # own: what the stretch itself says next
    for number, fact in enumerate(hidden):
        place = (4 * number + 1) * stretch // (4 * count)  # a quarter of a part's distance before it
        ids += [*token_ids[before:place], *fact]
        own += [*[True] * (place - before - 1), *[False] * (len(fact) + 1)]
        before = place
    ids += token_ids[before:stretch]
    own += [True] * (stretch - before - 1)
    candidates = [row for row in range(len(ids) // 2, len(own)) if own[row]]
    ids += first
    repeat_rows: list[int] = []
    for part in range(PARTS):
        start = (2 * part + 1) * (stretch - PART_SIZE - QUOTE_SIZE) // (2 * PARTS)
        ids += [*following, *token_ids[start : start + QUOTE_SIZE]]
        repeat_rows += range(len(ids) - 1, len(ids) - 1 + PART_SIZE)
        ids += token_ids[start + QUOTE_SIZE : start + QUOTE_SIZE + PART_SIZE]
    fact_rows = [len(ids) + row for row in fact_rows]
    ids += questions
    text_rows = sorted(draw.sample(candidates, min(TEXT_ROWS, len(candidates))))
    return SampledText(torch.tensor(ids), torch.tensor(text_rows), torch.tensor(repeat_rows), torch.tensor(fact_rows))


def _questions(writer: AskedText, facts: Sequence[Needle]) -> tuple[list[int], list[int]]:
    """Ids of questions with their answers, behind a text; and where an answer's token comes next."""
    ids: list[int] = []
    rows: list[int] = []
    for fact in facts:
        question, answer = writer.asked(fact.question, fact.answer_prefix, fact.key, ids, first=not ids)
        ids += question
        rows += range(len(ids) - 1, len(ids) - 1 + len(answer))
        ids += answer
    return ids, rows
