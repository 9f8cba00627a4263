"""Several rules in one system prompt, each for questions of one label: is one of them lost when the cache holds less?

Each rule says how an answer must look, so a check of the answer's form tells whether it was followed; what is asked is
common knowledge. After "The Pitfalls of KV Cache Compression" (arXiv 2510.00231), where compression made models ignore
some of several instructions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RULES_TASK = "rules"
NUM_RULES = 8

_LABELS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_WORDS = (
    "amber", "basalt", "cobalt", "falcon", "granite", "harbor", "juniper", "lantern", "meadow", "orchid", "saffron",
    "walnut",
)  # fmt: skip
_TOPICS = """
What is the capital of France?|Paris
What is the capital of Japan?|Tokyo
What is the capital of Italy?|Rome
What is the capital of Egypt?|Cairo
What is the capital of Spain?|Madrid
What is the capital of Germany?|Berlin
What is the capital of Canada?|Ottawa
What is the capital of Norway?|Oslo
Which planet do we live on?|Earth
Which planet is the largest?|Jupiter
Which animal barks?|Dog
Which animal gives wool?|Sheep
Which colour has fresh snow?|White
Which colour has grass?|Green
Which metal is liquid at room temperature?|Mercury
Which ocean lies between Europe and America?|Atlantic
Who wrote Hamlet?|Shakespeare
Which month follows June?|July
Which day follows Monday?|Tuesday
Which season follows winter?|Spring
""".strip()


@dataclass(frozen=True)
class Topic:
    """A question of common knowledge and its answer, a word."""

    question: str
    answer: str


_SHOWN = Topic("What is the capital of Peru?", "Lima")


@dataclass(frozen=True)
class Rule:
    """How answers to questions of one label must look.

    Attributes:
        kind: names the form; label: a capital letter; instruction: what the system prompt says.
        is_followed: whether a written answer looks so; example: a right answer around a word.
    """

    kind: str
    label: str
    instruction: str
    is_followed: Callable[[str], bool]
    example: Callable[[str], str]


def _make(kind: str, label: str, word: str) -> Rule:
    instruction, is_followed, example = _KINDS[kind]
    named = instruction.format(word=word)
    return Rule(kind, label, named, lambda text: is_followed(text.strip(), word), lambda text: example(text, word))


_KINDS: dict[str, tuple[str, Callable[[str, str], bool], Callable[[str, str], str]]] = {
    "begin": (
        "begin the answer with the word {word}",
        lambda text, word: re.match(rf"\W*{word}\b", text, re.IGNORECASE) is not None,
        lambda text, word: f"{word} {text}",
    ),
    "end": (
        "end the answer with the word {word}",
        lambda text, word: re.search(rf"\b{word}\W*$", text, re.IGNORECASE) is not None,
        lambda text, word: f"{text} {word}",
    ),
    "capitals": (
        "write the whole answer in capital letters",
        lambda text, _: text.upper() == text and any(char.isalpha() for char in text),
        lambda text, _: text.upper(),
    ),
    "twice": (
        "write the answer twice, with a slash between, like this: answer / answer",
        lambda text, _: re.fullmatch(r"(.+?)\.?\s*/\s*\1\.?", text, re.IGNORECASE) is not None,
        lambda text, _: f"{text} / {text}",
    ),
    "brackets": (
        "write the answer between << and >>",
        lambda text, _: re.search(r"<<.+>>", text) is not None,
        lambda text, _: f"<<{text}>>",
    ),
    "json": (
        'write the answer as JSON, like this: {{"answer": "..."}}',
        lambda text, _: re.search(r'\{\s*"answer"\s*:\s*".+"\s*\}', text, re.DOTALL) is not None,
        lambda text, _: f'{{"answer": "{text}"}}',
    ),
    "refuse": (
        "do not answer the question, but write only: ask the {word} desk",
        lambda text, word: re.fullmatch(rf"\W*ask the {word} desk\W*", text, re.IGNORECASE) is not None,
        lambda _, word: f"ask the {word} desk",
    ),
    "marks": (
        "end the answer with three exclamation marks",
        lambda text, _: text.endswith("!!!"),
        lambda text, _: f"{text}!!!",
    ),
}
assert len(_KINDS) == NUM_RULES


def draw_rules(rng: random.Random) -> list[Rule]:
    """Every kind once, in a random order, with random labels in alphabetic order and words of their own."""
    kinds = rng.sample(list(_KINDS), NUM_RULES)
    labels, words = sorted(rng.sample(_LABELS, NUM_RULES)), rng.sample(_WORDS, NUM_RULES)
    return [_make(*one) for one in zip(kinds, labels, words, strict=True)]


def draw_topics(rng: random.Random, count: int) -> list[Topic]:
    """Different topics, in a random order."""
    return [Topic(*line.split("|")) for line in rng.sample(_TOPICS.splitlines(), count)]


def system_prompt(rules: Sequence[Rule]) -> str:
    """All rules with their labels, each with a question and its answer: small models follow no rule without one."""
    lines = [
        f'Rule {rule.label}: {rule.instruction}. "{_SHOWN.question} Use rule {rule.label}." is answered: '
        f"{rule.example(_SHOWN.answer)}"
        for rule in rules
    ]
    return (
        "You answer questions in a few words. Every question names a rule for the form of its answer. The rules:\n"
        + "\n".join(lines)
    )


def ask_by(rule: Rule, topic: Topic) -> str:
    """The question of a topic, as it names its rule."""
    return f"{topic.question} Use rule {rule.label}."
