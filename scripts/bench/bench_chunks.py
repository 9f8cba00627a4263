"""Chunks of a prefill behind long texts, timed over a synthetic cache: exact and sparse, with pages on the host too.

What a chunk takes grows evenly with what lies before it, so two lengths give an estimate for a whole text. All rows are
of one run. Of rows of the same length, `against_exact` says how much faster one is than the one that reads everything
with the same share of the pages on the device, and `against_resident` how much longer it takes a token than the one of
the same share with all pages there. Content is random (sparse prefill then reads the share that it is given, whatever a
page holds), so this is good for timing only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.errors import InputError
from longrun.lab.synthetic_session import make_synthetic
from longrun.runtime.runtime import Runtime
from longrun.specs.prefill_spec import DEFAULT_PREFILL, PrefillSpec
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
from scripts.bench.bench_prefill import chunk_clock, session_rates
from scripts.bench.ceilings import measure_ceilings

WARM_CHUNKS = 1  # brings what libraries load and plan
REST = DEFAULT_PREFILL.dense_end  # tokens of the document that stay unread: its end is read exactly


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


def chunk_row(
    runtime: Runtime, length: int, count: int, seed: int, ceilings: dict[str, float], memory: MemoryWatch
) -> dict[str, Any]:
    """What `count` whole chunks behind `length` tokens and those that warm up take, in a session of its own."""
    memory.start()
    chunk, session = runtime.plan.chunk_size, runtime.new_session()
    make_synthetic(session, length, seed)
    warm, timed = WARM_CHUNKS * chunk, count * chunk
    tokens = torch.randint(0, session.vocab_size, (warm + timed,), generator=torch.Generator().manual_seed(seed))
    session.prefill(tokens[:warm], more=timed + REST)
    before = session.prefill_counts
    ends, progress = chunk_clock(session.cache.device)
    start = time.perf_counter()
    session.prefill(tokens[warm:], progress=progress, more=REST)
    rates = session_rates(runtime, session, timed, ends[-1] - start, ceilings, before, length + warm)
    sparse = rates.pop("read_sparsely", {})
    return {
        "chunk_size": chunk, "host_pages": session.cache.spec.host_pages,
        "chunk_seconds": [end - begin for begin, end in pairwise([start, *ends])], **rates,
        **{name: sparse.get(name) for name in ("read_share", "caught_share")}, "memory": memory.measure(session.plan),
    }  # fmt: skip


def with_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row `against_exact` and `against_resident`, None where there is nothing to compare with, and what a
    text of its length would take: the line through its settings' shortest and this length, summed over all chunks."""
    done = [row for row in rows if "error" not in row]
    for row in done:
        same = [other for other in done if other["device_share"] == row["device_share"]]
        exact = next((o for o in same if (o["share"], o["length"]) == ("all", row["length"])), None)
        spills = row["host_pages"] > 0
        same = [o for o in same if (o["share"], o["host_pages"] > 0) == (row["share"], spills)]
        there = [o for o in done if (o["share"], o["length"], o["host_pages"]) == (row["share"], row["length"], 0)]
        row["against_exact"] = None if exact is None else row["tokens_per_s"] / exact["tokens_per_s"]
        row["against_resident"] = there[0]["tokens_per_s"] / row["tokens_per_s"] if there else None
        shortest = min(same, key=lambda other: other["length"])
        if shortest["length"] == row["length"]:
            continue
        by_chunk = [one["chunk_size"] / one["tokens_per_s"] for one in (shortest, row)]
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
    room = (WARM_CHUNKS + args.chunks) * base.plan.chunk_size + REST
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "chunks", "settings": describe(base, args), "ceilings": ceilings, "rows": rows}
    # The largest host pool comes first: it is pinned once, and serves the others.
    for length, on_device, share in product(sorted(lengths, reverse=True), sorted(args.device_share), shares):

        def measured(length: int = length, on_device: float = on_device, share: float | None = share) -> dict[str, Any]:
            spec = "exact" if share is None else PrefillSpec(dense_tokens=0, cap=share)
            runtime = base.derive(ctx=length + room, prefill=spec, device_share=on_device)
            return chunk_row(runtime, length, args.chunks, args.seed, ceilings, memory)

        row = {"length": length, "share": "all" if share is None else share, "device_share": on_device}
        rows.append(or_out_of_memory({**row, "synthetic": True}, measured, device))
        with_ratios(rows)
        save(result, args)
    console.print(table(rows))
    return finish_timed(result, args)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table(
        "tokens before", "on device", "pages read", "s a chunk", "tokens/s", "of both", "x exact", "x resident's time",
        "text", "memory",
    )  # fmt: skip
    for row in rows:
        share = "all" if row["share"] == "all" else percent(row["share"])
        start = (tokens_text(row["length"]), percent(row["device_share"]), share)
        if "error" in row:
            found.add_row(*start, row["error"])
            continue
        text = row.get("estimated_seconds_of_text")
        found.add_row(
            *start, figure(row["seconds"] / len(row["chunk_seconds"]), 3), figure(row["tokens_per_s"], 0),
            percent(row["of_matmul_and_attention"]), figure(row["against_exact"]), figure(row["against_resident"]),
            "-" if text is None else f"{text:.0f} s", memory_text(row["memory"]),
        )  # fmt: skip
    return found
