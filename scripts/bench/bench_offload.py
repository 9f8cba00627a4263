"""Offload: decode with most pages in host memory, against what the link to the host allows and against all-resident."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.cache.spans import HOST
from longrun.errors import InputError, PlanError
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.units import format_bytes, parse_bytes, parse_tokens
from scripts.bench.bench_common import (
    MemoryWatch,
    check_device,
    describe,
    figure,
    finish_timed,
    load_runtime,
    memory_text,
    percent,
    release,
    save,
    spread,
    synchronize,
    tokens_text,
)
from scripts.bench.bench_decode import WARM_TOKENS, decoded_tokens, fill, floor, graph_ms, time_tokens, token_bytes
from scripts.bench.ceilings import measure_ceilings


def host_bytes_per_token(session: Session) -> int:
    """Payload bytes in the host pool that a token reads: all, or where pages are selected at most so many."""
    spec, selects = session.cache.spec, session.plan.attention.selects
    layers = [pages for pages, _ in session.cache.layers if pages is not None]
    most = [p.num_heads * session.plan.attention.most_read_pages if selects else p.num_pages(HOST) for p in layers]
    return sum(min(p.num_pages(HOST), n) for p, n in zip(layers, most, strict=True)) * spec.page_format.payload_bytes


def measure(runtime: Runtime, runner: str, args: argparse.Namespace, ceilings: dict, memory: MemoryWatch) -> tuple:
    """One session: its row, and what is compared between sessions (token ids, logits after the fill)."""
    device, length = torch.device(args.device), parse_tokens(args.length, "--length")
    memory.start()
    start = time.perf_counter()
    session = runtime.new_session(length + decoded_tokens(args) + 1)
    synchronize(device)
    allocated = time.perf_counter() - start
    filled = fill(session, length, args.synthetic_cache, args.seed)
    logits = session.logits.float().cpu()
    tokens = session.generate(decoded_tokens(args), eos=False)
    ids, _ = time_tokens(session, tokens, WARM_TOKENS)
    wall, hot_before = [], session.hot_counts
    for _ in range(args.repeats):
        new_ids, times = time_tokens(session, tokens, args.new_tokens)
        ids, wall = ids + new_ids, wall + times
    median, on_host, hot = statistics.median(wall), host_bytes_per_token(session), session.hot_counts
    if hot is not None and hot_before is not None:
        hot = hot.since(hot_before)
        on_host = round(hot.link_bytes / len(wall))
    link_ms = on_host / ceilings["host_to_device_gb_s"] / 1e6
    row = {
        "runner": runner,
        "length": length,
        "synthetic": args.synthetic_cache,
        "ms": spread(wall),
        "ms_tokens": wall,
        "host_bytes_per_token": on_host,
        "hot_pool": None if hot is None else hot.to_dict(),
        "host_pages": session.cache.spec.host_pages,
        "link_ms": link_ms,
        "link_over_measured": link_ms / median,
        **floor(token_bytes(runtime.config, session.plan.weight_format, args.device, session.plan.cache, length,
                            session.plan.attention.selection), median, ceilings),
        "gpu_step_ms": graph_ms(runtime, session),
        "allocate_s": allocated,
        "host_pool_bytes": session.cache.host_pool.nbytes,
        "host_pool_pinned": session.cache.host_pool.storage.is_pinned() if device.type == "cuda" else False,
        "fill_s": filled,
        "memory": memory.measure(session.plan),
    }  # fmt: skip
    return row, ids, logits


def compare(ids: list[int], other_ids: list[int], logits: torch.Tensor, other_logits: torch.Tensor) -> dict[str, Any]:
    """How two sessions agree: equal tokens from the start on, and the logits of the first step."""
    equal = next((i for i, (a, b) in enumerate(zip(ids, other_ids, strict=True)) if a != b), len(ids))
    return {
        "tokens": len(ids),
        "equal_tokens": equal,
        "all_equal": equal == len(ids),
        "distinct_tokens": len(set(ids)),
        "logits_max_difference": (logits - other_logits).abs().max().item(),
        "logits_deviation": logits.std().item(),
    }


def run(args: argparse.Namespace) -> int:
    """The command `offload`."""
    device = check_device(args.device)
    device_bytes = parse_bytes(args.gpu_budget, "--gpu-budget")
    host_bytes = None if args.host_budget is None else parse_bytes(args.host_budget, "--host-budget")
    if args.repeats < 1 or args.new_tokens < 1:
        raise InputError("offload needs at least one repeat and one new token")
    memory = MemoryWatch(device)
    ceilings = measure_ceilings(device, "memory", "transfer")
    console = Console(width=160)
    capacity = parse_tokens(args.length, "--length") + decoded_tokens(args) + 1
    runtime = load_runtime(args, capacity, device_bytes=device_bytes, host_bytes=host_bytes)
    if runtime.plan.cache.host_pages == 0:
        raise InputError(
            f"{format_bytes(device_bytes)} hold all {capacity:,} tokens, so nothing would be offloaded: give a smaller "
            f"--gpu-budget or a longer --length"
        )
    settings = {**describe(runtime, args), "gpu_budget": device_bytes, "host_budget": runtime.plan.host_budget}
    row, ids, logits = measure(runtime, "offloaded", args, ceilings, memory)
    rows, agreement = [row], None
    result = {"benchmark": "offload", "settings": settings, "ceilings": ceilings, "rows": rows}
    result |= {"new_tokens": args.new_tokens, "repeats": args.repeats}
    save({**result, "agreement": None}, args)
    if args.compare_resident:
        del runtime
        release(device)
        try:  # without host memory in the budget: all resident, or not at all
            runtime = load_runtime(args, capacity, host_bytes=0)
            resident, other_ids, other_logits = measure(runtime, "all resident", args, ceilings, memory)
            rows.append(resident)
            agreement = compare(ids, other_ids, logits, other_logits)
        except PlanError as error:  # keep what was measured before
            agreement = {"error": str(error)}
            console.print(f"no comparison with an all-resident session: {error}", highlight=False)
    console.print(table(rows))
    if agreement is not None and "error" not in agreement:
        console.print(
            f"{agreement['equal_tokens']} of {agreement['tokens']} tokens equal the all-resident session's; logits of "
            f"the first step differ by at most {agreement['logits_max_difference']:.2e}", highlight=False,
        )  # fmt: skip
    return finish_timed({**result, "agreement": agreement}, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table(
        "session", "tokens", "ms/token", "min", "max", "host read", "link ms", "link/ms", "allocated", "memory"
    )
    for row in rows:
        found.add_row(
            row["runner"], tokens_text(row["length"]) + (" synthetic" if row["synthetic"] else ""),
            *(figure(row["ms"][name]) for name in ("median", "min", "max")),
            format_bytes(row["host_bytes_per_token"]), figure(row["link_ms"]), percent(row["link_over_measured"]),
            f"{row['allocate_s']:.1f} s", memory_text(row["memory"]),
        )  # fmt: skip
    return found
