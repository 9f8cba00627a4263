"""How long `longrun.chat` takes to read a text, and whether it finds what is hidden there.

The text is made for a planted model (scripts/make_planted_model.py): sentences with numbers hidden at even depths, the
first before the first sentence and the last behind the last. The chat runs as its users run it, one process that reads
the text with --file and answers one question about each number with --ask. What stands behind `--` goes to it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.errors import InputError
from longrun.hub.names import model_name
from longrun.lab.planted import NOTE, is_planted
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import Needle, generate_sentences, make_needles
from scripts.bench.bench_common import finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 4096
SPARE = 200
"""Tokens of the length left for a question, its answer and what the chat puts around the text."""


def text_with_needles(tokenizer: PreTrainedTokenizerBase, length: int, needles: Sequence[Needle], seed: int) -> str:
    """Sentences with the needles among them, as many as fit.

    Raises:
        InputError: a length that has no room for as many sentences as needles.
    """
    total = sum(size for _, size in _sized(tokenizer, (needle.sentence for needle in needles)))
    sentences: list[str] = []
    for sentence, size in _sized(tokenizer, generate_sentences(seed)):
        if total + size > length - SPARE:
            break
        sentences.append(sentence)
        total += size
    if len(sentences) < len(needles):
        raise InputError(
            f"--length {length:,} has no room for {len(needles)} needles: give more tokens or fewer needles"
        )
    count, last = len(sentences), max(1, len(needles) - 1)
    for number in range(len(needles) - 1, -1, -1):
        sentences.insert(count * number // last, needles[number].sentence)
    return " ".join(sentences) + "\n"


def _sized(tokenizer: PreTrainedTokenizerBase, sentences: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Each sentence with its number of tokens."""
    while batch := list(islice(sentences, _BATCH)):
        found = tokenizer([" " + sentence for sentence in batch], add_special_tokens=False).input_ids
        yield from zip(batch, map(len, found), strict=True)


def run(args: argparse.Namespace) -> int:
    """The command `reading`. Status 0; InputError where the model was not planted or the chat failed."""
    if not is_planted(args.model):
        raise InputError(f"--model {args.model} is not a planted model: make one with scripts/make_planted_model.py")
    needles = make_needles(args.needles, args.seed)
    text = text_with_needles(load_tokenizer(args.model), args.length, needles, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        book, questions = Path(folder) / "book.txt", Path(folder) / "questions.jsonl"
        book.write_text(text)
        asked = [json.dumps({"question": needle.answer_prefix, "id": needle.key}) for needle in needles]
        questions.write_text("\n".join(asked) + "\n")
        command = [
            sys.executable, "-m", "longrun.chat", "--model", args.model, "--ctx", args.length, "--file", book,
            "--ask", questions, "--max-new-tokens", 8, "--json", *args.chat,
        ]  # fmt: skip
        started = time.perf_counter()
        chat = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
    if chat.returncode:
        raise InputError(f"the chat ended with status {chat.returncode}: what it said stands above")
    answers = [json.loads(line) for line in chat.stdout.splitlines()]
    rows = [_row(answer, number / max(1, len(needles) - 1)) for number, answer in enumerate(answers)]
    first = answers[0]
    read, found = first["texts"], sum(row["right"] for row in rows)
    rate = read["prefill_tokens_per_s"]
    print(
        f"{read['prefilled']:,} tokens read in {read['prefill_s']:.1f} s, {rate:,.0f} tokens/s; "
        f"{found} of {len(rows)} numbers found; the whole process {seconds:.1f} s"
    )
    return finish(
        {
            "benchmark": "reading", "model": model_name(args.model), "note": NOTE, "length": args.length,
            "process_seconds": seconds, "load_s": first["timings"]["load_s"], "read": read,
            "prefill": first["prefill"], "found": found, "questions": len(rows), "rows": rows,
        },
        args,
    )  # fmt: skip


def _row(answer: dict[str, Any], depth: float) -> dict[str, Any]:
    said = "".join(re.findall(r"\d", answer["text"]))
    return {
        "depth": depth, "number": answer["id"], "answer": answer["text"], "right": said == answer["id"],
        "question_prefill_s": answer["timings"]["prefill_s"], "decode_ms": answer["timings"]["decode_ms_per_token"],
    }  # fmt: skip
