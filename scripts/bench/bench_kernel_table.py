"""Every kernel alone: runs the kernels' own benchmarks and puts what they measured into one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from rich.console import Console

from longrun.errors import InputError
from longrun.units import parse_tokens
from scripts.bench.bench_common import finish_timed, release, save
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.kernel_rows import CEILING_KINDS, table


def _measure(module: str) -> Callable[..., Iterable[dict[str, Any]]]:
    return lambda **options: import_module(f"scripts.bench.{module}").measure(**options)


BENCHMARKS: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "page_decode": _measure("bench_kernels"),
    "page": _measure("bench_page_kernels"),
    "select": _measure("bench_select"),
    "hot": _measure("bench_hot_pages"),
    "tiles": _measure("bench_tiles"),
    "fused": _measure("bench_fused_kernels"),
    "vector_linear": _measure("bench_vector_linear"),
    "streaming": _measure("bench_streaming_kernels"),
}


def run(args: argparse.Namespace) -> int:
    """The command `kernels`. A benchmark that fails is a line of the result, the others run, and the status is 1."""
    wanted = [name.strip() for name in args.only.split(",")] if args.only else list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        raise InputError(f"--only {unknown[0]} is no kernel benchmark: choose from {', '.join(BENCHMARKS)}")
    if not torch.cuda.is_available():
        raise InputError(
            "torch finds no GPU here, and the kernel benchmarks need one: run them on a machine with a GPU"
        )
    device, console = torch.device("cuda"), Console(width=180)
    past, chunk = parse_tokens(args.tokens, "--tokens"), parse_tokens(args.chunk, "--chunk")
    options = {"tiles": {"past": past, "tokens": chunk, "tune": args.tune}}
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    ceilings = measure_ceilings(device, *CEILING_KINDS)
    result = {"benchmark": "kernels", "ceilings": ceilings, "rows": rows, "problems": problems}
    for name in wanted:
        try:
            for row in BENCHMARKS[name](**options.get(name, {})):
                rows.append({"benchmark": name, **row})
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:500]
        release(device)
        save(result, args)
    console.print(table(rows))
    for name, problem in problems.items():
        console.print(f"FAILED: {name}: {problem}", highlight=False, markup=False)
    finish_timed(result, args)
    return 1 if problems else 0
