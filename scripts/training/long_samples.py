"""Training samples: real text with many competing facts or long lists in it, and questions about them at the end.

Everything is drawn from `random.Random(seed and index)`, so that a sample is the same in every process. Some samples
have one to eight facts, some lists of rows, most as many facts of a few forms as the length takes; of many facts or
rows only some are asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longrun.errors import InputError
from longrun.lab import long_words as words
from longrun.lab.long_tasks import Corpus, Fact, TaskWriter
from scripts.training.long_facts import FactList, TrainDraw

_MAX_SHARE = 0.55  # of a sample's tokens that facts, questions and answers may take together
_KINDS = ("sparse", "dense", "rows")
_KIND_WEIGHTS, _LONG_KIND_WEIGHTS = (20, 55, 25), (8, 62, 30)
_TOKENS_A_FACT, _MOST_FACTS = 90, 320  # stated in a dense sample: at most so many
_TOKENS_A_QUESTION, _MOST_QUESTIONS = 170, 240
_MOST_ROWS = 1500
_FEW_ASKED, _LONG_FEW_ASKED = 0.25, 0.1  # dense samples and lists of which one to four facts are asked
_LONG = 32_768  # tokens of a sample from which reading is expensive, and few questions a waste
_LINE_JOINTS = 8  # places in a list where positions may jump


@dataclass(frozen=True)
class AnswerWeights:
    """What the tokens of an answer weigh in the loss.

    Attributes:
        first: the first token of a value that is not a space, and a space before it: here the fact has to be found.
        rest: the other tokens of the value. around: the words before and after it and the end of the turn.
        first_turn: what all these are multiplied by in the first answer, which no other answer precedes.
    """

    first: float = 3.0
    rest: float = 1.0
    around: float = 0.15
    first_turn: float = 2.0


@dataclass(frozen=True)
class Sample:
    """A training sample.

    Attributes:
        token_ids: all of it, at most the length asked for.
        weights: what each token weighs in the loss, 0 where it is none of an answer.
        values: (start, first, stop) of every value asked: `first` is its first token that is not a space.
        joints: where positions may jump, in order: before facts and lines, and at last before the questions.
        forms: names of the forms asked, in the order of the questions.
    """

    token_ids: list[int]
    weights: list[float]
    values: tuple[tuple[int, int, int], ...]
    joints: tuple[int, ...]
    forms: tuple[str, ...]


@dataclass
class _Turn:
    form: str
    token_ids: list[int]
    weights: list[float]
    value: tuple[int, int, int] | None  # as in `Sample`, from the turn's beginning


class SampleWriter(TaskWriter):
    """Writes training samples for one tokenizer."""

    def __init__(self, tokenizer, weights: AnswerWeights | None = None) -> None:
        super().__init__(tokenizer)
        self._weights = weights or AnswerWeights()
        # An answer ends with the first token of what follows it; with a template that is the end-of-turn token.
        self._closing = self.encode(self.next)[:1]
        self._texts: dict[int, str] = {}

    def training_sample(self, corpus: Corpus, seed: int | str, index: int, length: int) -> Sample:
        """Sample `index` of `seed`: at most `length` tokens, and as near to it as whole answers allow.

        Raises:
            InputError: the length is too short for a single fact.
        """
        rng = random.Random(f"long task/{seed}/{index}/{length}")
        head = self.encode(self.head + rng.choice(words.INTRODUCTIONS))
        limit = max(int(_MAX_SHARE * length), min(length, 200)) - len(head) - 8
        kind = (
            rng.choices(_KINDS, _LONG_KIND_WEIGHTS if length >= _LONG else _KIND_WEIGHTS)[0]
            if length >= 1024
            else "dense"
        )
        lists: list[FactList] = []
        facts: list[Fact] = []
        if kind == "rows":
            lists, blocks, asked = self._lists(rng, length, limit)
        else:
            facts, asked = self._facts(rng, length, limit, sparse=kind == "sparse")
            blocks = []
        turns = [self._turn(rng, fact) for fact in asked]
        quotes = rng.choice((0, 1, 2, 2)) if length >= 1024 else 0
        leads = self.encode("\n\n"), self.encode(self.next)[1:]
        stated = sum(len(self.encode(text)) + 2 for fact in facts for text in fact.statements) + sum(map(len, blocks))
        told = sum(len(turn.token_ids) + len(leads[1]) for turn in turns) + len(leads[0])
        room = length - len(head) - stated - told - quotes * 120
        if not turns or room < 16:
            raise InputError(f"samples of {length} tokens are too short for a fact: ask for at least 256")
        filler = corpus.stretch(rng, room)
        inserts: list[tuple[int, list[int], tuple[int, ...]]] = []
        for fact in facts:
            places = sorted(self.boundary(filler, rng.randrange(len(filler))) for _ in fact.statements)
            for place, text in zip(places, fact.statements, strict=True):
                inserts.append((place, self.statement_ids(text, filler, place), (0,)))
        for one, block in zip(lists, blocks, strict=True):
            inserts.append(
                (self.boundary(filler, rng.randrange(len(filler))), block, self._line_starts(rng, one, block))
            )
        for _ in range(quotes):
            turn = self._quote(rng, filler, [place for place, _, _ in inserts])
            if turn is not None:
                turns.append(turn)
        inserts.sort(key=lambda one: one[0])
        ids = head + self.weave(filler, [(place, extra) for place, extra, _ in inserts])
        joints, before = [], len(head)
        for place, extra, starts in inserts:
            joints += [before + place + start for start in starts]
            before += len(extra)
        joints.append(len(ids))
        rng.shuffle(turns)
        return self._asked(ids, turns, leads, joints, length)

    def _asked(
        self, ids: list[int], turns: list[_Turn], leads: tuple[list[int], list[int]], joints: list[int], length: int
    ) -> Sample:
        """The document with the questions that still fit."""
        weights, values, forms = [0.0] * len(ids), [], []
        for turn in turns:
            lead = leads[1] if forms else leads[0]
            if len(ids) + len(lead) + len(turn.token_ids) > length:
                continue
            factor = 1.0 if forms else self._weights.first_turn
            weights += [0.0] * len(lead) + [factor * weight for weight in turn.weights]
            ids += lead
            if turn.value is not None:
                start, first, stop = turn.value
                values.append((len(ids) + start, len(ids) + first, len(ids) + stop))
            ids += turn.token_ids
            forms.append(turn.form)
        return Sample(ids, weights, tuple(values), tuple(sorted(set(joints))), tuple(forms))

    def _facts(self, rng: random.Random, length: int, limit: int, sparse: bool) -> tuple[list[Fact], list[Fact]]:
        """What is stated, and what of it is asked, in at most `limit` tokens."""
        most = max(4, min(_MOST_FACTS, length // _TOKENS_A_FACT))
        count = rng.randint(1, 8) if sparse else max(2, int(most * rng.uniform(0.35, 1.0)))
        to_ask = min(count, max(4, min(_MOST_QUESTIONS, length // _TOKENS_A_QUESTION)))
        if not sparse and _asks_few(rng, length):
            to_ask = rng.randint(1, min(4, to_ask))
        drawn = TrainDraw(rng, count)
        facts: list[Fact] = []
        asked: list[Fact] = []
        used = 0
        for _ in range(count):
            fact = drawn.fact()
            cost = sum(len(self.encode(text)) + 2 for text in fact.statements)
            turn = self._cost(fact) if len(asked) < to_ask else 0
            if used + cost + turn > limit:
                break
            used += cost + turn
            facts.append(fact)
            if turn:
                asked.append(fact)
        return facts, asked

    def _lists(self, rng: random.Random, length: int, limit: int) -> tuple[list[FactList], list[list[int]], list[Fact]]:
        """One to three lists, their token ids, and what is asked of them."""
        to_ask = (
            rng.randint(1, 4) if _asks_few(rng, length) else max(4, min(_MOST_QUESTIONS, length // _TOKENS_A_QUESTION))
        )
        share = 0.95 * length - 200 - to_ask * 50 - 260  # tokens that may be lists: less questions, quotes, filler
        number = rng.choice((1, 1, 2, 3))
        drawn = TrainDraw(rng, min(_MOST_ROWS, length // 14))
        lists, blocks = [], []
        for _ in range(number):
            tokens = int(0.9 * share / number * rng.uniform(0.15, 1.0))
            made = drawn.rows(tokens, _MOST_ROWS // number, self.encode)
            lists.append(made)
            blocks.append(self.encode("\n" + made.text))
        facts = [fact for made in lists for fact in made.facts]
        asked, used = [], 0
        for fact in rng.sample(facts, min(to_ask, len(facts))):
            used += self._cost(fact)
            if used > max(limit, 0) or used + sum(map(len, blocks)) > length - 300:
                break
            asked.append(fact)
        return lists, blocks, asked

    def _line_starts(self, rng: random.Random, made: FactList, block: list[int]) -> tuple[int, ...]:
        """The block's beginning and a few beginnings of its lines, in order."""
        if not made.whole_lines:
            return (0,)
        newline = [number + 1 for number, token in enumerate(block[:-1]) if "\n" in self._text(token)]
        return (0, *sorted(rng.sample(newline, min(_LINE_JOINTS, len(newline)))))

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def _cost(self, fact: Fact) -> int:
        """Tokens of a fact's question and answer, or a few more."""
        return len(self.encode(fact.question + self.ask + fact.before + fact.value + fact.after)) + 14

    def _turn(self, rng: random.Random, fact: Fact) -> _Turn:
        """Question, answer and the end of the answer, with the weights of the answer's tokens."""
        asked = self.encode(rng.choice(words.QUESTION_LEADS) + fact.question + self.ask)
        told = self.tokenizer(
            fact.before + fact.value + fact.after, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        answer, spans = told["input_ids"], told["offset_mapping"]
        begins, ends = len(fact.before), len(fact.before) + len(fact.value)
        inside = [number for number, (begin, end) in enumerate(spans) if end > begins and begin < ends and end > begin]
        first, stop = inside[0], inside[-1] + 1
        start = first - 1 if first and not self._text(answer[first - 1]).strip() else first
        own = self._weights
        weights = [own.around] * start + [own.first] * (first + 1 - start) + [own.rest] * (stop - first - 1)
        weights += [own.around] * (len(answer) - stop + len(self._closing))
        value = len(asked) + start, len(asked) + first, len(asked) + stop
        return _Turn(fact.form, asked + answer + self._closing, [0.0] * len(asked) + weights, value)

    def _quote(self, rng: random.Random, filler: list[int], inserts: list[int]) -> _Turn | None:
        """Ask for a passage by its beginning; None where it could not be told from another or does not read back."""
        start = self.boundary(filler, rng.randrange(max(1, len(filler) - 100)))
        passage = filler[start : start + rng.randint(24, 60)]
        if any(start < place < start + len(passage) for place in inserts):
            return None
        beginning = self.tokenizer.decode(passage[:8]).strip()
        if len(passage) < 24 or '"' in beginning or "\n" in beginning or len(beginning) < 12:
            return None
        if sum(filler[i : i + 8] == passage[:8] for i in range(len(filler)) if filler[i] == passage[0]) != 1:
            return None
        asked = self.encode(rng.choice(words.QUOTE_QUESTIONS).format(start=beginning) + self.ask)
        answer = self.encode(self.tokenizer.decode(passage).strip())
        own = self._weights
        known = min(8, len(answer))  # stands in the question
        weights = [own.around] * known + [own.rest] * (len(answer) - known) + [own.around] * len(self._closing)
        return _Turn("quote", asked + answer + self._closing, [0.0] * len(asked) + weights, None)


def _asks_few(rng: random.Random, length: int) -> bool:
    return rng.random() < (_LONG_FEW_ASKED if length >= _LONG else _FEW_ASKED)
