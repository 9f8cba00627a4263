"""What a GGUF file loses when it is loaded as `int4`, `nf4` or `int8`, and how long loading takes.

KL and top-1 agreement of the next token are measured against the same file as `bf16`, its own values, over the first
tokens of a text file, under full attention with bf16 pages. `fp32` as a format shows what rounding to bf16 does by
itself. With --load-times, longrun's loads and transformers' reader run by turns, each in a process of its own.
Example: python scripts/quality/gguf_loss.py my-model.gguf my-text.txt --load-times --out loss.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import longrun
from longrun.arguments import COUNT, whole
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.files.user_files import read_text
from longrun.files.whole_file import write_whole
from longrun.lab.quality.measures import compare_blocks
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.quant.weight_format import WEIGHT_FORMATS

REFERENCE = "bf16"
TIMED = ("bf16", "int4")
PIECE = 256
# Seconds from the first import but torch's to the loaded model, and CPU seconds of all threads in that time.
_CHILD = """
import sys, time, torch
model, kind, since, cpu = sys.argv[1], sys.argv[2], time.perf_counter(), time.process_time()
if kind == "transformers":
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    file = Path(model)
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
else:
    import longrun
    longrun.load(model, device="cpu", weight_format=kind, ctx=2048)
print(time.perf_counter() - since, time.process_time() - cpu)
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_option, help="GGUF file")
    parser.add_argument("text", type=path_option, help="text file in UTF-8")
    parser.add_argument("--tokens", type=COUNT, default=1024, metavar="N", help="of the text (default: 1024)")
    parser.add_argument("--formats", nargs="+", choices=WEIGHT_FORMATS, default=["int8", "int4"], metavar="FORMAT")
    parser.add_argument(
        "--load-times", type=whole(), nargs="?", const=3, default=0, metavar="N", help="N runs of each (3)"
    )
    parser.add_argument("--out", required=True, type=path_option, metavar="FILE", help="JSON file")
    return parser.parse_args(argv)


def next_tokens(model: Path, weight_format: str, text: str, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The first tokens of the text, and float32 [n - 1, vocab_size]: log-probabilities that predict all but the first.

    Raises:
        InputError: no tokenizer, or a text of fewer tokens.
    """
    runtime = longrun.load(model, kv_format="bf16", weight_format=weight_format, ctx=num_tokens + PIECE)
    if runtime.tokenizer is None:
        raise InputError(f"{model} has no tokenizer to read a text with: use a file that holds one")
    token_ids = runtime.tokenizer(text, add_special_tokens=True)["input_ids"][:num_tokens]
    if len(token_ids) < max(num_tokens, 2):
        raise InputError(f"the text has {len(token_ids):,} tokens where --tokens is {num_tokens:,}: give a longer one")
    session = runtime.new_session()
    session.prefill(token_ids[:1])
    found = torch.empty(num_tokens - 1, runtime.config.vocab_size)
    for start in range(1, num_tokens, PIECE):
        rows = session.score(token_ids[start : start + PIECE])
        found[start - 1 :][: len(rows)] = torch.log_softmax(rows.float(), dim=-1)
    return token_ids, found


def compare(model: Path, text: str, num_tokens: int, formats: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each format: means of KL(bf16 || format) and of its own loss in nats, share of equal likeliest tokens."""
    token_ids, reference = next_tokens(model, REFERENCE, text, num_tokens)
    for name in [REFERENCE, *formats]:
        own = reference if name == REFERENCE else next_tokens(model, name, text, num_tokens)[1]
        blocks = compare_blocks(own, reference, token_ids[1:])
        count = sum(block["tokens"] for block in blocks)
        means = (sum(block[key] * block["tokens"] for block in blocks) / count for key in ("nll", "kl", "top1"))
        yield name, dict(zip(("nll", "kl", "top1"), means, strict=True))


def load_times(model: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """By weight format, and for transformers' reader (bf16): seconds of every load, and CPU seconds of all threads."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*TIMED, "transformers")}
    for _ in range(repeats):
        for name, times in found.items():
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, str(model.resolve()), name], capture_output=True, text=True,
                cwd=Path(__file__).resolve().parents[2],
            )  # fmt: skip
            if done.returncode:
                raise InputError(f"loading as {name} failed: {done.stderr.strip().splitlines()[-1]}")
            seconds, cpu = map(float, done.stdout.split()[-2:])
            times.append({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    text = read_text(arguments.text, InputError, "give a text file in UTF-8")
    result: dict[str, Any] = {
        "environment": environment(), "model": arguments.model.name, "text": arguments.text.name,
        "tokens": arguments.tokens, "kv_format": "bf16", "reference": REFERENCE,
    }  # fmt: skip
    if arguments.load_times:  # first: nothing of this process is in the way yet
        result["load_times"] = load_times(arguments.model, arguments.load_times)
        print(json.dumps(result["load_times"]))
    result["formats"] = {}
    for name, found in compare(arguments.model, text, arguments.tokens, arguments.formats):
        print(name, json.dumps(found), flush=True)
        result["formats"][name] = found
        write_whole(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run(main)
