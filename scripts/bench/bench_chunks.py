"""Chunks of a prefill behind long texts, timed over a synthetic cache: read exactly, and with shares of the pages.

What a chunk takes grows evenly with what lies before it, so two lengths give an estimate for a whole text. All rows are
of one run; `against_exact` compares with the row of the same length that reads everything. Content is random (sparse
prefill then reads the share that it is given, whatever a page holds), so this is good for timing only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.errors import InputError
from longrun.lab.synthetic_session import make_synthetic
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.prefill_spec import PrefillSpec
from scripts.bench.bench_common import (
    MemoryWatch,
    check_device,
    describe,
    figure,
    finish_timed,
    load_runtime,
    memory_text,
    or_out_of_memory,
    parse_lengths,
    percent,
    save,
    tokens_text,
)
from scripts.bench.bench_prefill import chunk_clock, ideal_seconds, prefill_flops
from scripts.bench.ceilings import measure_ceilings

WARM_CHUNKS = 1  # brings what libraries load and plan


def parse_shares(text: str) -> list[float | None]:
    """Shares of the pages that tiles read: `all` is exact, `8%` a PrefillSpec that reads no more and no less.

    Raises:
        InputError: something else.
    """
    found: list[float | None] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            share = None if part == "all" else float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if share is not None and not 0 < share <= 1:
            raise InputError(f"--shares {part!r} is no share of the pages: give some of all, 8%, 15%")
        found.append(share)
    return found


def spec_of(share: float | None) -> PrefillSpec | None:
    """Every tile reads this share of the past's pages, from the text's beginning on; None reads all."""
    return None if share is None else PrefillSpec(dense_tokens=0, cap=share)


def read_chunks(session: Session, count: int, seed: int) -> list[float]:
    """Seconds of each of `count` whole chunks behind the session's tokens, after those that warm up.

    Where a document's end is read exactly, it follows them.
    """
    spec, chunk = session.plan.attention.prefill, session.plan.chunk_size
    rest = 0 if spec is None else spec.dense_end
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, session.vocab_size, ((WARM_CHUNKS + count) * chunk + rest,), generator=generator)
    ends, progress = chunk_clock(session.cache.device)
    session.prefill(tokens, progress=progress)
    return [end - begin for begin, end in pairwise(ends[WARM_CHUNKS - 1 : WARM_CHUNKS + count])]


def chunk_row(
    runtime: Runtime, length: int, count: int, seed: int, ceilings: dict[str, float], memory: MemoryWatch
) -> dict[str, Any]:
    """What chunks behind `length` tokens take, in a session of its own."""
    memory.start()
    spec, chunk = runtime.plan.attention.prefill, runtime.plan.chunk_size
    first = length + WARM_CHUNKS * chunk
    stop = first + count * chunk
    session = runtime.new_session(stop + (0 if spec is None else spec.dense_end) + 1)
    make_synthetic(session, length, seed)
    seconds = read_chunks(session, count, seed)
    before = prefill_flops(runtime.config, runtime.split, first)
    flops = {name: all_ - before[name] for name, all_ in prefill_flops(runtime.config, runtime.split, stop).items()}
    counts = session.prefill_counts
    return {
        "chunk_size": chunk, "chunk_seconds": seconds, "seconds": sum(seconds),
        "tokens_per_s": count * chunk / sum(seconds), "exact_flops": flops,
        "exact_of_matmul_and_attention": ideal_seconds(flops, ceilings) / sum(seconds),
        "read_share": None if counts is None else counts.read_share,
        "caught_share": None if counts is None else counts.caught_share,
        "memory": memory.measure(session.plan),
    }  # fmt: skip


def with_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add how much faster than exact each row's chunks are read, and what a text of its length would take: the line
    through a share's shortest and this length, summed over all chunks."""
    for row in rows:
        if "error" in row:
            continue
        same = [other for other in rows if "error" not in other and other["share"] == row["share"]]
        exact = [other for other in rows if "error" not in other and other["share"] == "all"]
        exact = [other for other in exact if other["length"] == row["length"]]
        row["against_exact"] = exact[0]["seconds"] / row["seconds"] if exact else None
        shortest = min(same, key=lambda other: other["length"])
        if shortest["length"] == row["length"]:
            continue
        by_chunk = [sum(one["chunk_seconds"]) / len(one["chunk_seconds"]) for one in (shortest, row)]
        slope = (by_chunk[1] - by_chunk[0]) / (row["length"] - shortest["length"])
        at_zero = by_chunk[0] - slope * shortest["length"]
        chunks = row["length"] / row["chunk_size"]
        row["estimated_seconds_of_text"] = chunks * (at_zero + slope * row["length"] / 2)


def run(args: argparse.Namespace) -> int:
    """The command `chunks`."""
    device = check_device(args.device)
    lengths, shares = parse_lengths(args.lengths), parse_shares(args.shares)
    if not lengths:
        raise InputError("chunks needs at least one length: give --lengths 128K")
    if args.prefill is not None:
        raise InputError(f"chunks reads by each of --shares, --prefill {args.prefill} says nothing: leave it out")
    memory = MemoryWatch(device)
    ceilings = measure_ceilings(device, "matmul", "attention")
    console = Console(width=160)
    base = load_runtime(args, max(lengths))
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "chunks", "settings": describe(base, args), "ceilings": ceilings, "rows": rows}
    for share in shares:
        spec = spec_of(share)
        for length in lengths:
            room = (WARM_CHUNKS + args.chunks) * base.plan.chunk_size + (0 if spec is None else spec.dense_end) + 1
            row = {"length": length, "share": "all" if share is None else share, "synthetic": True}

            def measured(spec: PrefillSpec | None = spec, length: int = length, room: int = room) -> dict[str, Any]:
                runtime = base.derive(ctx=length + room, prefill="exact" if spec is None else spec)
                return chunk_row(runtime, length, args.chunks, args.seed, ceilings, memory)

            rows.append(or_out_of_memory(row, partial(measured), device))
            with_ratios(rows)
            save(result, args)
    console.print(table(rows))
    return finish_timed(result, args)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table("tokens before", "pages", "s a chunk", "tokens/s", "of exact's ceilings", "x exact", "text", "memory")
    for row in rows:
        share = "all" if row["share"] == "all" else percent(row["share"])
        if "error" in row:
            found.add_row(tokens_text(row["length"]), share, row["error"])
            continue
        ratio, text = row["against_exact"], row.get("estimated_seconds_of_text")
        found.add_row(
            tokens_text(row["length"]), share, figure(row["seconds"] / len(row["chunk_seconds"]), 3),
            figure(row["tokens_per_s"], 0), percent(row["exact_of_matmul_and_attention"]),
            "-" if ratio is None else figure(ratio), "-" if text is None else f"{text:.0f} s",
            memory_text(row["memory"]),
        )  # fmt: skip
    return found
