"""Milliseconds of a session's mark and rewind, by the streaming heads' window, against the memory's floor.

A mark copies tails and rings on their device: its floor is a read and a write of these bytes, and so is a rewind's.
Between the two, `--tokens` more are read, which overwrite windows of up to that many tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.runtime.runtime import Runtime
from longrun.units import format_bytes, parse_tokens
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
    spread,
    synchronize,
)
from scripts.bench.bench_decode import fill
from scripts.bench.ceilings import measure_ceilings


def measure(runtime: Runtime, length: int, args: argparse.Namespace, ceilings: dict[str, Any]) -> dict[str, Any]:
    """One row: medians over repeats of mark, read, rewind."""
    device, tokens = torch.device(args.device), parse_tokens(args.tokens, "--tokens")
    session = runtime.new_session(length + tokens)
    fill(session, length, True, args.seed)
    more = torch.randint(0, session.vocab_size, (tokens,), generator=torch.Generator().manual_seed(args.seed))
    times: dict[str, list[float]] = {"mark_ms": [], "rewind_ms": []}
    for _ in range(args.repeats):
        synchronize(device)
        begin = time.perf_counter()
        mark = session.mark()
        synchronize(device)
        times["mark_ms"].append(1e3 * (time.perf_counter() - begin))
        session.prefill(more)
        synchronize(device)
        begin = time.perf_counter()
        session.rewind(mark)
        synchronize(device)
        times["rewind_ms"].append(1e3 * (time.perf_counter() - begin))
        del mark
    copied = session.cache.spec.exact_bytes
    floor_ms = 2 * 2 * copied / (ceilings["memory_tb_s"] * 1e12) * 1e3
    row = {name: spread(values) for name, values in times.items()}
    both = row["mark_ms"]["median"] + row["rewind_ms"]["median"]
    return {
        "window": runtime.split.recent_size, "length": length, "tokens": tokens, "copied_bytes": copied, **row,
        "floor_ms": floor_ms, "floor_over_measured": floor_ms / both,
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The command `marks`."""
    device, rows = check_device(args.device), []
    ceilings = measure_ceilings(device, "memory")
    length = parse_tokens(args.length, "--length")
    result: dict[str, Any] = {"benchmark": "marks", "ceilings": ceilings, "rows": rows}
    for window in parse_lengths(args.windows, "--windows"):
        runtime = load_runtime(args, length + parse_tokens(args.tokens, "--tokens"), recent_size=window)
        rows.append({**measure(runtime, length, args, ceilings), "settings": describe(runtime, args)})
        save(result, args)
        del runtime
        release(device)
    table = Table("window", "copied", "ms to mark", "to rewind", "floor", "share")
    for row in rows:
        table.add_row(
            f"{row['window']:,}", format_bytes(row["copied_bytes"]),
            *(figure(row[name]["median"], 3) for name in ("mark_ms", "rewind_ms")), figure(row["floor_ms"], 3),
            percent(row["floor_over_measured"]),
        )  # fmt: skip
    Console(width=120).print(table)
    return finish_timed(result, args)
