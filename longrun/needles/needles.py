"""Needle-in-a-haystack prompts: text that never repeats, needles with one right answer, a prefill shared by questions.

A needle is `The magic number of <Name> is: <digits>.`; every question ends in the same words, so that the model only
has to continue them. The haystack is generated from a seed (or taken from files) and never holds a sentence twice.
A prompt comes in parts: one document, prefilled once, and one question per needle, asked after a rewind. The parts
concatenated are exactly what is fed; lengths are counted in tokens of the model's own tokenizer.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from longrun.errors import CheckpointError, InputError
from longrun.needles.words import NAMES, PATTERNS, SLOTS
from longrun.text.chat_template import TemplateError, cut_at, has_template, render_chats
from longrun.text.encoder import TextEncoder, leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = "Here is a long text. A question about the text follows after its end."
NEEDLE = "The magic number of {name} is: {key}."
QUESTION = "Question: What is the magic number of {name}?"
ANSWER = "The magic number of {name} is:"
KEY_DIGITS = 7

_SEPARATOR = "\n\n"
_SAMPLE_SENTENCES = 2000
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


@dataclass(frozen=True)
class Needle:
    """One fact hidden in the haystack: a name that occurs nowhere else and its number.

    `key` is a string of digits; `sentence` is the text hidden, `answer_prefix` the words a model continues.
    """

    name: str
    key: str

    @property
    def sentence(self) -> str:
        return NEEDLE.format(name=self.name, key=self.key)

    @property
    def question(self) -> str:
        return QUESTION.format(name=self.name)

    @property
    def answer_prefix(self) -> str:
        return ANSWER.format(name=self.name)

    def matches(self, generated: str) -> bool:
        """Whether generated text begins with exactly this number (single spaces between digits are allowed)."""
        digits = re.match(r"\s*((?:\d ?)*)", generated)
        return digits is not None and digits.group(1).replace(" ", "") == self.key


@dataclass(frozen=True)
class NeedleQuestion:
    """What is fed after the document to ask for one needle, and the tokens a right answer begins with."""

    needle: Needle
    token_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    at: float  # where the needle stands, as a fraction of the haystack's characters
    depth: float | None = None  # where it was asked to stand


@dataclass(frozen=True)
class NeedlePrompt:
    """One cell of a sweep: `document_ids + question.token_ids` is the whole prompt of that question."""

    document_ids: list[int]
    questions: tuple[NeedleQuestion, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt: the document and its longest question."""
        return len(self.document_ids) + max(len(question.token_ids) for question in self.questions)


def make_needles(count: int, seed: int | str) -> tuple[Needle, ...]:
    """`count` needles with different names and keys that share no beginning and no run of four digits.

    The first two digits differ between all keys and no four digits in a row occur twice: whoever copies by the last
    four tokens, as the planted model does, is never sent to another needle.

    Raises:
        InputError: count is not between 1 and 50.
    """
    if not 1 <= count <= 50:
        raise InputError(f"{count} needles a prompt cannot be made: choose between 1 and 50")
    rng = random.Random(f"needles/{seed}")
    names = rng.sample(NAMES, count)
    needles: list[Needle] = []
    starts: set[str] = set()
    runs: set[str] = set()
    while len(needles) < count:
        key = "".join(rng.choices("0123456789", k=KEY_DIGITS))
        own = {key[i : i + 4] for i in range(KEY_DIGITS - 3)}
        if key[:2] in starts or own & runs or len(own) < KEY_DIGITS - 3:
            continue
        starts.add(key[:2])
        runs |= own
        needles.append(Needle(names[len(needles)], key))
    return tuple(needles)


def generate_sentences(seed: int | str) -> Iterator[str]:
    """Endless English sentences in a fixed order per seed, no sentence twice (a collision is drawn again)."""
    rng = random.Random(f"haystack/{seed}")
    patterns = [_parse_pattern(pattern) for pattern in PATTERNS]
    seen: set[str] = set()
    while True:
        sentence = _fill(rng.choice(patterns), rng)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def _parse_pattern(pattern: str) -> tuple[list[str], list[tuple[str, ...]]]:
    pieces = re.split(r"\{(\w+)\}", pattern)
    return pieces[0::2], [SLOTS[slot] for slot in pieces[1::2]]


def _fill(pattern: tuple[list[str], list[tuple[str, ...]]], rng: random.Random) -> str:
    literals, slots = pattern
    parts: list[str] = []
    for literal, words in zip(literals, slots, strict=False):
        word = words[int(rng.random() * len(words))]
        article = literal.endswith((" a ", "A ")) and word[0] in "aeiou"
        parts += (literal[:-1] + "n " if article else literal, word)
    return "".join(parts) + literals[-1]


def sentences_from_text(text: str) -> Iterator[str]:
    """The sentences of a text in order, white space made single, a sentence seen before left out."""
    seen: set[str] = set()
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if sentence and sentence not in seen:
                seen.add(sentence)
                yield sentence


