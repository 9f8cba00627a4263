"""Texts of other kinds to be predicted: real code, and a chat in the model's own template."""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from longrun.errors import InputError
from longrun.lab.quality.code_source import SourceFile
from longrun.lab.quality.tasks import TEXT_TASK
from longrun.text.chat_format import ChatFormat
from longrun.text.encoder import TextEncoder, leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_TEXT, CHAT_TEXT = "text-code", "text-chat"
TEXT_TASKS = (TEXT_TASK, CODE_TEXT, CHAT_TEXT)

_AGAIN = 0.3  # how often a turn asks for a paragraph that was given before
_PARAGRAPH_CHARS = (80, 1200)


def code_texts(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[SourceFile], length: int, count: int, seed: int
) -> list[list[int]]:
    """`count` documents of exactly `length` tokens: modules one after another, drawn anew for each, the last one cut.

    Raises:
        InputError: the files together are shorter than that.
    """
    encoder, found = TextEncoder(tokenizer), []
    for number in range(count):
        rng, ids = random.Random(f"text of code/{seed}/{length}/{number}"), leading_ids(tokenizer)
        for file in rng.sample(files, len(files)):
            ids += encoder.ids(f"# file: {file.name}\n{file.text}\n\n")
            if len(ids) >= length:
                break
        found.append(_cut(ids, length, CODE_TEXT))
    return found


def chat_texts(
    tokenizer: PreTrainedTokenizerBase, end_id: int | None, length: int, count: int, seed: int
) -> list[list[int]]:
    """`count` conversations of exactly `length` tokens about Python's language reference: a user asks for a topic's
    next paragraph, or once more for one that was given before, and gets it.

    Args:
        end_id: token that ends an answer, None where there is none.

    Raises:
        InputError: the reference is shorter than that.
    """
    chat, encoder, found = ChatFormat(tokenizer), TextEncoder(tokenizer), []
    ends = [] if end_id is None else [end_id]
    for number in range(count):
        rng, ids = random.Random(f"text of chats/{seed}/{length}/{number}"), []
        for question, answer in _turns(rng):
            first = not ids
            ids += chat.opening_ids(ids[-1] if ids else None, bool(ids and ends))
            ids += chat.text_ids([question], first, True, True)[0] + chat.closing_ids(first)
            ids += [*encoder.ids(answer), *ends]
            if len(ids) >= length:
                break
        found.append(_cut(ids, length, CHAT_TEXT))
    return found


def _turns(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions and answers; topics in a random order."""
    topics, given = sorted(pydoc_data.topics.topics.items()), []
    for name, text in rng.sample(topics, len(topics)):
        parts = [" ".join(part.split()) for part in text.split("\n\n")]
        parts = [part for part in parts if _PARAGRAPH_CHARS[0] <= len(part) <= _PARAGRAPH_CHARS[1]]
        for number, part in enumerate(parts, start=1):
            yield f"What does the language reference say about {name}, paragraph {number}?", part
            given.append((name, number, part))
            if rng.random() < _AGAIN:
                name_again, number_again, part_again = rng.choice(given)
                yield f"Say once more what paragraph {number_again} about {name_again} was.", part_again


def _cut(ids: list[int], length: int, task: str) -> list[int]:
    if len(ids) < length:
        raise InputError(
            f"the text of the task {task} has {len(ids):,} tokens and {length:,} are needed: leave the task out"
        )
    return ids[:length]
