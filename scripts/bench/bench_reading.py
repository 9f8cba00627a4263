"""How long `longrun.chat` takes to read a text, and whether it finds what is hidden there.

The text is made for a planted model (scripts/make_planted_model.py): sentences with numbers hidden at even depths, the
first before the first sentence and the last behind the last. The chat runs as its users run it, one process that reads
the text with --file and answers one question about each number with --ask. What stands behind `--` goes to it. The
ceilings are measured after it has ended: until then this process takes nothing of a GPU.
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

import torch

from longrun.chat.options import read_options
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.hub.names import model_name
from longrun.lab.planted import NOTE, is_planted
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import Needle, generate_sentences, make_needles
from longrun.plan.budget import Budget
from longrun.plan.split import budget_by_hand, choose_split
from longrun.units import parse_tokens
from scripts.bench.bench_common import DEFAULT_BUDGETS, finish, percent
from scripts.bench.bench_prefill import prefill_flops, reading_rates, sparse_flops
from scripts.bench.ceilings import measure_ceilings

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
    command = ["--model", args.model, "--ctx", args.length, "--max-new-tokens", 8, "--json", *args.chat]
    options = read_options([*map(str, command), "--prompt", "x"])
    if options.head_map == "auto":
        raise InputError("--head-map auto is not known before the chat runs: give a folder, or full")
    needles = make_needles(args.needles, args.seed)
    text = text_with_needles(load_tokenizer(args.model), args.length, needles, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        book, questions = Path(folder) / "book.txt", Path(folder) / "questions.jsonl"
        book.write_text(text)
        asked = [json.dumps({"question": needle.answer_prefix, "id": needle.key}) for needle in needles]
        questions.write_text("\n".join(asked) + "\n")
        command = [sys.executable, "-m", "longrun.chat", *command, "--file", book, "--ask", questions]
        started = time.perf_counter()
        chat = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
    if chat.returncode:
        raise InputError(f"the chat ended with status {chat.returncode}: what it said stands above")
    answers = [json.loads(line) for line in chat.stdout.splitlines()]
    rows = [_row(answer, number / max(1, len(needles) - 1)) for number, answer in enumerate(answers)]
    read, found = _rates(args.model, options, answers[0]), sum(row["right"] for row in rows)
    print(
        f"{read['tokens']:,} tokens read in {read['seconds']:.1f} s, {read['tokens_per_s']:,.0f} tokens/s, "
        f"{percent(read['of_matmul_and_attention'])} of matrix product and attention; "
        f"{found} of {len(rows)} numbers found; the whole process {seconds:.1f} s"
    )
    return finish(
        {
            "benchmark": "reading", "model": model_name(args.model), "note": NOTE, "length": args.length,
            "process_seconds": seconds, "load_s": answers[0]["timings"]["load_s"], "read": read,
            "found": found, "questions": len(rows), "rows": rows,
        },
        args,
    )  # fmt: skip


def _rates(model: Path, options: argparse.Namespace, answer: dict[str, Any]) -> dict[str, Any]:
    """Speed of reading the text, by the operations that were done, and as shares of the ceilings."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ceilings = measure_ceilings(device, "matmul", "attention")
    config, budget = ModelConfig.from_dir(model), Budget.load(options.budget or DEFAULT_BUDGETS[device.type])
    budget = budget_by_hand(budget, options.retrieval_ratio, options.kv_bytes)
    split = choose_split(config, budget, options.head_map, options.retrieval_ratio, capacity=parse_tokens(options.ctx))
    tokens, seconds = answer["texts"]["prefilled"], answer["texts"]["prefill_s"]
    flops, prefill = prefill_flops(config, split.split, tokens), answer["prefill"]
    if prefill is not None and prefill["read"] is not None:
        counts = prefill["read"]
        flops = sparse_flops(
            flops, config.head_dim, budget.page_size, prefill["settings"]["rows"], counts["pages_read"], counts["pages"]
        )
    rates = reading_rates(flops, tokens, seconds, ceilings)
    return {"tokens": tokens, **rates, "prefill": prefill, "ceilings": ceilings}


def _row(answer: dict[str, Any], depth: float) -> dict[str, Any]:
    said = "".join(re.findall(r"\d", answer["text"]))
    return {
        "depth": depth, "number": answer["id"], "answer": answer["text"], "right": said == answer["id"],
        "question_prefill_s": answer["timings"]["prefill_s"], "decode_ms": answer["timings"]["decode_ms_per_token"],
    }  # fmt: skip