class Haystack:
    """A growing list of sentences behind one source, shared by all cells of a sweep.

    Raises (from `take`):
        InputError: the files hold fewer sentences than asked for.
    """

    def __init__(self, sentences: Iterator[str], what: str) -> None:
        self._source = sentences
        self._taken: list[str] = []
        self._what = what

    @classmethod
    def generated(cls, seed: int | str) -> Haystack:
        return cls(generate_sentences(seed), f"the haystack generated from seed {seed}")

    @classmethod
    def from_files(cls, paths: Sequence[str | Path]) -> Haystack:
        """Sentences of UTF-8 text files, one file after the other.

        Raises:
            InputError: a file is missing, is not UTF-8 text, or the files hold no text.
        """
        texts = [_read_text(Path(path)) for path in paths]
        if not any(text.strip() for text in texts):
            raise InputError(f"haystack file {paths[0]} holds no text: name files with text")
        return cls(sentences_from_text(_SEPARATOR.join(texts)), f"the text of {len(texts)} haystack file(s)")

    def take(self, count: int) -> list[str]:
        """The first `count` sentences."""
        while len(self._taken) < count:
            sentence = next(self._source, None)
            if sentence is None:
                raise InputError(
                    f"{self._what} ends after {len(self._taken):,} different sentences and about {count:,} are "
                    "needed: add files, ask for a shorter length, or leave --haystack out to generate text"
                )
            self._taken.append(sentence)
        return self._taken[:count]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"haystack file {path} is not UTF-8 text (byte {error.start}): convert it or name another"
        ) from error
    except OSError as error:
        raise InputError(
            f"haystack file {path} cannot be read ({error.strerror}): name an existing text file"
        ) from error


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    needles: Sequence[Needle],
    length: int,
    depth: float | Sequence[float],
) -> NeedlePrompt:
    """The prompt of one cell: at most `length` tokens, less than about two sentences (or 0.5%) short of it.

    Args:
        tokenizer: the model's own; its chat template is used where it has one, else plain text.
        haystack: sentences, cut at a sentence's end so that the whole fits.
        needles: put between sentences and apart from each other; those of one depth around it.
        length: tokens of document and longest question together.
        depth: 0 (before the first sentence) to 1 (after the last); one for all, or one for each needle.

    Raises:
        InputError: depth outside 0..1 or not one a needle, length too short for the needles, or a haystack that ends
            too early.
    """
    depths = [float(depth)] * len(needles) if isinstance(depth, int | float) else [float(one) for one in depth]
    if len(depths) != len(needles):
        raise InputError(f"{len(depths)} depths were given for {len(needles)} needle(s): give one, or one a needle")
    for one in depths:
        if not 0.0 <= one <= 1.0:
            raise InputError(f"depth {one} is outside 0..1: 0 is the haystack's start, 1 its end")
    writer = _PromptWriter(tokenizer)
    sample = haystack.take(1)[0]
    questions = [writer.question_ids(needle, anchor=sample) for needle in needles]
    room = length - max(len(token_ids) for token_ids, _ in questions)

    def document(num_sentences: int) -> tuple[list[int], list[float]]:
        text, places = _place(haystack.take(num_sentences), needles, depths)
        return writer.document_ids(text), places

    ids, places = document(1)
    if len(ids) > room:
        raise InputError(
            f"length {length:,} is too short for {len(needles)} needle(s) and a question: "
            f"ask for at least {length - room + len(ids):,} tokens"
        )
    ids, places = _longest_that_fits(document, room, first=(ids, places))
    return NeedlePrompt(
        ids,
        tuple(
            NeedleQuestion(needle, tuple(token_ids), tuple(expected), at, one)
            for needle, (token_ids, expected), at, one in zip(needles, questions, places, depths, strict=True)
        ),
    )


