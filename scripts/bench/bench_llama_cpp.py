"""longrun and llama.cpp on a CPU in turns: the same GGUF file, random tokens and number of threads.

llama.cpp runs in a process of its own, with the interpreter of an environment that has llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.errors import InputError, short_path
from longrun.hub.names import model_name
from longrun.units import format_tokens
from scripts.bench.bench_common import finish_timed, parse_lengths, percent, save
from scripts.bench.bench_decode import token_bytes
from scripts.bench.bench_peer import Longrun
from scripts.bench.bench_prefill import prefill_flops
from scripts.bench.ceilings import measure_ceilings

_CHILD = Path(__file__).with_name("llama_cpp_child.py")
_MARGIN = 8  # tokens of the context beyond prompt and answer


@dataclass
class Row:
    """One runner at one length. Ratios are its speed over llama.cpp's (above 1: faster), medians over pairs of runs;
    shares are those of `bench_peer.Row`. `best`: the least of all runs, which says most on a shared machine."""

    runner: str
    length: int
    prefill_tokens_per_s: float
    decode_ms: float
    best_decode_ms: float
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    prefill_of_product: float | None = None
    decode_of_memory: float | None = None
    prefill_runs: tuple[float, ...] = ()
    decode_runs: tuple[float, ...] = ()


class LlamaCpp:
    """llama.cpp in a process of its own, with threads that sleep between runs."""

    name = "llama.cpp, f16 cache"

    def __init__(self, python: Path, gguf: Path, threads: int, context: int, new_tokens: int) -> None:
        """Raises InputError where that interpreter cannot run llama.cpp on the file."""
        self.new_tokens = new_tokens
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")
        }
        self._process = subprocess.Popen(
            [str(python), str(_CHILD), str(gguf), str(threads), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:]
            raise InputError(f"llama.cpp ended ({last[0] if last else 'no message'}): see --python and --model")
        return json.loads(line)

    def run(self, token_ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of prefill, and of one decoded token."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([token_ids.tolist(), self.new_tokens]) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        return found["prefill"], found["decode"]

    def close(self) -> None:
        self._process.communicate()


def run(args: argparse.Namespace) -> int:
    """The command `llama-cpp`."""
    if not (args.model.is_file() and args.model.suffix == ".gguf"):
        raise InputError(f"--model {short_path(args.model)} is no GGUF file: llama.cpp reads nothing else, name one")
    if not args.python.is_file():
        raise InputError(f"--python {short_path(args.python)} is not a file: name an interpreter with llama-cpp-python")
    threads = torch.get_num_threads()
    ceilings = measure_ceilings(torch.device("cpu"), "memory", "matmul")
    result: dict[str, Any] = {
        "benchmark": "llama-cpp", "model": model_name(args.model), "threads": threads, "ceilings": ceilings,
        "load_average": os.getloadavg(), "repeats": args.repeats, "new_tokens": args.new_tokens, "rows": [],
    }  # fmt: skip
    rows: list[Row] = []
    for length in parse_lengths(args.lengths):
        other = LlamaCpp(args.python, args.model, threads, length + args.new_tokens + _MARGIN, args.new_tokens)
        try:
            rows += compare(args.model, other, length, args, ceilings)
        finally:
            other.close()
        result |= {"llama_cpp": other.about, "rows": [asdict(row) for row in rows]}
        save(result, args)
    print_rows(rows)
    return finish_timed(result, args)


def compare(
    gguf: Path, other: LlamaCpp, length: int, args: argparse.Namespace, ceilings: dict[str, float]
) -> list[Row]:
    ours = [
        Longrun("full map", gguf, "full", length, args.new_tokens, args.chunk_size, weight_format.strip())
        for weight_format in args.weight_formats.split(",")
    ]
    config = ours[0].runtime.config
    token_ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    runners: list[LlamaCpp | Longrun] = [other, *ours]
    for runner in runners:
        runner.run(token_ids[: min(length, 512)])
    runs: list[list[tuple[float, float]]] = [[] for _ in runners]
    for _ in range(args.repeats):
        for runner, found in zip(runners, runs, strict=True):
            found.append(runner.run(token_ids))
    rows = []
    for runner, found in zip(runners, runs, strict=True):
        prefills, decodes = ([pair[i] for pair in found] for i in (0, 1))
        row = Row(
            runner.name, length, length / statistics.median(prefills), 1e3 * statistics.median(decodes),
            1e3 * min(decodes), prefill_runs=tuple(prefills), decode_runs=tuple(decodes),
        )  # fmt: skip
        if isinstance(runner, Longrun):
            pairs = list(zip(runs[0], found, strict=True))
            row.prefill_ratio = statistics.median(a[0] / b[0] for a, b in pairs)
            row.decode_ratio = statistics.median(a[1] / b[1] for a, b in pairs)
            plan, flops = runner.runtime.plan, prefill_flops(config, runner.runtime.split, length)
            row.prefill_of_product = (
                sum(flops.values()) / statistics.median(prefills) / ceilings["matmul_tflops"] / 1e12
            )
            moved = sum(token_bytes(config, plan.weight_format, "cpu", plan.cache, length).values())
            row.decode_of_memory = moved / statistics.median(decodes) / ceilings["memory_tb_s"] / 1e12
        rows.append(row)
    return rows


def print_rows(rows: list[Row]) -> None:
    table = Table(
        "runner", "tokens", "prefill tokens/s", "x", "decode ms/token", "least", "x", "of product", "of memory"
    )
    for row in rows:
        ratios = [f"{value:.2f}" if value else "" for value in (row.prefill_ratio, row.decode_ratio)]
        table.add_row(
            row.runner, format_tokens(row.length), f"{row.prefill_tokens_per_s:.0f}", ratios[0],
            f"{row.decode_ms:.1f}", f"{row.best_decode_ms:.1f}", ratios[1],
            percent(row.prefill_of_product), percent(row.decode_of_memory),
        )  # fmt: skip
    Console().print(table)
