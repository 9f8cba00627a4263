"""Held-out tests of reading long texts: real text with facts hidden in it, asked back at the end.

Everything is drawn from `random.Random(seed)`, so that a test is the same everywhere. Filler stays in token ids, as the
corpus stores it; facts are put between lines or sentences of it. Questions and answers follow in the turns of the
model's chat template. The training samples of scripts/training/long_samples.py are written with the same parts.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longrun.errors import InputError
from longrun.files.user_files import RESULTS_BYTES, read_object
from longrun.lab import long_words as words
from longrun.text.chat_template import has_template, render_chats
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = ("<<first>>", "<<second>>", "<<third>>")
_SEARCH = 96  # tokens looked through for the end of a line or sentence
_KIND_WEIGHTS = {"prose": 50, "docs": 32, "code": 18}
_HOP = 0.3  # how often the filler goes on at another place of the corpus when a document ends


@dataclass(frozen=True)
class Corpus:
    """One split of the tokenized texts.

    Attributes:
        tokens: uint16 (or wider) [num_tokens], document after document.
        ends: int64 [num_documents], where each document ends in `tokens`.
        kinds: what each document is: prose, docs or code.
    """

    tokens: np.ndarray
    ends: np.ndarray
    kinds: tuple[str, ...]

    @classmethod
    def read(cls, folder: str | Path, split: str) -> Corpus:
        """The split `train` or `held_out` that make_long_data.py wrote to `folder`.

        Raises:
            InputError: no such files, or they contradict each other.
        """
        folder = Path(folder)
        try:
            head = read_object(folder / "corpus.json", InputError, "make it again", RESULTS_BYTES)[split]
            data = lzma.decompress((folder / f"{split}.tokens.xz").read_bytes())
        except (InputError, OSError, ValueError, KeyError, lzma.LZMAError) as error:
            raise InputError(f"{folder} holds no readable corpus ({error}): make it with make_long_data.py") from error
        tokens = np.frombuffer(data, dtype="<u2")
        lengths, kinds = head["lengths"], head["kinds"]
        if sum(lengths) != len(tokens) or len(kinds) != len(lengths):
            raise InputError(f"{folder}: corpus.json and {split}.tokens.xz do not belong together: make them again")
        return cls(tokens, np.cumsum(lengths), tuple(kinds))

    @classmethod
    def of_texts(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], kind: str = "prose") -> Corpus:
        """A corpus in memory, each text a document."""
        ids = [TextEncoder(tokenizer).ids(text) for text in texts]
        ends = np.cumsum([len(one) for one in ids])
        return cls(np.asarray([token for one in ids for token in one], dtype=np.uint16), ends, (kind,) * len(ids))

    def documents(self, kind: str | None = None) -> Iterator[np.ndarray]:
        """The documents' token ids, in their order."""
        start = 0
        for end, its_kind in zip(self.ends, self.kinds, strict=True):
            if kind in (None, its_kind):
                yield self.tokens[start:end]
            start = int(end)

    @cached_property
    def _by_kind(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Kind -> (start of each of its documents, running sum of their lengths)."""
        starts = np.concatenate(([0], self.ends[:-1]))
        kinds = np.asarray(self.kinds)
        return {
            kind: (starts[kinds == kind], np.cumsum((self.ends - starts)[kinds == kind])) for kind in set(self.kinds)
        }

    def _place(self, rng: random.Random) -> int:
        """A random token: of prose, documentation and code by `_KIND_WEIGHTS`, within a kind each as likely."""
        kinds = sorted(self._by_kind)
        starts, sums = self._by_kind[rng.choices(kinds, [_KIND_WEIGHTS[kind] for kind in kinds])[0]]
        drawn = rng.randrange(int(sums[-1]))
        document = int(np.searchsorted(sums, drawn, side="right"))
        return int(starts[document]) + drawn - (int(sums[document - 1]) if document else 0)

    def stretch(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens from a random place on; at a document's end often on at another place."""
        found: list[int] = []
        place = self._place(rng)
        while len(found) < length:
            end = int(self.ends[np.searchsorted(self.ends, place, side="right")])
            found += self.tokens[place : min(end, place + length - len(found))].tolist()
            place = end if end < len(self.tokens) and rng.random() > _HOP else self._place(rng)
        return found


@dataclass(frozen=True)
class TestQuestion:
    """`document + token_ids + value_ids` is what a right answer reads like; `token_ids` ends before the value."""

    form: str
    depth: float
    token_ids: tuple[int, ...]
    value_ids: tuple[int, ...]
    subject: str
    value: str


@dataclass(frozen=True)
class TestDocument:
    """A held-out text with held-out facts at given depths, and the questions after it."""

    token_ids: list[int]
    questions: tuple[TestQuestion, ...]


@dataclass
class Fact:
    """Statements to hide (in this order of the text) and one question with its answer, split before the value."""

    form: str
    statements: list[str]
    question: str
    before: str
    value: str
    after: str = ""
    subject: str = ""


class TaskWriter:
    """Writes test documents for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        roles = ("user", "assistant", "user")
        if has_template(tokenizer):
            (text,) = render_chats(tokenizer, [list(zip(roles, _MARKS, strict=True))])
        else:
            text = f"{_MARKS[0]}\nAnswer: {_MARKS[1]}\n\n{_MARKS[2]}\nAnswer: "
        self.head, rest = text.split(_MARKS[0])
        self.ask, rest = rest.split(_MARKS[1])
        self.next, self.last = rest.split(_MARKS[2])
        assert self.last == self.ask or not self.ask
        self._ends: dict[int, bool] = {}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def ends_line(self, token: int) -> bool:
        if token not in self._ends:
            text = self.tokenizer.decode([token])
            self._ends[token] = text.endswith(("\n", ".", "!", "?")) or "\n" in text
        return self._ends[token]

    def boundary(self, filler: Sequence[int], near: int) -> int:
        """The nearest place at or after `near` where a line or sentence ends, if there is one close by."""
        for place in range(max(1, near), min(len(filler), near + _SEARCH)):
            if self.ends_line(filler[place - 1]):
                return place
        return min(near, len(filler))

    def weave(self, filler: list[int], inserts: list[tuple[int, list[int]]]) -> list[int]:
        """`filler` with each (place, ids) put in, in the order of the places."""
        ids: list[int] = []
        done = 0
        for place, extra in sorted(inserts, key=lambda one: one[0]):
            ids += filler[done:place] + extra
            done = place
        return ids + filler[done:]

    def statement_ids(self, statement: str, filler: Sequence[int], place: int) -> list[int]:
        line_end = place > 0 and "\n" in self.tokenizer.decode([filler[place - 1]])
        return self.encode(f"{statement}\n" if line_end else f" {statement}")

    def test_document(
        self, corpus: Corpus, seed: int | str, length: int, depths: Sequence[float], per_depth: int = 1,
        forms: Sequence[words.Form] = words.TEST_FORMS, first_form: int = 0,
    ) -> TestDocument:  # fmt: skip
        """A held-out text of at most `length` tokens (questions included) with `per_depth` facts around every depth.

        The facts have the forms in turn, beginning with the one of number `first_form`.

        Give it the held-out split: forms, names and text are then all new to a trained model.

        Raises:
            InputError: the length is too short for so many facts.
        """
        rng = random.Random(f"long test/{seed}/{length}")
        drawn = Draw(rng, words.TEST_NAMES)
        head = self.encode(self.head + words.TEST_INTRODUCTION)
        facts = [
            (depth, drawn.of_form(forms[(first_form + number * len(depths) + at) % len(forms)]))
            for number in range(per_depth)
            for at, depth in enumerate(depths)
        ]
        turns = [self._split_turn(fact) for _, fact in facts]
        longest = max(len(asked) + len(value) for asked, value in turns)
        stated = sum(len(self.encode(fact.statements[0])) + 2 for _, fact in facts)
        room = length - len(head) - stated - longest - 8
        if room < 32:
            raise InputError(f"test documents of {length} tokens are too short for {len(facts)} facts")
        filler = corpus.stretch(rng, room)
        inserts = []
        for depth, fact in facts:
            near = int(depth * (room - 1)) + (rng.randint(-room // 100, room // 100) if 0 < depth < 1 else 0)
            place = 0 if depth == 0 else room if depth == 1 else self.boundary(filler, max(0, min(near, room - 1)))
            inserts.append((place, self.statement_ids(fact.statements[0], filler, place)))
        ids = head + self.weave(filler, inserts) + self.encode("\n\n")
        return TestDocument(
            ids,
            tuple(
                TestQuestion(fact.form, depth, tuple(asked), tuple(value), fact.subject, fact.value)
                for (depth, fact), (asked, value) in zip(facts, turns, strict=True)
            ),
        )

    def _split_turn(self, fact: Fact) -> tuple[list[int], list[int]]:
        """Ids up to the value of the answer, and the value's; an answer's space before the value goes with it."""
        before = fact.before.rstrip(" ")
        asked = self.encode(fact.question + self.ask + before)
        told = self.encode(fact.question + self.ask + before + fact.before[len(before) :] + fact.value)
        if told[: len(asked)] != asked:
            told = asked + self.encode(fact.before[len(before) :] + fact.value)
        return asked, told[len(asked) :]


class Draw:
    """Draws subjects and values, no subject and no number twice in a sample."""

    def __init__(self, rng: random.Random, names: Sequence[str]) -> None:
        self._rng = rng
        self._names = names
        self._taken: set[str] = set()

    def of_form(self, form: words.Form) -> Fact:
        rng = self._rng
        subject, fields = self._subject(form.subject)
        value = self._value(form.value)
        statement, question, answer = rng.choice(form.statements), rng.choice(form.questions), rng.choice(form.answers)
        before, _, after = answer.partition("{value}")
        return Fact(
            form.name, [statement.format(value=value, **fields)], question.format(**fields),
            before.format(**fields), value, after.format(**fields), subject,
        )  # fmt: skip

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            made = make()
            if made not in self._taken:
                self._taken.add(made)
                return made

    def _person(self) -> str:
        """A first name, or first and last; never two people of one first name."""
        name = self._rng.choice([name for name in self._names if name not in self._taken])
        self._taken.add(name)
        return f"{name} {self._rng.choice(words.SURNAMES)}" if self._rng.random() < 0.4 else f"{name}"

    def _subject(self, kind: str) -> tuple[str, dict[str, Any]]:
        if kind == "person and thing":
            person, thing = self._one("person"), self._rng.choice(words.THINGS)
            return f"{person}, {thing}", {"subject_0": person, "subject_1": thing}
        subject = self._one(kind)
        return subject, {"subject": subject}

    def _one(self, kind: str) -> str:
        if kind == "person":
            return self._person()
        makers = {
            "place name": self._place_name, "slug": self._slug, "host": self._host, "identifier": self._identifier,
            "ship": self._ship, "thing": self._described_thing, "colour and thing": self._described_thing,
            "digits": self._digits,
        }  # fmt: skip
        return self._new(makers[kind])

    def _value(self, kind: str) -> str:
        rng = self._rng
        if kind == "digits":
            return self._new(self._digits)
        if kind == "code":
            return self._new(self._code)
        if kind == "hiding place":
            return rng.choice(words.PLACES)
        if kind == "person":
            return self._person()
        if kind == "colour and animal":
            return f"{rng.choice(words.COLOURS)} {rng.choice(words.ANIMALS)}"
        if kind == "colour and thing":
            return self._new(self._described_thing)
        if kind == "city":
            return rng.choice(words.CITIES)
        if kind == "price":
            return f"{rng.randint(2, 9999)}.{rng.randint(0, 99):02}"
        if kind == "phone":
            return f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
        if kind == "date":
            return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)} {rng.randint(1850, 2049)}"
        assert kind == "date and time", kind
        return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)} at {rng.randint(1, 23)}:{rng.randint(0, 59):02}"

    def _digits(self) -> str:
        return "".join(self._rng.choices("0123456789", k=self._rng.choice((4, 5, 5, 6, 6, 7, 7, 8))))

    def _code(self) -> str:
        letters = "".join(self._rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=self._rng.randint(2, 3)))
        return f"{letters}{self._rng.choice(('-', ''))}{self._rng.randint(100, 99999)}"

    def _slug(self) -> str:
        return f"{self._rng.choice(words.COLOURS)}-{self._rng.choice(words.ANIMALS)}-{self._rng.randint(1, 99)}"

    def _host(self) -> str:
        return f"{self._rng.choice(words.CITIES).lower()}-{self._rng.randint(1, 99):02}"

    def _identifier(self) -> str:
        parts = [self._rng.choice(words.COLOURS), self._rng.choice(words.THINGS).replace("-", "_")]
        name = "_".join(parts) + self._rng.choice(("", "_count", "_limit", "_id", f"_{self._rng.randint(2, 9)}"))
        return name.upper() if self._rng.random() < 0.4 else name

    def _place_name(self) -> str:
        kind = self._rng.choice(("vault", "gate", "archive", "tower", "laboratory", "cellar", "garage", "station"))
        return f"the {self._rng.choice(words.COLOURS)} {kind} in {self._rng.choice(words.CITIES)}"

    def _ship(self) -> str:
        return f"{self._rng.choice(words.COLOURS)} {self._rng.choice(words.ANIMALS)}".title()

    def _described_thing(self) -> str:
        return f"{self._rng.choice(words.COLOURS)} {self._rng.choice(words.THINGS)}"
