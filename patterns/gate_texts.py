"""Texts for training gates: pass keys of random words hidden in a long text and asked for at its end.

Only a head that reaches back beyond its window can tell the model what to answer, so that the hidden states at the
answers show which heads those are (DuoAttention, arXiv 2410.10819, section 2.2).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longrun.errors import InputError
from longrun.needles.words import NAMES, SLOTS
from longrun.patterns.identify_settings import IdentifySettings
from longrun.text.encoder import TextEncoder, leading_ids

KEY = "The pass key of {name} is:"
QUESTION = "\n\nThe text ends here. These are the pass keys that were hidden in it.\n\n"
WORDS = tuple(word for slot in ("thing", "place", "person", "time", "idea") for word in SLOTS[slot])
NUM_LENGTHS = 50
SHALLOWEST, DEEPEST = 0.05, 0.95
FEWEST_WORDS, MOST_WORDS, TOKENS_A_WORD = 3, 32, 160
LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class GateText:
    """One training text.

    Attributes:
        token_ids: int64 [T], BOS included where the tokenizer writes one.
        label_ids: int64 [num_labels], the pass keys' tokens as they are repeated at the end.
        label_positions: int64 [num_labels], the positions whose hidden states predict them: one before each.
    """

    token_ids: Tensor
    label_ids: Tensor
    label_positions: Tensor


class GateTexts:
    """Draws the text of a step from (seed, step) alone.

    A text's length is one of 50 between min_context and context. Up to `num_keys` keys of 3 to 32 words (one for 160
    tokens) stand at random depths from 0.05 to 0.95 of a random stretch of the text, and are asked for in another
    order; there are fewer where keys and answers would take more than 0.6 of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, settings: IdentifySettings) -> None:
        """text_ids: int64 [num_tokens], at least `settings.context` of them."""
        if settings.num_keys > len(NAMES):
            raise InputError(f"num_keys {settings.num_keys} is above {len(NAMES)}, the names there are: give fewer")
        self._encode = TextEncoder(tokenizer).ids
        self._text = text_ids.tolist()
        self._settings = settings
        self._special = leading_ids(tokenizer)
        self._question = self._encode(QUESTION)

    def text(self, step: int) -> GateText:
        """The text of a step, exactly as long as drawn.

        Raises:
            InputError: not even one key fits into the length.
        """
        rng = random.Random(f"gates/{self._settings.seed}/{step}")
        low, high = self._settings.min_context, self._settings.context
        length = low + round((high - low) * rng.randrange(NUM_LENGTHS) / (NUM_LENGTHS - 1))
        num_words = min(max(length // TOKENS_A_WORD, FEWEST_WORDS), MOST_WORDS)
        names = rng.sample(NAMES, self._settings.num_keys)
        keys = {name: " ".join(rng.sample(WORDS, num_words)) for name in names}
        while True:
            hidden = [self._encode(f"\n\n{KEY.format(name=name)} {keys[name]}.\n\n") for name in names]
            asked = [self._answer(name, keys[name]) for name in names]
            fixed = len(self._special) + len(self._question) + sum(map(len, hidden))
            fixed += sum(len(ids) for ids, _, _ in asked)
            if fixed <= LARGEST_SHARE * length:
                break
            names = names[:-1]
            if not names:
                raise InputError(
                    f"a context of {length:,} tokens is too short for a pass key of {num_words} words, asked for once "
                    f"({fixed:,} tokens, at most {LARGEST_SHARE:.0%} of the context): give a longer --context"
                )
        rng.shuffle(asked)
        return self._assemble(rng, length - fixed, hidden, asked)

    def _assemble(
        self, rng: random.Random, body: int, hidden: Sequence[list[int]], asked: Sequence[tuple[list[int], int, int]]
    ) -> GateText:
        start = rng.randrange(len(self._text) - body + 1)
        places = sorted(round(body * rng.uniform(SHALLOWEST, DEEPEST)) for _ in hidden)
        ids, before = list(self._special), 0
        for place, key in zip(places, hidden, strict=True):
            ids += self._text[start + before : start + place] + key
            before = place
        ids += self._text[start + before : start + body] + self._question
        positions = []
        for line, first, stop in asked:
            positions += range(len(ids) + first - 1, len(ids) + stop - 1)
            ids += line
        token_ids, at = torch.tensor(ids), torch.tensor(positions)
        return GateText(token_ids, token_ids[at + 1], at)

    def _answer(self, name: str, key: str) -> tuple[list[int], int, int]:
        """(token ids of the answer's line, where the key's tokens start in it, and where they stop)."""
        head = KEY.format(name=name)
        asked, told, line = (self._encode(text) for text in (head, f"{head} {key}", f"{head} {key}.\n"))
        return line, _common(asked, line), _common(told, line)


def _common(head: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with: a tokenizer may merge the last ones of `head` with what follows."""
    return next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
