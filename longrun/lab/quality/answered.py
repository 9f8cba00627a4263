"""Documents of real code with questions and their right answers behind them, to be predicted in one forward pass.

Whether an answer is kept is then a matter of the likeliest token at each of its places: a pass over the text judges all
its questions at once, where writing them takes a pass each. Stricter than a written answer: one that is right in other
words counts as wrong, for full attention too, and only what that has right is asked of others.
"""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.lab.quality.asked import CodeDocuments
from longrun.lab.quality.code_source import SourceFile
from longrun.needles.needles import Needle, make_needles
from longrun.text.chat_format import ChatFormat
from longrun.text.chat_template import has_template
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLES = "needle"
_TURN_TOKENS = 44  # of a question with its answer, about
_NEEDLE_TOKENS = 28
_QUESTIONS = 20  # of a document about code, at most


@dataclass(frozen=True)
class AnsweredText:
    """A text, and where its next tokens are looked at.

    Attributes:
        ids: int64 [T].
        text_rows: int64 [n], ascending positions of running code in the second half of the document.
        answers: for each question its task, and int64 [n] positions whose next tokens are its answer.
        document_length: tokens before the first question's words.
    """

    ids: Tensor
    text_rows: Tensor
    answers: tuple[tuple[str, Tensor], ...]
    document_length: int

    @property
    def answer_rows(self) -> Tensor:
        """int64, all answers' positions, ascending."""
        return torch.cat([rows for _, rows in self.answers])

    @property
    def rows(self) -> Tensor:
        return torch.cat((self.text_rows, self.answer_rows))

    def kept(self, likeliest: Tensor) -> list[bool]:
        """For each question whether every token of its answer is the likeliest.

        Args:
            likeliest: int64 [len(rows)], the token predicted at each of `rows`.
        """
        right = likeliest[len(self.text_rows) :] == self.ids[self.answer_rows + 1]
        return [part.all().item() for part in right.split([len(rows) for _, rows in self.answers])]


def answered_texts(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[SourceFile], length: int, count: int, seed: int,
    num_needles: int = 8, num_text_rows: int = 256,
) -> Iterator[AnsweredText]:  # fmt: skip
    """`count` texts of about `length` tokens and no more: a document of `CodeDocuments.code` with needles hidden in it
    as lines of their own, and all questions in an order that is drawn, answered one after another.

    Raises:
        InputError: as `CodeDocuments.code`.
    """
    room = length - (_QUESTIONS + num_needles) * _TURN_TOKENS
    documents = CodeDocuments(tokenizer, files)
    for number, document in enumerate(documents.code(max(room, length // 2), count, seed)):
        asked = [(q.task, q.text, "", q.expected) for q in document.questions]
        rng = random.Random(f"answered/{seed}/{length}/{number}")
        needles = make_needles(num_needles, f"{seed}/{number}")
        yield _Writer(tokenizer).answered(document.token_ids, asked, needles, rng, length, num_text_rows)


def answered_prose(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, num_needles: int = 16,
    num_text_rows: int = 256,
) -> Iterator[AnsweredText]:  # fmt: skip
    """`count` texts of about `length` tokens and no more: topics of Python's language reference in an order that is
    drawn, with needles hidden in them, and the questions for those. Shorter where the reference is."""
    chat = ChatFormat(tokenizer)
    for number in range(count):
        rng = random.Random(f"answered prose/{seed}/{length}/{number}")
        topics = sorted(pydoc_data.topics.topics.values())
        ids = chat.opening_ids(None, False)
        ids += chat.text_ids(["\n\n".join(rng.sample(topics, len(topics)))], True, True, False)[0]
        ids = ids[: max(length - num_needles * (_TURN_TOKENS + _NEEDLE_TOKENS), length // 2)]
        needles = make_needles(num_needles, f"prose/{seed}/{number}")
        yield _Writer(tokenizer).answered(ids, [], needles, rng, length, num_text_rows)


class _Writer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._encoder, self._chat = tokenizer, TextEncoder(tokenizer), ChatFormat(tokenizer)

    def answered(
        self, ids: Sequence[int], asked: Sequence[tuple[str, str, str, str]], needles: Sequence[Needle],
        rng: random.Random, length: int, num_text_rows: int,
    ) -> AnsweredText:  # fmt: skip
        """A document with needles hidden in it, and all questions that `length` tokens hold, in an order that is drawn.

        Args:
            asked: of each question but the needles' its task, words, how the answer begins, and the answer.
        """
        ids = self.hidden(ids, needles, rng)
        every = [*asked, *((NEEDLES, n.question, n.answer_prefix, n.key) for n in needles)]
        rng.shuffle(every)
        begin, answers = len(ids), []
        for task, words, prefix, answer in every:
            question, answer_ids = self.asked(words, prefix, answer, ids, first=not answers)
            if len(ids) + len(question) + len(answer_ids) > length:
                continue
            ids += question
            answers.append((task, torch.arange(len(ids) - 1, len(ids) - 1 + len(answer_ids))))
            ids += answer_ids
        drawn = rng.sample(range(begin // 2, begin - 1), min(num_text_rows, begin - 1 - begin // 2))
        return AnsweredText(torch.tensor(ids), torch.tensor(sorted(drawn)), tuple(answers), begin)

    def hidden(self, ids: Sequence[int], needles: Sequence[Needle], rng: random.Random) -> list[int]:
        """The document's ids with every needle behind a line's end (anywhere, where the tokenizer knows none), spread
        over it."""
        inside = range(len(ids) * 3 // 100, len(ids) * 97 // 100)
        ends = [at for at in inside if self._tokenizer.decode([ids[at]]).endswith("\n")] or inside
        found, before = [], 0
        for place, needle in zip(sorted(rng.sample(ends, len(needles))), needles, strict=True):
            found += [*ids[before : place + 1], *self._encoder.ids(f"# {needle.sentence}\n", after_control=True)]
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
