"""Documents of real code with questions in the words of the model's chat template: recall, and a system prompt's rules.

A document is a user's message: whole files of the standard library, and at its end the question, when one is asked, as
in `python -m longrun.chat`. Everything follows from (seed, length, number) and Python's version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from longrun.errors import InputError
from longrun.lab.quality.answers import holds_value, same_names
from longrun.lab.quality.code_source import CONSTANT, DEFAULT, SIGNATURE, WHICH_FILE, Fact, SourceFile, facts_of
from longrun.lab.quality.rules import RULES_TASK, ask_by, draw_rules, draw_topics, system_prompt
from longrun.needles.words import NAMES
from longrun.text.chat_format import ChatFormat
from longrun.text.chat_template import has_template
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TWO_FILES = "two files"
CODE_TASKS = (CONSTANT, DEFAULT, SIGNATURE, WHICH_FILE, TWO_FILES)
ASKED_TASKS = (*CODE_TASKS, RULES_TASK)
PER_TASK = 4  # questions of each task a document, where it has so many
MOST_ANSWER_TOKENS = 40

_INTRO = "Here are the files of a Python project. Questions about them follow after the last file.\n\n"
_MARGIN = 8  # tokens that may come or go where texts are joined
_DEPTHS = 5  # places are told by fifths of the document
_QUESTIONS = {
    CONSTANT: "What is the value of the constant {subject} in the file {file}? Answer with the value alone, as it is "
    "written in the file.",
    DEFAULT: "In the file {file}, what is the default value of the parameter {parameter} of {subject}? Answer with the "
    "value alone, as it is written in the file.",
    SIGNATURE: "In the file {file}, which parameters does {subject} have? Answer with their names alone, in order, "
    "separated by commas.",
    WHICH_FILE: "Which of the files defines {subject}? Answer with the name of the file alone, as it is written after "
    "'# file:'.",
}
_NOTE = "# file: notes/{name}.txt\nThe constant of {name} is {constant}, which is defined in {file}.\n"
_TWO_FILES = (
    "Which constant does the file notes/{name}.txt name, and what is its value in the file that defines it? Answer in "
    "the form NAME = VALUE."
)


@dataclass(frozen=True)
class AskedQuestion:
    """One question after a document.

    Attributes:
        depth: the middle of the fifth of the document (of the system prompt, for a rule) that holds the answer.
        text: as it is asked; kind: of a rule, which.
        token_ids: follow the document's, up to where the answer begins.
        expected, expected_ids: a right answer; `is_right` says whether a written one is.
        alone_ids: a whole prompt that asks without the document; empty where that says nothing.
    """

    task: str
    depth: float
    text: str
    token_ids: tuple[int, ...]
    expected: str
    expected_ids: tuple[int, ...]
    is_right: Callable[[str], bool]
    alone_ids: tuple[int, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class AskedDocument:
    """A document, read once, and its questions; names as in `tasks.TaskDocument`.

    Attributes:
        opening: tokens before the document's own text: of a task with a system prompt, that prompt.
    """

    name: str
    token_ids: list[int]
    questions: tuple[AskedQuestion, ...]
    opening: int = 0


class CodeDocuments:
    """Writes documents for one tokenizer; every file is tokenized once to know its length.

    Args:
        files: to draw from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, files: Sequence[SourceFile]) -> None:
        self._tokenizer, self._files = tokenizer, files
        self._plain, self._encoder = ChatFormat(tokenizer), TextEncoder(tokenizer)
        self._sizes: dict[str, int] = {}

    def code(self, length: int, count: int, seed: int) -> Iterator[AskedDocument]:
        """`count` documents of at most `length` tokens, longest question included, with questions about the code.

        Raises:
            InputError: the length holds no two files with anything to ask about.
        """
        for number in range(count):
            rng = random.Random(f"code/{seed}/{length}/{number}")
            files, filler = self._draw(rng, length - self._spare(_INTRO + PER_TASK * _NOTE))
            asked = _facts_of_all(files, [*files, filler])
            pieces = [f"# file: {file.name}\n{file.text}\n\n" for file in files]
            notes = _draw_notes(rng, [*files, filler], asked)
            for name, file, fact in notes:
                note = _NOTE.format(name=name, constant=fact.subject, file=file.name)
                pieces.insert(rng.randrange(len(pieces) + 1), f"{note}\n")
            chosen = [
                (task, *pair)
                for task in _QUESTIONS
                for pair in _spread(rng, "".join(pieces), [(f, x) for f, x in asked if x.task == task])
            ]

            def questions(text: str) -> tuple[AskedQuestion, ...]:
                found = [self._question(text, *one) for one in chosen]  # noqa: B023 - called within this turn
                return tuple(found + [self._of_note(text, *one) for one in notes])  # noqa: B023

            whole = "".join(pieces)
            text = self._filled(self._plain, _INTRO, whole, filler, length - _longest(questions(whole)))
            ids = self._plain.opening_ids(None, False) + self._plain.text_ids([text], True, True, False)[0]
            yield AskedDocument(f"code/{number}", ids, questions(text))

    def rules(self, length: int, count: int, seed: int) -> Iterator[AskedDocument]:
        """`count` documents behind a system prompt with a rule a label, and a question of each label.

        Without a chat template the rules stand before the document.

        Raises:
            InputError: as `code`, or the chat template takes no system prompt.
        """
        for number in range(count):
            rng = random.Random(f"rules/{seed}/{length}/{number}")
            rules = draw_rules(rng)
            system, templated = system_prompt(rules), has_template(self._tokenizer)
            chat = ChatFormat(self._tokenizer, system) if templated else self._plain
            files, filler = self._draw(rng, length - self._spare(_INTRO + system))
            questions = tuple(
                self._build(
                    chat, RULES_TASK, _fifth(place / len(rules)), ask_by(rule, topic), rule.example(topic.answer),
                    rule.is_followed, kind=rule.kind,
                )
                for place, (rule, topic) in enumerate(zip(rules, draw_topics(rng, len(rules)), strict=True))
            )  # fmt: skip
            intro = _INTRO if templated else f"{system}\n\n{_INTRO}"
            whole = "".join(f"# file: {file.name}\n{file.text}\n\n" for file in files)
            text = self._filled(chat, intro, whole, filler, length - _longest(questions))
            ids = chat.opening_ids(None, False) + chat.text_ids([text], True, True, False)[0]
            before = chat.tail_ids(True) if templated else self._encoder.ids(system)
            yield AskedDocument(f"rules/{number}", ids, questions, len(chat.opening_ids(None, False)) + len(before))

    def _draw(self, rng: random.Random, room: int) -> tuple[list[SourceFile], SourceFile]:
        """Different files that fill the room, and one more to fill with what is left of it. None takes more than a
        quarter. Every other one has constants or defaults to ask for, which are rare."""
        files, left = [], room
        order = rng.sample(self._files, len(self._files))
        for file in order:
            if len(file.text) / 6 > min(left, room / 4):
                continue
            kinds = {fact.task for fact in facts_of(file)}
            if not kinds or (not kinds & {CONSTANT, DEFAULT} and len(files) % 2):
                continue
            size = self._size(file)
            if size <= min(left, room / 4):
                files.append(file)
                left -= size
            if left < 200:
                break
        if len(files) < 2:
            raise InputError(
                f"documents of {room:,} tokens hold no two modules of Python's library: ask for at least 2K, or leave "
                f"the tasks code and rules out"
            )
        others = [file for file in order if file not in files]
        return files, next((file for file in others if len(file.text) > 6 * left), others[0] if others else files[0])

    def _spare(self, text: str) -> int:
        """Tokens to leave for this text, for names in it, and for a question with the turns around it."""
        return int(1.5 * len(self._encoder.ids(text + max(_QUESTIONS.values(), key=len)))) + 100

    def _filled(self, chat: ChatFormat, intro: str, whole: str, filler: SourceFile, room: int) -> str:
        """The document's text with as many first lines of `filler` before its other files as bring it to `room` tokens.

        Raises:
            InputError: it is longer than that without any.
        """

        def size(text: str) -> int:
            return len(chat.opening_ids(None, False)) + len(chat.text_ids([text], True, True, False)[0])

        left = room - size(intro + whole) - _MARGIN
        if left < -_MARGIN:
            raise InputError(f"a document is {-left - _MARGIN:,} tokens too long for its question: ask for longer ones")
        lines = filler.text.splitlines(keepends=True)

        def piece(count: int) -> str:
            return f"# file: {filler.name}\n{''.join(lines[:count])}\n\n" if count and filler.name not in whole else ""

        low, high = 0, len(lines)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self._encoder.ids(piece(middle))) <= left
            low, high = (middle, high) if fits else (low, middle - 1)
        return intro + piece(low) + whole

    def _size(self, file: SourceFile) -> int:
        if file.name not in self._sizes:
            ids = self._plain.text_ids([f"# file: {file.name}\n{file.text}\n\n"], True, False, False)[0]
            self._sizes[file.name] = len(ids)
        return self._sizes[file.name]

    def _question(self, text: str, task: str, file: SourceFile, fact: Fact) -> AskedQuestion:
        asked = _QUESTIONS[task].format(file=file.name, subject=fact.subject, parameter=fact.parameter)
        is_right = same_names if task == SIGNATURE else holds_value
        return self._build(
            self._plain, task, _depth(text, file, fact), asked, fact.answer, _against(is_right, fact.answer), alone=True
        )  # fmt: skip

    def _of_note(self, text: str, name: str, file: SourceFile, fact: Fact) -> AskedQuestion:
        return self._build(
            self._plain, TWO_FILES, _depth(text, file, fact), _TWO_FILES.format(name=name),
            f"{fact.subject} = {fact.answer}", partial(_named_value, fact.subject, fact.answer), alone=True,
        )  # fmt: skip

    def _build(
        self, chat: ChatFormat, task: str, depth: float, asked: str, expected: str, is_right: Callable[[str], bool],
        alone: bool = False, kind: str = "",
    ) -> AskedQuestion:  # fmt: skip
        templated = has_template(self._tokenizer)

        def ask(begins: bool) -> list[int]:
            words = asked if templated else f"Question: {asked}\nAnswer:"
            return chat.text_ids([words], True, begins, True)[0] + chat.closing_ids(True)

        expected_ids = self._continued(expected if templated else f" {expected}")
        return AskedQuestion(
            task, depth, asked, tuple(ask(False)), expected, tuple(expected_ids[:MOST_ANSWER_TOKENS]), is_right,
            tuple(chat.opening_ids(None, False) + ask(True)) if alone else (), kind,
        )  # fmt: skip

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that something precedes: without the space that some tokenizers begin a text with."""
        before, both = self._encoder.ids("\n"), self._encoder.ids(f"\n{text}")
        return both[len(before) :] if both[: len(before)] == before else self._encoder.ids(text, after_control=True)


def _longest(questions: Sequence[AskedQuestion]) -> int:
    return max(len(question.token_ids) for question in questions)


def _against(check: Callable[[str, str], bool], expected: str) -> Callable[[str], bool]:
    return lambda answer: check(answer, expected)


def _named_value(name: str, value: str, answer: str) -> bool:
    """Whether the answer names the constant and its value."""
    return name in answer and holds_value(answer, value)


def _facts_of_all(files: Sequence[SourceFile], read: Sequence[SourceFile]) -> list[tuple[SourceFile, Fact]]:
    """Facts of the files; where a file is asked for, only of names that no other file read defines or speaks of."""
    found = []
    for file in files:
        for fact in facts_of(file):
            elsewhere = fact.task == WHICH_FILE and any(fact.subject in other.text for other in read if other != file)
            if not elsewhere:
                found.append((file, fact))
    return found


def _draw_notes(
    rng: random.Random, files: Sequence[SourceFile], asked: Sequence[tuple[SourceFile, Fact]]
) -> list[tuple[str, SourceFile, Fact]]:
    """Services and the constants, unique among the files, that they take their limits from."""
    once = [
        (file, fact) for file, fact in asked
        if fact.task == CONSTANT and not any(fact.subject in other.text for other in files if other != file)
    ]  # fmt: skip
    chosen = rng.sample(once, min(PER_TASK, len(once)))
    return [(name, *pair) for name, pair in zip(rng.sample(NAMES, len(chosen)), chosen, strict=True)]


def _spread(rng: random.Random, text: str, facts: list[tuple[SourceFile, Fact]]) -> list[tuple[SourceFile, Fact]]:
    """A few of the facts, from all over the document."""
    drawn = rng.sample(facts, min(PER_TASK * 4, len(facts)))
    drawn.sort(key=lambda pair: _place(text, *pair))
    count = min(PER_TASK, len(drawn))
    return [drawn[(2 * i + 1) * len(drawn) // (2 * count)] for i in range(count)]


def _place(text: str, file: SourceFile, fact: Fact) -> float:
    """Where a fact stands, as a share of the document's characters."""
    start = text.index(f"# file: {file.name}\n") + len(f"# file: {file.name}\n")
    before = sum(len(line) for line in file.text.splitlines(keepends=True)[: fact.line - 1])
    return (start + before) / len(text)


def _depth(text: str, file: SourceFile, fact: Fact) -> float:
    return _fifth(_place(text, file, fact))


def _fifth(share: float) -> float:
    """The middle of the fifth that holds this share."""
    return (min(int(share * _DEPTHS), _DEPTHS - 1) + 0.5) / _DEPTHS
