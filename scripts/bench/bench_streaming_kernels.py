#!/usr/bin/env python
"""Time the Triton kernels of streaming heads on a GPU, settings side by side; JSON is the last line.

    python scripts/bench/bench_streaming_kernels.py [--tokens 4096,32768] [--start 3000000] [--head-dims 128]
                                                    [--settings all] [--json FILE]

Ceilings first: a large bfloat16 matrix product and two large copies. A row of prefill counts useful operations only:
two products over the keys that a query sees; what the masks of edge tiles waste is not work. A row of decode counts
keys and values of the ring once. Decode calls rotate over rings of many layers, more than the L2 cache holds, within
one CUDA graph. Every row is compared with the torch reference on poisoned outputs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from torch import Tensor

from longrun import cli
from longrun.errors import InputError
from longrun.kernels.banded_attention import banded_attention, plan_band
from longrun.kernels.banded_prefill import BandConfig, banded_prefill, banded_prefill_reference, default_config
from longrun.kernels.ring_decode import RingWorkspace, default_splits, ring_decode, ring_decode_reference
from longrun.paths import path_option
from longrun.units import parse_tokens
from scripts.bench.bench_common import finish_timed

REPEATS, WARM_SECONDS = 15, 0.1
KV_HEADS, GROUP, SINKS, RECENT = 4, 4, 128, 256
TOLERANCE = 6e-3  # RMS ratio of a bfloat16 result to the float32 reference
PREFILL = [
    BandConfig(128, 32, 8, 2, True, 128), BandConfig(128, 32, 8, 3, True, 128), BandConfig(128, 32, 8, 4, True, 128),
    BandConfig(128, 64, 8, 2, True, 128), BandConfig(128, 64, 8, 3, True, 128),
    BandConfig(128, 64, 8, 2), BandConfig(128, 64, 8, 3), BandConfig(128, 128, 8, 2), BandConfig(256, 32, 8, 2),
    BandConfig(128, 32, 4, 2), BandConfig(64, 32, 4, 2), BandConfig(64, 32, 4, 3),
    BandConfig(64, 64, 4, 2), BandConfig(64, 64, 4, 3), BandConfig(64, 64, 4, 2, True, 168),
    BandConfig(128, 64, 8, 2, False), BandConfig(128, 32, 8, 3, False, 128), BandConfig(64, 64, 4, 2, False),
]  # fmt: skip
DECODE = [(1, 8), (1, 16), (2, 4), (2, 8), (3, 4), (3, 8), (6, 2), (6, 4), (12, 4)]  # splits, warps


def seconds(work: Callable[[int], object], calls: int) -> list[float]:
    """Seconds a call, sorted, over replays of a CUDA graph of work(0) .. work(calls - 1); after 0.1 s of replays,
    because clocks rise only under load."""
    for i in range(calls):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i)
    ready = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < ready:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return sorted(times)


def ceilings() -> dict[str, float]:
    """Operations a second of a bfloat16 matrix product of 8192; bytes a second, read and written, of 1 GiB copies."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product = torch.empty_like(a)
    found = {"matmul_flop_per_s": 2 * 8192**3 / statistics.median(seconds(lambda i: torch.mm(a, b, out=product), 4))}
    source = torch.randint(0, 2**15, (2**29,), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    ways = {"memcpy": lambda i: target.copy_(source), "elementwise": lambda i: torch.bitwise_not(source, out=target)}
    for name, work in ways.items():
        found[f"{name}_bytes_per_s"] = 2 * source.nbytes / statistics.median(seconds(work, 4))
    return found


def useful_operations(tokens: int, start: int, heads: int, head_dim: int) -> int:
    """Two products of head_dim over every key that a query sees."""
    p = torch.arange(start, start + tokens)
    keys = (p + 1).clamp(max=RECENT) + (p + 1 - RECENT).clamp(min=0, max=SINKS)
    return 4 * heads * head_dim * int(keys.sum())


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def row(kernel: str, settings: dict, shape: dict, times: list[float], error: float, work: dict[str, int]) -> dict:
    assert error < TOLERANCE, f"{kernel} {settings} {shape}: RMS ratio {error} to the reference"
    median = statistics.median(times)
    rates = {f"{name}_per_s": amount / median for name, amount in work.items()}
    return {
        "kernel": kernel, "settings": settings, **shape, "microseconds": median * 1e6,
        "fastest_microseconds": times[0] * 1e6, "slowest_microseconds": times[-1] * 1e6, **work, **rates,
        "rms_ratio": error,
    }  # fmt: skip


def refused(kernel: str, settings: dict, shape: dict, error: Exception) -> dict:
    return {"kernel": kernel, "settings": settings, **shape, "error": str(error).splitlines()[0]}


def torch_window(q: Tensor, sides: tuple, start: int) -> Callable[[], Tensor]:
    """`banded_attention` on keys and values already gathered from ring and chunk: its attention alone."""
    plan = plan_band(start, q.shape[0], SINKS, RECENT, q.dtype, q.device)
    sinks, windows = [], []
    for ring, new in sides:
        positions = torch.arange(max(start - RECENT, 0), start, device=q.device)
        slots = torch.where(positions < SINKS, positions, SINKS + (positions - SINKS) % RECENT)
        keys = torch.cat((ring[:, slots], new), dim=1)
        sinks.append(torch.cat((ring[:, : min(SINKS, start)], new[:, : max(0, plan.num_sinks - start)]), dim=1))
        windows.append(keys[:, plan.window_start - start + len(positions) :].contiguous())
    by_head = q.permute(1, 2, 0, 3)
    scale = q.shape[3] ** -0.5
    return lambda: banded_attention(by_head, *sinks, *windows, plan, scale).permute(2, 0, 1, 3)


def measure_prefill(tokens: int, start: int, head_dim: int, configs: list[BandConfig], peer: bool = True) -> list[dict]:
    """Rows of one shape: bfloat16, 4 KV heads of 4 query heads, window 128 + 256; views of one fused projection."""
    generator = torch.Generator("cuda").manual_seed(tokens + start)
    fused = torch.randn(tokens, KV_HEADS * (GROUP + 2), head_dim, generator=generator, device="cuda").bfloat16()
    q, k, v = fused.split((KV_HEADS * GROUP, KV_HEADS, KV_HEADS), dim=1)
    q, k, v = q.unflatten(1, (KV_HEADS, GROUP)), k.transpose(0, 1), v.transpose(0, 1)
    ring_k, ring_v = torch.randn(
        2, KV_HEADS, SINKS + RECENT, head_dim, generator=generator, device="cuda"
    ).bfloat16()  # fmt: skip
    scale, window = head_dim**-0.5, (start, SINKS, RECENT)
    expected = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    banded_prefill_reference(q, k, v, ring_k, ring_v, *window, scale, expected)
    shape = {"tokens": tokens, "start": start, "head_dim": head_dim, "kv_heads": KV_HEADS, "group": GROUP}
    work = {"flop": useful_operations(tokens, start, KV_HEADS * GROUP, head_dim)}
    out, found, calls = torch.empty_like(q), [], max(2, 65536 // tokens)
    for config in configs:
        out.fill_(float("nan"))
        try:
            times = seconds(
                lambda i, c=config: banded_prefill(q, k, v, ring_k, ring_v, *window, scale, out, c), calls
            )  # fmt: skip
        except triton.runtime.errors.OutOfResources as error:
            found.append(refused("banded_prefill", asdict(config), shape, error))
            continue
        found.append(row("banded_prefill", asdict(config), shape, times, rms_ratio(out, expected), work))
    if peer:
        attend = torch_window(q, ((ring_k, k), (ring_v, v)), start)
        times = seconds(lambda i: attend(), 1)
        found.append(row("torch banded_attention", {}, shape, times, rms_ratio(attend(), expected), work))
    return found


def measure_decode(num_slots: int, head_dim: int, settings: list[tuple[int, int]], peer: bool = True) -> list[dict]:
    """Rows of one shape: bfloat16, 4 KV heads of 4 query heads, a full ring; settings are (num_splits, num_warps)."""
    layers = -(-(2**27) // (2 * KV_HEADS * num_slots * head_dim * 2))  # 128 MiB of rings
    generator = torch.Generator("cuda").manual_seed(num_slots)
    rings = torch.randn(layers, 2, KV_HEADS, num_slots, head_dim, generator=generator, device="cuda").bfloat16()
    q = torch.randn(layers, KV_HEADS, GROUP, head_dim, generator=generator, device="cuda").bfloat16()
    out, expected = torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
    lengths = torch.tensor([num_slots], dtype=torch.int32, device="cuda")
    scale = head_dim**-0.5
    for i in range(layers):
        ring_decode_reference(q[i], *rings[i], lengths, scale, expected[i])
    shape = {"num_slots": num_slots, "head_dim": head_dim, "kv_heads": KV_HEADS, "group": GROUP}
    work, found = {"bytes": rings[0].nbytes}, []
    for num_splits, num_warps in settings:
        named = {"num_splits": num_splits, "num_warps": num_warps}
        space = RingWorkspace.make(KV_HEADS * GROUP, num_splits, head_dim, "cuda")
        out.fill_(float("nan"))
        try:
            times = seconds(
                lambda i, s=space, n=num_splits, w=num_warps: ring_decode(
                    q[i], *rings[i], lengths, scale, out[i], s, n, w
                ),
                layers,
            )
        except triton.runtime.errors.OutOfResources as error:
            found.append(refused("ring_decode", named, shape, error))
            continue
        found.append(row("ring_decode", named, shape, times, rms_ratio(out, expected), work))
    if peer:

        def attend(i: int) -> None:
            k, v = rings[i].float()
            out[i] = torch.softmax((q[i].float() * scale) @ k.transpose(1, 2), dim=-1) @ v

        out.fill_(float("nan"))
        times = seconds(attend, layers)
        found.append(row("torch decode", {}, shape, times, rms_ratio(out, expected), work))
    return found


def measure(
    lengths: tuple[int, ...] = (4096, 32768), start: int = 3_000_000, head_dims: tuple[int, ...] = (128,),
    all_settings: bool = False,
) -> list[dict]:  # fmt: skip
    """Rows of both kernels and of their torch peers, checked; with default settings, or with all of the sweep.

    A row holds kernel, settings, shape, microseconds (median of replays), the work it counts ("flop" or "bytes"), the
    rate of it, and the RMS ratio of its result to the reference; or "error" where the device lacks the room.
    """
    rows = []
    for head_dim in head_dims:
        config = default_config(head_dim, torch.bfloat16, torch.device("cuda"))
        for tokens in lengths:
            sweep = all_settings and tokens == max(lengths)
            configs = [config, *(c for c in PREFILL if sweep and astuple(c) != astuple(config))]
            rows += measure_prefill(tokens, start, head_dim, configs)
        own = [(default_splits(SINKS + RECENT), 8)]
        rows += measure_decode(SINKS + RECENT, head_dim, own + [x for x in DECODE if all_settings and x not in own])
    return rows


def describe(r: dict) -> str:
    shape = f"{r['tokens']} tokens" if "tokens" in r else f"{r['num_slots']} slots"
    settings = " ".join(f"{name}={value}" for name, value in r["settings"].items() if value is not None)
    start = f"{r['kernel']:22} D{r['head_dim']:<4}{shape:>13}"
    if "error" in r:
        return f"{start}  {r['error'][:40]}  {settings}"
    rate = f"{r['flop_per_s'] / 1e12:7.1f} TFLOP/s" if "flop" in r else f"{r['bytes_per_s'] / 1e12:7.3f} TB/s   "
    return f"{start} {r['microseconds']:10.2f} us {rate}  {settings}"


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="4096,32768")
    parser.add_argument("--start", default="3000000")
    parser.add_argument("--head-dims", default="128")
    parser.add_argument("--settings", choices=("all", "default"), default="all")
    parser.add_argument("--json", type=path_option)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to torch: run this benchmark on a machine with a GPU")
    lengths = tuple(parse_tokens(text.strip(), "--tokens") for text in args.tokens.split(","))
    head_dims = tuple(int(text) for text in args.head_dims.split(","))
    found = ceilings()
    copies = ", ".join(f"{n} {found[f'{n}_bytes_per_s'] / 1e12:.3f} TB/s" for n in ("memcpy", "elementwise"))
    print(f"ceilings: bf16 matmul {found['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s, {copies}")
    rows = measure(lengths, int(args.start), head_dims, args.settings == "all")
    for r in rows:
        if "flop" in r:
            r["fraction_of_matmul"] = r["flop_per_s"] / found["matmul_flop_per_s"]
        elif "bytes" in r:
            r["fraction_of_copy"] = r["bytes_per_s"] / max(v for name, v in found.items() if "bytes" in name)
        print(describe(r))
    return finish_timed({"benchmark": "streaming kernels", "ceilings": found, "rows": rows}, args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
