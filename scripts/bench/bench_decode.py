"""Decode: milliseconds a token after very long contexts, against the fewest bytes that a token must read."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.lab.synthetic_session import make_synthetic
from longrun.quant.weight_format import table_itemsize
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.model_bytes import model_weight_bytes
from longrun.specs.selection_spec import Selection
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
    release,
    save,
    spread,
    synchronize,
    tokens_text,
)
from scripts.bench.bench_transformers import TransformersPeer
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.gpu_timer import gpu_times

WARM_TOKENS = 8  # the first pays for compiling and capturing
PROFILED_TOKENS = 8


def token_bytes(
    config: ModelConfig, weight_format: str, device_type: str, cache: CacheSpec, seq_len: int,
    selection: Selection | None = None,
) -> dict:  # fmt: skip
    """The fewest bytes that decoding one token at `seq_len` tokens must read, by part.

    Weights: every parameter once, of the embedding one row (a tied one is read whole, as lm_head). Cache: payload and
    index of all pooled pages of the retrieval heads, their exact sink page and tail, and the rings as far as filled.
    Of selected pages those that are read, and the digests of all. Page tables and what is written are left out, so the
    floor is a little too low rather than too high.
    """
    fmt, row = cache.page_format, config.hidden_size * table_itemsize(weight_format)
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * row
    pooled = fmt.pooled_pages(seq_len)
    exact_token = 2 * fmt.head_dim * fmt.exact_itemsize
    heads = cache.total_retrieval_heads
    window = min(seq_len, cache.sink_size + cache.recent_size)
    selects = selection is not None and cache.digest is not None
    read = cache.read_pages(seq_len, selection) if selects else cache.held_pages(seq_len)
    digests = {"page_digests": cache.held_pages(seq_len) * cache.digest.page_bytes} if selects else {}
    return {
        "weights": model_weight_bytes(config, weight_format, device_type) - unread,
        "page_payloads": read * fmt.payload_bytes,
        "page_index": read * fmt.index_bytes,
        **digests,
        "sinks_and_tails": heads * (seq_len - pooled * fmt.page_size) * exact_token,
        "rings": cache.total_streaming_heads * window * exact_token,
    }


def fill(session: Session, length: int, synthetic: bool, seed: int) -> float:
    """Make the session stand at `length` tokens: seconds it took."""
    start = time.perf_counter()
    if synthetic:
        make_synthetic(session, length, seed)
    else:
        session.prefill(torch.randint(0, session.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)))
    synchronize(session.cache.device)
    return time.perf_counter() - start


def time_tokens(session: Session, tokens: Iterator[int], count: int) -> tuple[list[int], list[float]]:
    """Take `count` tokens: their ids, and the wall milliseconds from each token to the next, as a reader sees them.

    A token is known to the host when it is returned; the GPU may be at work on the next one by then. Nothing is waited
    for at the beginning, where that work would escape the clock: call it right after other tokens were taken.
    """
    ids, wall = [], []
    start = time.perf_counter()
    for _ in range(count):
        ids.append(next(tokens))
        end = time.perf_counter()
        wall.append(1e3 * (end - start))
        start = end
    return ids, wall


def graph_ms(runtime: Runtime, session: Session) -> float | None:
    """Milliseconds of the captured decode step alone, by CUDA events around replays; None without a graph.

    Call it when the session's tokens no longer matter: replays overwrite the newest one's keys and values.
    """
    graph = runtime.engine(session).decode_step
    if graph is None or session.cache.device.type != "cuda":
        return None
    return 1e3 * gpu_times(graph.replay, captured=False, repeats=32).seconds


def last_step_hits(session: Session) -> float | None:
    """Share of the host pages chosen by the step launched last that stood in the hot pool; None without a pool or such
    a page. After `graph_ms`, whose replays all choose the same pages, it says what `gpu_step_ms` was measured at."""
    hot = session.cache.hot
    if hot is None:
        return None
    before = hot.counts()
    hot.count_step()
    return hot.counts().since(before).hit_rate


def busy_ms(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) microseconds, in milliseconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3


def gpu_busy_ms(work: Callable[[], object]) -> float | None:
    """Milliseconds in which the GPU ran anything at all during `work`, by torch's profiler; None where it cannot."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            work()
            torch.cuda.synchronize()
        device_type = torch.autograd.DeviceType.CUDA
        spans = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == device_type]
    except (RuntimeError, AttributeError):
        return None
    return busy_ms(spans) if spans else None


def decode_row(runtime: Runtime, length: int, args: argparse.Namespace, ceilings: dict, memory: MemoryWatch) -> dict:
    """What is measured at one length, in a session of its own."""
    device = torch.device(args.device)
    memory.start()
    start = time.perf_counter()
    session = runtime.new_session(length + decoded_tokens(args) + 1)
    synchronize(device)
    allocated = time.perf_counter() - start
    filled = fill(session, length, args.synthetic_cache, args.seed)
    found = timed_decode(runtime, session, args, ceilings, memory)
    return {**found, "allocate_s": allocated, "fill_s": filled}


