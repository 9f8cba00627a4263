#!/usr/bin/env python
"""Time the fused Triton kernels on a GPU against ceilings measured in the same run; JSON is the last line.

    python scripts/bench/bench_fused_kernels.py [--tokens 8192] [--rows 524288] [--pool-gib 2] [--sweep] [--json FILE]

Shapes are Llama-3-8B's. Every input and output byte counts once. The ceiling of a kernel on the device is the faster
of two large copies, bytes read and written; of a page copy over the link it is the large copy of pinned memory in its
direction, bytes moved once. Everything that is timed has been compared with its torch reference first, on the same
tensors; `torch` is the time of what the decoder runs without these kernels. `--sweep` tries tile sizes and warps as
well; the sweep of programs for page copies always runs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun import cli
from longrun.arguments import COUNT, real
from longrun.errors import InputError
from longrun.kernels.dense_attention import merge_partial
from longrun.kernels.merge_partial import merge_into, merge_into_reference, merge_partial_, merge_partial_reference
from longrun.kernels.page_copy import copy_pages, fetch_pages, fetch_pages_reference
from longrun.kernels.rope_store import rope_store, rope_store_reference
from longrun.kernels.rotary import rotary_, rotary_reference
from longrun.kernels.silu_mul import silu_mul_, silu_mul_reference
from longrun.model.rope import apply_rope_, signed_sin
from longrun.paths import path_option
from longrun.quant.rotation import random_signs
from scripts.bench.bench_common import finish_timed

REPEATS = 11
LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM, WIDTH = 32, 32, 8, 128, 14336  # Llama-3-8B
PAYLOAD = 8448  # an INT4 page of head_dim 128
BF16_LIMIT = 4e-3  # of the error's norm over the reference's: two roundings of bfloat16 that differ
PROGRAMS = (8, 16, 32, 64, 132)
GIB = 2**30


def seconds(
    works: Iterable[Callable[[], Any]], prepare: Callable[[], Any] | None = None, captured: bool = True
) -> list[float]:
    """Seconds a call, sorted: replays of a CUDA graph of all `works`, or for a large copy the call itself. `prepare`
    runs before each replay, outside the time."""
    works = list(works)
    for work in works:
        work()
    torch.cuda.synchronize()
    replay = works[0]
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
        replay = graph.replay
    times = []
    for repeat in range(REPEATS + 1):
        if prepare is not None:
            prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if repeat:
            times.append(begin.elapsed_time(end) / 1e3 / len(works))
    return sorted(times)


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of copies of 1 GiB of random bytes: `device` read and written, the faster of the driver's copy and
    an elementwise one; `host_to_device` and `device_to_host` moved once, pinned."""
    source = torch.randint(0, 2**15, (2**29,), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    device = max(2 * GIB / statistics.median(seconds([way] * 4)) for way in ways)
    host = torch.empty(2**29, dtype=torch.int16, pin_memory=True)
    down = GIB / statistics.median(seconds([lambda: host.copy_(source, non_blocking=True)], captured=False))
    up = GIB / statistics.median(seconds([lambda: target.copy_(host, non_blocking=True)], captured=False))
    assert torch.equal(source, target), "the copies that set the ceilings moved other bytes"
    return {"device": device, "host_to_device": up, "device_to_host": down}


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float32."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def close(actual: Tensor, expected: Tensor, limit: float) -> None:
    assert error(actual, expected) < limit, "the timed kernel computes something else"


class Rows:
    """Collects a row a kernel and setting."""

    def __init__(self, ceilings: dict[str, float]) -> None:
        self.ceilings, self.rows = ceilings, []

    def add(
        self, kernel: str, shape: str, moved: int, times: list[float], torch_times: list[float] | None = None,
        ceiling: str = "device", **settings: int | None,
    ) -> None:  # fmt: skip
        median = statistics.median(times)
        theirs = None if torch_times is None else statistics.median(torch_times)
        self.rows.append({
            "kernel": kernel, "shape": shape, "settings": settings, "bytes": moved, "microseconds": median * 1e6,
            "fastest_microseconds": times[0] * 1e6, "slowest_microseconds": times[-1] * 1e6,
            "gb_per_s": moved / median / 1e9, "ceiling": ceiling,
            "fraction_of_ceiling": moved / median / self.ceilings[ceiling],
            "torch_microseconds": None if theirs is None else theirs * 1e6,
            "speedup": None if theirs is None else theirs / median,
        })  # fmt: skip


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    turn = torch.rand(tokens, HEAD_DIM // 2, dtype=torch.float64, device="cuda") * 6.2832
    cos, sin = (f(turn).float().repeat(1, 2) for f in (torch.cos, torch.sin))
    return cos, sin


def bench_rope_store(rows: Rows, settings: list[dict[str, int]]) -> None:
    """One token: a launch a layer, every layer with its own projection and cache, half of the heads retrieval: without
    rotation, with that of keys, as decode over INT4 pages runs, and with that of values as well, as over k5v3 pages."""
    half, bf16 = KV_HEADS // 2, torch.bfloat16
    cos, sin = angles(1)
    slots = torch.tensor([37, 211], device="cuda")
    layers = []
    for _ in range(LAYERS):
        qkv = torch.randn((QO_HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=bf16, device="cuda")
        q_out = torch.full((QO_HEADS, HEAD_DIM), float("nan"), dtype=bf16, device="cuda")
        caches = [torch.zeros(half, n, HEAD_DIM, dtype=bf16, device="cuda") for n in (64, 64, 1088, 1088)]
        layers.append([qkv, cos[0], sin[0], q_out, *caches])
    moved = 2 * 2 * layers[0][0].numel() + 4 * HEAD_DIM
    signs = random_signs(HEAD_DIM).cuda()
    rotations = {"": {}, ", rotated": {"signs": signs}, ", values rotated": {"signs": signs, "rotate_values": True}}
    for setting, (name, rotation) in product(settings, rotations.items()):
        expected = [x.clone() for x in layers[-1]]
        rope_store_reference(*expected, slots, QO_HEADS, **rotation)
        works = [partial(rope_store, *layer, slots, QO_HEADS, **rotation, **setting) for layer in layers]
        times = seconds(works)
        for found, wanted in zip(layers[-1][3:], expected[3:], strict=True):
            close(found, wanted, BF16_LIMIT)
        what = f"1 token, {LAYERS} layers in a graph{name}"
        rows.add("rope_store", what, moved + (4 * HEAD_DIM if rotation else 0), times, **setting)


def bench_rotary(rows: Rows, tokens: int, settings: list[dict[str, int]]) -> None:
    """Several chunks in turn, so that none stands in the L2 cache."""
    turned = QO_HEADS + KV_HEADS
    cos, sin = angles(tokens)
    signed = signed_sin(sin)
    wide = torch.randn(4, tokens, turned + KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    views = [x[:, :turned] for x in wide]
    theirs = seconds(partial(apply_rope_, x, cos[:, None], signed[:, None]) for x in views)
    moved = 2 * 2 * tokens * turned * HEAD_DIM + 4 * tokens * HEAD_DIM
    for setting in settings:
        expected, found = views[0].clone(), views[0].clone()
        close(rotary_(found, cos, sin, **setting), rotary_reference(expected, cos, sin), BF16_LIMIT)
        times = seconds(partial(rotary_, x, cos, sin, **setting) for x in views)
        rows.add("rotary_", f"[{tokens}, {turned}, {HEAD_DIM}] bf16", moved, times, theirs, **setting)
    assert wide.isfinite().all()


def bench_silu_mul(rows: Rows, tokens: int, settings: list[dict[str, int]]) -> None:
    """The gate is restored before every call: applied again and again it would run to zeros."""
    given = torch.randn(tokens, 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
    work = given.clone()
    theirs = seconds([partial(silu_mul_reference, work)], partial(work.copy_, given))
    moved = 2 * 3 * tokens * WIDTH
    part = slice(-256, None)
    expected = F.silu(given[part, :WIDTH].float()) * given[part, WIDTH:].float()
    for setting in settings:
        times = seconds([partial(silu_mul_, work, **setting)], partial(work.copy_, given))
        close(work[part, :WIDTH], expected, BF16_LIMIT)
        rows.add("silu_mul_", f"[{tokens}, 2 x {WIDTH}] bf16", moved, times, theirs, **setting)


def bench_merge(rows: Rows, count: int, settings: list[dict[str, int]]) -> None:
    given = torch.randn(count, HEAD_DIM, device="cuda")
    other = torch.randn(count, HEAD_DIM, device="cuda").bfloat16()
    lse, other_lse = torch.randn(2, count, device="cuda")
    out, total = given.clone(), lse.clone()

    def restore() -> None:
        out.copy_(given)
        total.copy_(lse)

    theirs = seconds([lambda: merge_partial(out, total, other, other_lse)], restore)
    expected = given.clone(), lse.clone()
    merge_partial_reference(*expected, other, other_lse)
    shape, moved = f"[{count}, {HEAD_DIM}] and bf16", count * (HEAD_DIM * (4 + 4 + 2) + 12)
    for setting in settings:
        times = seconds([partial(merge_partial_, out, total, other, other_lse, **setting)], restore)
        close(out, expected[0], 1e-5)
        close(total, expected[1], 1e-5)
        rows.add("merge_partial_", shape, moved, times, theirs, **setting)
    tokens = count // 4
    final = torch.full((tokens, 4, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    split = [x.view(4, tokens, *x.shape[1:]) for x in (given, lse, other, other_lse)]
    merge_into_reference(*split, wanted := torch.empty(4, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda"))
    moved = count * (HEAD_DIM * (4 + 2 + 2) + 8)
    for setting in settings:
        times = seconds([partial(merge_into, *split, final, **setting)])
        close(final, wanted, BF16_LIMIT)
        rows.add("merge_into", shape + ", transposed", moved, times, **setting)


def bench_pages(rows: Rows, pool_gib: float, settings: list[dict[str, int]]) -> None:
    """Scattered pages within the device, to it (`fetch_pages`, whose source is the host's pool) and from it."""
    slots = int(pool_gib * GIB) // PAYLOAD
    heads, per_round = KV_HEADS, min(4096, slots // KV_HEADS)
    count = heads * per_round
    pool = torch.randint(0, 256, (slots, PAYLOAD), dtype=torch.uint8, device="cuda")
    host = torch.empty(slots, PAYLOAD, dtype=torch.uint8, pin_memory=True)
    host.copy_(pool)
    table = torch.randperm(slots, device="cuda")[:count].int().view(heads, per_round)
    limit = torch.tensor([per_round], dtype=torch.int32, device="cuda")
    buffer = torch.full((count, PAYLOAD), 0xAA, dtype=torch.uint8, device="cuda")
    wanted, moved, shape = buffer.clone(), count * PAYLOAD, f"{count} pages of {PAYLOAD} bytes"
    fetch_pages_reference(pool, table, limit, wanted, 0, per_round)
    order = torch.arange(count, dtype=torch.int32, device="cuda")
    for setting in settings:
        buffer.fill_(0xAA)
        times = seconds([partial(copy_pages, pool, table, buffer, order, **setting)] * 4)
        assert torch.equal(buffer, wanted), "the timed kernel copied other bytes"
        theirs = seconds([lambda: torch.index_select(pool, 0, table.flatten(), out=buffer)] * 4)
        rows.add("copy_pages device", shape, 2 * moved, times, theirs, **setting)
    for programs in PROGRAMS:
        for setting in settings:
            buffer.fill_(0xAA)
            how = setting | {"num_programs": programs}
            times = seconds([partial(fetch_pages, host, table, limit, buffer, 0, per_round, **how)])
            assert torch.equal(buffer, wanted), "the timed kernel fetched other bytes"
            rows.add("fetch_pages", shape, moved, times, ceiling="host_to_device", **how)
    for programs in PROGRAMS:
        for setting in settings:
            host.fill_(0xAA)
            how = setting | {"num_programs": programs}
            times = seconds([partial(copy_pages, buffer, order, host, table, **how)])
            assert torch.equal(host[table.flatten().long().cpu()], wanted.cpu()), "the timed kernel wrote other bytes"
            rows.add("copy_pages to host", shape, moved, times, ceiling="device_to_host", **how)
    limit.fill_(0)
    idle = [partial(fetch_pages, host, table, limit, buffer, 0, per_round, num_programs=n) for n in PROGRAMS]
    for work, programs in zip(idle, PROGRAMS, strict=True):
        rows.add("fetch_pages of nothing", "0 pages", 0, seconds([work] * 32), num_programs=programs)


def measure(
    ceilings: dict[str, float] | None = None, tokens: int = 8192, merged_rows: int = 4 * 131072, pool_gib: float = 2.0,
    sweep: bool = False,
) -> list[dict]:  # fmt: skip
    """Rows of all fused kernels: kernel, shape, settings, bytes, microseconds (median, fastest, slowest), gb_per_s,
    ceiling and fraction_of_ceiling, torch_microseconds and speedup (None where torch has no like).

    Args:
        ceilings: from `measure_ceilings`; None measures them.
        tokens: of the prefill chunk; merged_rows: of the merge; pool_gib: size of the page pool on each side.
        sweep: also tile sizes and warps other than the defaults.
    """
    rows = Rows(measure_ceilings() if ceilings is None else ceilings)
    pair = lambda name, values: [{name: a, "num_warps": b} for a, b in values]  # noqa: E731
    torch.manual_seed(0)
    plain: list[dict[str, int]] = [{}]
    bench_rope_store(rows, [{"num_warps": n} for n in (1, 2)] if sweep else plain)
    bench_rotary(rows, tokens, pair("block_heads", ((8, 2), (16, 4), (16, 2), (64, 8))) if sweep else plain)
    bench_silu_mul(rows, tokens, pair("block", ((1024, 4), (2048, 4), (2048, 8), (4096, 8))) if sweep else plain)
    bench_merge(rows, merged_rows, pair("block_rows", ((4, 2), (8, 4), (16, 4), (32, 8))) if sweep else plain)
    torch.cuda.empty_cache()
    bench_pages(rows, pool_gib, pair("pages_per_step", ((1, 4), (2, 4), (1, 8))) if sweep else plain)
    return rows.rows


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=COUNT, default=8192)
    parser.add_argument("--rows", type=COUNT, default=4 * 131072)
    parser.add_argument("--pool-gib", type=real(0, above=True), default=2.0)
    parser.add_argument("--sweep", action="store_true", help="also tile sizes and warps other than the defaults")
    parser.add_argument("--json", type=path_option)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to torch: run this benchmark on a machine with a GPU")
    ceilings = measure_ceilings()
    print("ceilings, GB/s:", ", ".join(f"{name} {speed / 1e9:.1f}" for name, speed in ceilings.items()))
    rows = measure(ceilings, args.tokens, args.rows, args.pool_gib, args.sweep)
    again = measure_ceilings()
    for r in rows:
        setting = " ".join(f"{name}={value}" for name, value in r["settings"].items())
        speedup = "" if r["speedup"] is None else f"{r['speedup']:5.2f}x torch"
        print(f"{r['kernel']:22} {r['shape']:32} {r['microseconds']:10.2f} us {r['gb_per_s']:8.1f} GB/s "
              f"{r['fraction_of_ceiling']:6.1%} {setting} {speedup}")  # fmt: skip
    return finish_timed({
        "benchmark": "fused kernels", "rows": rows,
        "ceilings_bytes_per_s": ceilings, "ceilings_bytes_per_s_afterwards": again,
    }, args)  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main))
