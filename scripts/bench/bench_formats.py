"""Prefill in several weight or page formats, taking turns in one process: a GPU's clock drifts from run to run."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.errors import InputError
from longrun.quant.kv_format import KV_FORMATS
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from scripts.bench.bench_common import (
    check_device,
    describe,
    figure,
    finish_timed,
    load_runtime,
    parse_lengths,
    percent,
    release,
    save,
    synchronize,
)
from scripts.bench.bench_prefill import ideal_seconds, prefill_flops
from scripts.bench.ceilings import measure_ceilings

BASE = "bf16"  # of weight formats; of page formats it is the first one named


def parse_kv_formats(text: str) -> list[str]:
    """The page formats, the first of which the others are compared with.

    Raises:
        InputError: fewer than two, one twice, or an unknown one.
    """
    formats = [name.strip() for name in text.split(",") if name.strip()]
    if len(formats) < 2 or len(set(formats)) != len(formats) or set(formats) - set(KV_FORMATS):
        raise InputError(f"--kv-formats {text}: give at least two of {', '.join(KV_FORMATS)}, each once")
    return formats


def parse_formats(text: str) -> list[str]:
    """The formats, `BASE` first.

    Raises:
        InputError: none besides it, or one twice.
    """
    formats = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(formats)) != len(formats) or not set(formats) - {BASE}:
        raise InputError(f"--weight-formats {text} names none besides {BASE}, or one twice: give nf4,int4,int8")
    return [BASE, *(name for name in formats if name != BASE)]


def read_seconds(session: Session, token_ids: torch.Tensor) -> float:
    """Seconds of reading the text into the session, which is left empty again."""
    empty = session.mark()
    synchronize(session.cache.device)
    start = time.perf_counter()
    session.prefill(token_ids)
    synchronize(session.cache.device)
    seconds = time.perf_counter() - start
    session.rewind(empty)
    return seconds


def run(args: argparse.Namespace) -> int:
    """The command `formats`. All models are held at once, and read the text by turns, in changing order."""
    device = check_device(args.device)
    lengths = parse_lengths(args.length)
    if len(lengths) != 1 or args.repeats < 1:
        raise InputError("formats needs one length and at least one repeat: give --length 64K --repeats 3")
    axis, key = ("kv", "kv_format") if args.kv_formats else ("weight_format", "weight_format")
    formats = parse_kv_formats(args.kv_formats) if args.kv_formats else parse_formats(args.weight_formats)
    base, length = formats[0], lengths[0]
    ceilings = measure_ceilings(device, "matmul", "attention")
    runtimes: dict[str, Runtime] = {}
    for name in formats:
        setattr(args, axis, name)
        runtimes[name] = load_runtime(args, length)
    sessions = {name: runtime.new_session(length) for name, runtime in runtimes.items()}
    generator = torch.Generator().manual_seed(args.seed)
    token_ids = torch.randint(0, runtimes[base].config.vocab_size, (length,), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in formats}
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "formats", "settings": describe(runtimes[base], args), "length": length, "repeats": args.repeats,
        "ceilings": ceilings, "rows": rows,
    }  # fmt: skip
    result["settings"][key] = ", ".join(formats)
    for turn in range(args.repeats + 1):
        for name in formats if turn % 2 else reversed(formats):
            taken = read_seconds(sessions[name], token_ids)
            if turn:  # the first compiles, and builds what libraries build for new shapes
                seconds[name].append(taken)
    ideal = ideal_seconds(prefill_flops(runtimes[base].config, runtimes[base].split, length), ceilings)
    for name in formats:
        median = statistics.median(seconds[name])
        ratios = [own / base for own, base in zip(seconds[name], seconds[base], strict=True)]
        rows.append({
            key: name, "seconds": seconds[name], "median_seconds": median, "of_matmul_and_attention": ideal / median,
            f"over_{base}": statistics.median(ratios),
        })  # fmt: skip
        save(result, args)
    del sessions, runtimes
    release(device)
    Console(width=120).print(table(rows, length, key, base))
    return finish_timed(result, args)


def table(rows: list[dict[str, Any]], length: int, key: str, base: str) -> Table:
    """The rows as a person reads them."""
    found = Table(
        "pages" if key == "kv_format" else "weights",
        "seconds",
        "tokens/s",
        f"time against {base}",
        "of product and attention",
    )
    for row in rows:
        median = row["median_seconds"]
        found.add_row(
            row[key],
            figure(median, 3),
            figure(length / median, 0),
            percent(row[f"over_{base}"]),
            percent(row["of_matmul_and_attention"]),
        )
    return found
