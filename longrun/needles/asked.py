"""Facts hidden in a text, and questions with their right answers behind them, as one sequence of token ids.

The model only has to predict what stands there: one forward pass tells of every answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrun.needles.needles import Needle
from longrun.text.chat_format import ChatFormat
from longrun.text.chat_template import has_template
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AskedText:
    """Writes with a tokenizer, and with its chat template where it has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._encoder, self._chat = tokenizer, TextEncoder(tokenizer), ChatFormat(tokenizer)

    def opening_ids(self) -> list[int]:
        """What stands before the text of the first message."""
        return self._chat.opening_ids(None, False) + self._chat.tail_ids(True)

    def hidden(self, ids: Sequence[int], needles: Sequence[Needle], rng: random.Random, mark: str = "# ") -> list[int]:
        """The ids with every needle behind a line's end (anywhere, where the tokenizer knows none), spread over them.

        Args:
            mark: stands before each needle's sentence.
        """
        inside = range(len(ids) * 3 // 100, len(ids) * 97 // 100)
        ends = [at for at in inside if self._tokenizer.decode([ids[at]]).endswith("\n")]
        if len(ends) < len(needles):
            ends = list(inside)
        found, before = [], 0
        for place, needle in zip(sorted(rng.sample(ends, len(needles))), needles, strict=True):
            found += [*ids[before : place + 1], *self._encoder.ids(f"{mark}{needle.sentence}\n", after_control=True)]
            before = place + 1
        return [*found, *ids[before:]]

    def asked(
        self, words: str, prefix: str, answer: str, before: Sequence[int], first: bool
    ) -> tuple[list[int], list[int]]:
        """Ids from `before` on, up to where the answer begins, and the answer's.

        Args:
            prefix: how the answer's sentence begins, given away; may be empty.
            first: the question goes on with the document's message; others have a message of their own.
        """
        chat, encoder = self._chat, self._encoder
        ids = [] if first else chat.opening_ids(before[-1], False)
        if has_template(self._tokenizer):
            asked = chat.text_ids([words], first, not first, True)[0]
            ids = [*ids, *asked, *chat.closing_ids(first)]
            if not prefix:
                return ids, encoder.ids(answer, after_control=True)
            begun, whole = (encoder.ids(text, after_control=True) for text in (prefix, f"{prefix} {answer}"))
            return [*ids, *begun], whole[len(begun) :]
        begun = f"Question: {words}\nAnswer:" if not prefix else f"{words}\n{prefix}"
        told, whole = (chat.text_ids([text], first, not first, False)[0] for text in (begun, f"{begun} {answer}"))
        return [*ids, *told], whole[len(told) :]
