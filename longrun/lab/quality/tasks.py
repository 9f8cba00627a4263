"""What is asked in a quality comparison: documents with facts in them, the questions, and texts to be predicted.

Everything follows from (seed, length, task, number): every row of a comparison reads the same documents and is asked
the same questions. Lengths are tokens of the model's own tokenizer, document and longest question together.
"""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrun.errors import InputError
from longrun.needles.needles import KEY_DIGITS, Haystack, Needle, NeedlePrompt, build_prompt, make_needles
from longrun.needles.words import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE = ("passkey", "needle")  # both stand in the same documents, one of each
RETRIEVAL_TASKS = (*SINGLE, "several", "keyvalue")
TEXT_TASK = "text"


@dataclass(frozen=True)
class PassKey(Needle):
    """The pass key of Mohtashami and Jaggi (arXiv 2305.16300): there is one, and the question needs no name."""

    @property
    def sentence(self) -> str:
        return f"The pass key is: {self.key}. Remember it. {self.key} is the pass key."

    @property
    def question(self) -> str:
        return "Question: What is the pass key?"

    @property
    def answer_prefix(self) -> str:
        return "The pass key is:"


@dataclass(frozen=True)
class KeyValue(Needle):
    """One entry of a long list (key-value retrieval as in Liu et al., arXiv 2307.03172): a full name and its code."""

    @property
    def sentence(self) -> str:
        return f"The code of {self.name} is: {self.key}."

    @property
    def question(self) -> str:
        return f"Question: What is the code of {self.name}?"

    @property
    def answer_prefix(self) -> str:
        return f"The code of {self.name} is:"


@dataclass(frozen=True)
class TaskDocument:
    """One document, read once, and its questions.

    Attributes:
        name: of the document among those of its length, the same in every row.
        prompt: token ids and questions; tasks: the task that each question belongs to.
    """

    name: str
    prompt: NeedlePrompt
    tasks: tuple[str, ...]


def retrieval_documents(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    task: str,
    length: int,
    depths: Sequence[float],
    items: int,
    seed: int,
) -> Iterator[TaskDocument]:
    """The documents of one length, with `items` questions of every depth (of each of the two tasks of "single").

    Args:
        task: "single" (a pass key and a needle a document), "several" (one needle a depth, asked one by one) or
            "keyvalue" (nothing but entries, one asked a depth).
        depths: 0 to 1.

    Raises:
        InputError: the length holds no document with its question, or the haystack ends too early.
    """
    count = items * len(depths) if task == "single" else items
    for number in range(count):
        name = f"{task}/{number}"
        facts_seed, text = f"quality/{seed}/{length}/{name}", haystack
        if task == "single":
            first, second = make_needles(2, facts_seed)
            shift = 1 + number // len(depths)
            places = [depths[number % len(depths)], depths[(number + shift) % len(depths)]]
            facts, tasks = [PassKey("", first.key), second], SINGLE
        else:
            places, tasks = list(depths), (task,) * len(depths)
            facts = list(make_needles(len(depths), facts_seed))
            if task == "keyvalue":
                facts, text = key_values(facts, facts_seed)
        yield TaskDocument(name, build_prompt(tokenizer, text, facts, length, places), tasks)


def key_values(asked: Sequence[Needle], seed: str) -> tuple[list[Needle], Haystack]:
    """The entries to be asked for, with the codes of `asked`, and an endless list of others.

    No other entry's code begins with the two digits of an asked one or holds four digits in a row of it, so that
    whoever copies by the last four tokens is not sent astray; no full name occurs twice.
    """
    rng = random.Random(f"key-value/{seed}")
    taken: set[str] = set()

    def full_name() -> str:
        while True:
            name = " ".join(rng.sample(NAMES, 2))
            if name not in taken:
                taken.add(name)
                return name

    facts: list[Needle] = [KeyValue(full_name(), needle.key) for needle in asked]
    starts = {needle.key[:2] for needle in asked}
    runs = {needle.key[i : i + 4] for needle in asked for i in range(KEY_DIGITS - 3)}

    def others() -> Iterator[str]:
        while len(taken) < len(NAMES) * (len(NAMES) - 1):
            key = "".join(rng.choices("0123456789", k=KEY_DIGITS))
            if key[:2] not in starts and not any(key[i : i + 4] in runs for i in range(KEY_DIGITS - 3)):
                yield KeyValue(full_name(), key).sentence

    return facts, Haystack(others(), "the list of names")


def held_out_text(files: Sequence[str] = ()) -> str:
    """Long English text to be predicted: the files' contents, or Python's own language reference (PSF licence)."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(files or (topics[name] for name in sorted(topics)))


def text_documents(token_ids: Sequence[int], length: int, count: int, before: Sequence[int] = ()) -> list[list[int]]:
    """`count` documents of `length` tokens: `before`, and a stretch of the text; the stretches are evenly spread over
    it, as little overlapping as it allows.

    Raises:
        InputError: the text is shorter than that.
    """
    length -= len(before)
    if len(token_ids) < length:
        raise InputError(
            f"the text to be predicted has {len(token_ids):,} tokens and {length:,} are needed: give --text files, or "
            f"leave the task {TEXT_TASK} out"
        )
    room = len(token_ids) - length
    starts = [room * number // max(1, count - 1) for number in range(count)] if count > 1 else [room // 2]
    return [[*before, *token_ids[start : start + length]] for start in starts]