def timed_decode(
    runtime: Runtime, session: Session, args: argparse.Namespace, ceilings: dict, memory: MemoryWatch
) -> dict:
    """Times of the tokens that follow those of the session, which is of no use afterwards (see `graph_ms`)."""
    new, device, length = args.new_tokens, session.cache.device, session.seq_len
    tokens = session.generate(decoded_tokens(args), eos=False)
    time_tokens(session, tokens, WARM_TOKENS)
    hot_before = session.hot_counts
    runs = [time_tokens(session, tokens, new) for _ in range(args.repeats)]
    used, hot = memory.measure(session.plan), session.hot_counts
    if hot is not None and hot_before is not None:
        hot = hot.since(hot_before)
    wall, step, busy = [ms for _, times in runs for ms in times], graph_ms(runtime, session), None
    replayed = last_step_hits(session)
    if device.type == "cuda":
        busy = gpu_busy_ms(lambda: [next(tokens) for _ in range(PROFILED_TOKENS)])
        busy = None if busy is None else busy / PROFILED_TOKENS
    return {
        "ms": spread(wall),
        "ms_repeats": [statistics.fmean(times) for _, times in runs],
        "clock_runs_through": True,
        "ms_tokens": wall,
        **floor(token_bytes(runtime.config, session.plan.weight_format, device.type, session.plan.cache, length,
                            session.plan.attention.selection), statistics.median(wall), ceilings),
        **host_overhead(statistics.median(wall), step, busy),
        "cache_bytes": session.cache_bytes,
        "pages_on_host": session.plan.cache.host_pages,
        "hot_pool": None if hot is None else hot.to_dict(),
        "gpu_step_hit_rate": replayed,
        "memory": used,
    }  # fmt: skip


def floor(parts: dict[str, int], ms: float, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Bytes by part, the time in which the measured memory ceiling moves them, and that time over `ms`."""
    total = sum(parts.values())
    floor_ms = total / ceilings["memory_tb_s"] / 1e9
    return {"bytes": parts, "bytes_total": total, "floor_ms": floor_ms, "floor_over_measured": floor_ms / ms}


def host_overhead(wall_ms: float, step: float | None, busy: float | None) -> dict[str, Any]:
    """What a token costs besides the GPU's work.

    Args:
        wall_ms: median wall time of a token.
        step: of the captured step alone (`graph_ms`), with the gaps between its kernels.
        busy: time a token in which the GPU ran anything, by the profiler over a few tokens more.

    The overhead is the wall time less the first of them that is known.
    """
    own, by = (step, "replays of the graph") if step is not None else (busy, "profiler")
    known = own is not None
    return {
        "gpu_step_ms": step, "gpu_busy_ms": busy, "host_overhead_ms": wall_ms - own if known else None,
        "host_overhead_by": by if known else None,
    }  # fmt: skip


def decoded_tokens(args: argparse.Namespace) -> int:
    return WARM_TOKENS + args.repeats * args.new_tokens + PROFILED_TOKENS


def run(args: argparse.Namespace) -> int:
    """The command `decode`."""
    device = check_device(args.device)
    lengths, peer_lengths = parse_lengths(args.lengths), parse_lengths(args.peer_lengths, "--peer-lengths")
    if args.repeats < 1 or args.new_tokens < 1 or not lengths:
        raise InputError("decode needs at least one length, one repeat and one new token")
    memory = MemoryWatch(device)
    ceilings = measure_ceilings(device, "memory")
    console = Console(width=160)
    runtime = load_runtime(args, max(lengths) + decoded_tokens(args) + 1)
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "decode", "settings": describe(runtime, args), "ceilings": ceilings, "rows": rows}
    result |= {"new_tokens": args.new_tokens, "repeats": args.repeats}
    for length in lengths:
        row = {"runner": "longrun", "length": length, "synthetic": args.synthetic_cache}
        row = or_out_of_memory(row, partial(decode_row, runtime, length, args, ceilings, memory), device)
        rows.append(row)
        save(result, args)
        found = row.get("error") or f"{row['ms']['median']:.2f} ms a token"
        console.print(f"{tokens_text(length)}: {found}", highlight=False)
    result["settings"] = describe(runtime, args)  # with the notices of all sessions
    del runtime
    release(device)
    peer, new = None, args.new_tokens * args.repeats
    for length in peer_lengths:
        peer = peer or TransformersPeer(args.model, device)
        rows.append(peer.decode(length, new, WARM_TOKENS, args.seed, args.synthetic_cache))
        save(result, args)
    console.print(table(rows))
    return finish_timed(result, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table("runner", "tokens", "ms/token", "mean", "max", "GB read", "floor ms", "floor/ms", "host ms", "memory")
    for row in rows:
        start = (row["runner"], tokens_text(row["length"]) + (" synthetic" if row["synthetic"] else ""))
        if "error" in row:
            found.add_row(*start, row["error"])
            continue
        times = [figure(row["ms"][name]) for name in ("median", "mean", "max")]
        more = ()
        if "floor_ms" in row:
            more = (
                f"{row['bytes_total'] / 1e9:.2f}", figure(row["floor_ms"]), percent(row["floor_over_measured"]),
                figure(row["host_overhead_ms"]), memory_text(row["memory"]),
            )  # fmt: skip
        found.add_row(*start, *times, *more)
    return found
