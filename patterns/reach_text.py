"""The text on which the method "reach" of `identify` measures: what it asks of heads, and where.

A stretch of the given text with a few facts hidden in it (a name and its number), then requests to repeat parts of the
stretch, with the parts as they should be repeated, then each fact once more, asked for by its name. Three kinds of
tokens are sampled: in the second half of the stretch (what running text needs), in the parts (what copying needs), and
in the numbers (what a fact from far back needs).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from longrun.errors import InputError
from longrun.needles.needles import KEY_DIGITS, Needle, make_needles
from longrun.patterns.identify_settings import FIRST_PROMPT, NEXT_PROMPT

PARTS, PART_SIZE, QUOTE_SIZE = 8, 64, 8
TEXT_ROWS = 512
FACTS = 8
MOST_ROWS = TEXT_ROWS + PARTS * PART_SIZE + FACTS * (KEY_DIGITS + 1)
"""Of one text, where a digit is a token at least."""

Encode = Callable[[str], list[int]]


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


def sampled_text(token_ids: Sequence[int], encode: Encode, length: int, draw: random.Random) -> SampledText:
    """`length` tokens in all, from the first of `token_ids`; a short text has fewer than `FACTS` facts.

    Raises:
        InputError: no room for a stretch between the parts and one fact.
    """
    first, following = encode(FIRST_PROMPT), encode(NEXT_PROMPT)
    facts = make_needles(FACTS, str(draw.random()))
    hidden = [encode(f"\n{fact.sentence}\n") for fact in facts]
    asked = [_asked(fact, encode) for fact in facts]
    stretch = length - len(first) - PARTS * (len(following) + QUOTE_SIZE + PART_SIZE)
    sizes = list(accumulate(len(fact) + len(ids) for fact, (ids, _) in zip(hidden, asked, strict=True)))
    least = 4 * (PART_SIZE + QUOTE_SIZE)
    count = sum(stretch - size >= least for size in sizes)
    if not count:
        raise InputError(
            f"a context of {length:,} tokens leaves {max(0, stretch):,} beside {PARTS} repeated parts of {PART_SIZE}: "
            f"give at least {length - stretch + sizes[0] + least:,}"
        )
    stretch -= sizes[count - 1]
    ids, own = [], []  # of `own`, whether the stretch says what comes next
    for number, fact in enumerate(hidden[:count]):
        begin, end = (stretch * n // count for n in (number, number + 1))
        middle = (begin + end) // 2
        ids += [*token_ids[begin:middle], *fact, *token_ids[middle:end]]
        own += [*[True] * (middle - begin - 1), *[False] * (len(fact) + 1), *[True] * (end - middle)]
    ids += first
    repeat_rows, fact_rows = [], []
    for part in range(PARTS):
        start = (2 * part + 1) * (stretch - PART_SIZE - QUOTE_SIZE) // (2 * PARTS)
        ids += [*following, *token_ids[start : start + QUOTE_SIZE]]
        repeat_rows += range(len(ids) - 1, len(ids) - 1 + PART_SIZE)
        ids += token_ids[start + QUOTE_SIZE : start + QUOTE_SIZE + PART_SIZE]
    for question, begin in draw.sample(asked[:count], count):
        fact_rows += range(len(ids) + begin - 1, len(ids) + len(question) - 1)
        ids += question
    candidates = [row for row in range(len(own) // 2, len(own) - 1) if own[row]]
    text_rows = sorted(draw.sample(candidates, min(TEXT_ROWS, len(candidates))))
    return SampledText(torch.tensor(ids), torch.tensor(text_rows), torch.tensor(repeat_rows), torch.tensor(fact_rows))


def _asked(fact: Needle, encode: Encode) -> tuple[list[int], int]:
    """Ids that ask for a fact, with the answer, and how many of them stand before the number."""
    begun = f"\n\n{fact.answer_prefix}"
    ids = encode(f"{begun} {fact.key}")
    same = takewhile(lambda pair: pair[0] == pair[1], zip(encode(begun), ids, strict=False))
    return ids, sum(1 for _ in same)