def _longest_that_fits(document, room: int, first: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Search the number of sentences by secant steps: each try tokenizes the whole text, so there are only a few.

    A text of `_SAMPLE_SENTENCES` tells how long sentences are, then one try that aims a little short of the room is
    enough for long texts: millions of tokens are tokenized once.
    """
    best, low, high = first, 1, None
    per_sentence = 20.0
    while high is None or high - low > 1:
        missing = room - len(best[0])
        if low > 1 and missing <= max(1.5 * per_sentence, 0.005 * room):
            break
        guess = low + max(1, int((missing - 0.002 * room) / per_sentence))
        if low == 1:
            guess = min(guess, _SAMPLE_SENTENCES)
        guess = guess if high is None else min(guess, high - 1)
        tried = document(guess)
        per_sentence = max(1.0, (len(tried[0]) - len(first[0])) / (guess - 1))
        if len(tried[0]) <= room:
            best, low = tried, guess
        else:
            high = guess
    return best


def _place(sentences: list[str], needles: Sequence[Needle], depths: Sequence[float]) -> tuple[str, list[float]]:
    """The text with the needles between its sentences, and each needle's place as a fraction of the characters."""
    starts = [0, *accumulate(len(sentence) + 1 for sentence in sentences)]
    groups: dict[float, list[int]] = {}
    for number, depth in enumerate(depths):
        groups.setdefault(depth, []).append(number)
    order = [(index, number) for depth in sorted(groups) for index, number in _around(starts, depth, groups[depth])]
    if len(groups) > 1:
        order = _apart(sorted(order), len(sentences))
    parts: list[str] = []
    previous = 0
    places = [0.0] * len(needles)
    for index, number in order:
        parts += sentences[previous:index]
        parts.append(needles[number].sentence)
        places[number] = starts[index] / starts[-1]
        previous = index
    return " ".join(parts + sentences[previous:]), places


def _around(starts: list[int], depth: float, numbers: list[int]) -> list[tuple[int, int]]:
    """(sentences before it, number) of each needle of one depth; `starts` are the sentences' first characters."""
    count = len(starts) - 1
    target = bisect_left(starts, depth * starts[-1])
    if target > 0 and depth * starts[-1] - starts[target - 1] < starts[target] - depth * starts[-1]:
        target -= 1
    apart = max(1, count // 200)
    apart = min(apart, count // max(1, len(numbers) - 1)) if len(numbers) > 1 else apart
    width = apart * (len(numbers) - 1)
    first = min(max(0, target - width // 2), count - width)
    return [(max(0, first + place * apart), number) for place, number in enumerate(numbers)]


def _apart(order: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """At least one sentence between neighbours as long as there are enough of them; `order` is sorted."""
    found: list[int] = []
    for index, _ in order:
        found.append(index if not found else max(index, found[-1] + 1))
    latest = count
    for place in range(len(found) - 1, -1, -1):
        found[place] = max(0, min(found[place], latest))
        latest = found[place] - 1
    return [(index, number) for index, (_, number) in zip(found, order, strict=True)]


class _PromptWriter:
    """Turns document and question texts into token ids whose concatenation is the tokenization of the whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        if has_template(tokenizer):
            marker = "LongrunDocumentMarker"
            try:
                (rendered,) = render_chats(tokenizer, [[("user", marker)]])
            except TemplateError as error:
                raise CheckpointError(f"the checkpoint's chat template cannot be rendered: {error}") from error
            before, after = cut_at(rendered, marker)
            ends = [match.end() for match in self._encoder.pattern.finditer(before)]
            first = self._encoder.pattern.search(after)
            head, start = ends[-1] if ends else 0, first.start() if first else len(after)
            self._start_ids, self._before = self._encode(before[:head]), before[head:]
            self._after_control = head > 0
            self._after, self._template_end = after[:start], after[start:]
        else:
            self._start_ids, self._before, self._after_control = leading_ids(tokenizer), "", False
            self._after, self._template_end = "\n", ""
        # Most tokenizers merge "." with the newlines after it or keep newlines in one token: take the cut they respect.
        probe = f"The end.{_SEPARATOR}Question: What"
        for cut in (probe.index("Question"), probe.index(_SEPARATOR)):
            head = self._encoder.ids(probe[:cut])
            if self._encoder.ids(probe)[: len(head)] == head:
                break
        self._document_end, self._question_start = (
            (_SEPARATOR, "") if probe[cut:].startswith("Question") else ("", _SEPARATOR)
        )

    def _encode(self, text: str) -> list[int]:
        """Ids of the template's own text, with control tokens."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def document_ids(self, text: str) -> list[int]:
        text = f"{self._before}{HEAD}{_SEPARATOR}{text}{self._document_end}"
        return self._start_ids + self._encoder.ids(text, after_control=self._after_control)

    def question_ids(self, needle: Needle, anchor: str) -> tuple[list[int], list[int]]:
        """Ids of the question after a document that ends with `anchor`, and ids of the right answer after it."""
        head = anchor + self._document_end
        asked = f"{head}{self._question_start}{needle.question}{self._after}"
        head_ids = self._encoder.ids(head)
        asked_ids, told_ids = (
            self._with_answer(asked, answer)
            for answer in (needle.answer_prefix, f"{needle.answer_prefix} {needle.key}")
        )
        if asked_ids[: len(head_ids)] != head_ids:
            asked_ids = head_ids + self._with_answer(asked[len(head) :], needle.answer_prefix)
        if told_ids[: len(asked_ids)] != asked_ids:
            told_ids = asked_ids + self._encoder.ids(f" {needle.key}")
        return asked_ids[len(head_ids) :], told_ids[len(asked_ids) :]

    def _with_answer(self, text: str, answer: str) -> list[int]:
        """Ids of a text, what the template puts after it, and the beginning of an answer."""
        if not self._template_end:
            return self._encoder.ids(text + answer)
        return self._encoder.ids(text) + self._encode(self._template_end + answer)
