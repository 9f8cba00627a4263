"""Facts of one training sample: many of few forms, about people and things that are easy to confuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longrun.errors import InputError
from longrun.lab import long_words as words
from longrun.lab.long_tasks import Draw, Fact
from scripts.training import long_forms as forms

_TRIES = 500  # draws of a subject that is not taken, before a pool counts as used up
_FEW = 100  # facts up to which first names alone tell people apart
_PROBED = 4  # rows that tell how many tokens a row of a list has
_MAKER_WEIGHTS = (40, 4, 4, 2)  # a form of a sample: a plain one, a list, a last value, an order
_NUMBERS, _CODES = 0.3, 0.3  # how often a plain form is one whose value is a number, or letters and a number
_ALIKE, _EXCHANGED = ("digits", "code", "short code", "hex"), 0.3
"""Kinds of values that stand for one another, and how often: what a value looks like must not be guessed from the words
around it."""


@dataclass(frozen=True)
class FactList:
    """Many subjects in a row, each with its values, and a question about each.

    Attributes:
        text: the rows, each with its line end, and what stands around them.
        facts: what can be asked; their statements are in `text`.
        whole_lines: whether every line is a whole row (a text may then be interrupted at any line).
    """

    name: str
    text: str
    facts: tuple[Fact, ...]
    whole_lines: bool


class TrainDraw(Draw):
    """Draws training facts. A subject occurs once in a form; people may occur in several forms, other things in one."""

    def __init__(self, rng: random.Random, count: int) -> None:
        """For about `count` facts: how people are called, and the few forms of the sample, are drawn here."""
        super().__init__(rng, forms.FIRST_NAMES)
        self._people = rng.choice(("first", "full", "near") if count <= _FEW else ("full", "near"))
        self._first, self._last = list(forms.FIRST_NAMES), list(forms.SURNAMES)
        if self._people == "near":  # few names: many people share a first name or a surname with another
            size = max(4, int((3 * count) ** 0.5) + 1)
            self._first, self._last = (rng.sample(pool, min(size, len(pool))) for pool in (self._first, self._last))
        self._form = ""
        self._listed_attributes: set[str] = set()
        self._makers = [self._maker() for _ in range(rng.randint(2, 6))]

    def _maker(self) -> Callable[[], Fact]:
        rng = self._rng
        kind = rng.choices(("plain", "list", "last value", "order"), _MAKER_WEIGHTS)[0]
        if kind == "plain":
            hardest = rng.choices(
                (forms.NUMBER_FORMS, forms.CODE_FORMS, ()), (_NUMBERS, _CODES, 1 - _NUMBERS - _CODES)
            )[0]
            form = rng.choice([one for one in forms.TRAIN_FORMS if not hardest or one.name in hardest])
            return lambda: self._of(form)
        return {"list": self._listed, "last value": self._assigned, "order": self._ordered}[kind]

    def fact(self) -> Fact:
        """One more fact of one of the sample's forms."""
        return self._rng.choice(self._makers)()

    def rows(self, tokens: int, most: int, encode: Callable[[str], list[int]]) -> FactList:
        """A list of about `tokens` tokens, of at least four and at most `most` rows.

        People may occur in another list of the sample as well, with other attributes.

        Raises:
            InputError: more rows than there are subjects of the kind.
        """
        rng = self._rng
        style = rng.choice(forms.LIST_FORMATS)
        left = [one for one in forms.ATTRIBUTES if one[0] not in self._listed_attributes]
        attributes = rng.sample(left, rng.randint(1, style.most) if rng.random() < 0.5 else 1)
        self._listed_attributes |= {name for name, _ in attributes}
        kind = rng.choice(forms.LIST_SUBJECTS)
        self._form = f"list {len(self._taken)}"
        names = [name for name, _ in attributes]
        lines, facts, start = [], [], rng.randrange(86400)
        count = most
        while len(lines) < count:
            if len(lines) == _PROBED:
                a_row = len(encode("".join(lines))) / _PROBED
                count = max(_PROBED, min(most, int(tokens / a_row)))
                if len(lines) == count:
                    break
            subject = self._one(kind)
            row = [(name, self._value(values)) for name, values in attributes]
            lines.append(style.row((subject, row), start + len(lines)))
            name, value = rng.choice(row)
            question, answer = rng.choice(forms.LIST_QUESTIONS), rng.choice(forms.LIST_ANSWERS)
            before, _, after = answer.partition("{value}")
            fields = {"subject": subject, "attribute": name}
            facts.append(
                Fact(
                    "row",
                    [],
                    question.format(**fields),
                    before.format(**fields),
                    value,
                    after.format(**fields),
                    subject,
                )
            )
        whole = lines[0].count("\n") == 1
        return FactList(style.name, style.before(names) + "".join(lines) + style.after, tuple(facts), whole)

    def _of(self, form: words.Form) -> Fact:
        self._form = form.name
        return self.of_form(form)

    def _listed(self) -> Fact:
        """Two to four things that one person bought, at different places of the text, all in one answer."""
        rng = self._rng
        self._form = "list"
        subject, things = self._person(), rng.sample(words.THINGS, rng.randint(2, 4))
        statements = [rng.choice(words.LIST_STATEMENTS).format(subject=subject, value=thing) for thing in things]
        answer = ", ".join(things[:-1]) + f" and {things[-1]}"
        return Fact("list", statements, rng.choice(words.LIST_QUESTIONS).format(subject=subject), "", answer, ".")

    def _assigned(self) -> Fact:
        """A variable that is set two or three times: the last value counts."""
        rng = self._rng
        self._form = "last value"
        subject = self._one("identifier")
        values = [self._new(self._digits) for _ in range(rng.randint(2, 3))]
        pattern = rng.choice(words.ASSIGN_STATEMENTS)
        statements = [pattern.format(subject=subject, value=value) for value in values]
        question = rng.choice(words.ASSIGN_QUESTIONS).format(subject=subject)
        return Fact("last value", statements, question, rng.choice(("", "The last value is ")), values[-1])

    def _ordered(self) -> Fact:
        """Which of two people comes first in the text."""
        rng = self._rng
        self._form = "which first"
        first, second = self._person(), self._person()
        city = rng.choice(words.CITIES)
        statements = [f"{first} sent greetings from {city}.", f"{second} sent greetings as well."]
        a, b = rng.sample((first, second), 2)
        return Fact("which first", statements, rng.choice(words.ORDER_QUESTIONS).format(a=a, b=b), "", first)

    def _new(self, make: Callable[[], str], form: str = "") -> str:
        for _ in range(_TRIES):
            made = make()
            if (key := f"{form}/{made}") not in self._taken:
                self._taken.add(key)
                return made
        raise InputError(f"no subject is left for another fact of form {self._form!r}: ask for fewer facts a sample")

    def _person(self) -> str:
        return self._new(self._named, self._form)

    def _named(self) -> str:
        first = self._rng.choice(self._first)
        return first if self._people == "first" else f"{first} {self._rng.choice(self._last)}"

    def _subject(self, kind: str) -> tuple[str, dict[str, Any]]:
        if kind == "two people":
            subject = f"{self._person()} and {self._person()}"
            return subject, {"subject": subject}
        return super()._subject(kind)

    def _one(self, kind: str) -> str:
        makers = {
            "code": self._code,
            "city and number": lambda: f"{self._rng.choice(words.CITIES)} {self._rng.randint(2, 999)}",
            "title": lambda: f"The {self._described_thing()} of {self._rng.choice(words.CITIES)}".title(),
        }
        return self._new(makers[kind]) if kind in makers else super()._one(kind)

    def _value(self, kind: str) -> str:
        rng = self._rng
        if kind in _ALIKE and rng.random() < _EXCHANGED:
            kind = rng.choice(_ALIKE)
        if kind == "person":  # a value may be a subject elsewhere
            return self._new(self._named, f"value of {self._form}")
        if kind == "job":
            return rng.choice(forms.JOBS)
        if kind == "hex":
            return "".join(rng.choices("0123456789abcdef", k=rng.randint(6, 10)))
        if kind == "decimal":
            return f"{rng.randint(-30, 60)}.{rng.randint(0, 99):02}"
        if kind == "short code":
            return f"{rng.choice('ABCDEFGHJKLMNPRSTUVW')}{rng.randint(10, 999)}"
        if kind == "colour and thing":
            return self._described_thing()
        return super()._value(kind)

    def _code(self) -> str:
        rng = self._rng
        letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((2, 2, 3, 3, 3, 4))))
        return f"{letters}{rng.choice(('-', '', ''))}{rng.randint(100, 99999)}"
