#!/usr/bin/env python
"""Kernel benchmarks on one NVIDIA GPU: ceilings first, then a table, and one JSON object as the last line.

    python scripts/bench/bench_kernels.py [--lengths 512K,3.3M] [--kv int4,k5v3] [--variants] [--json FILE]

Pages hold random content (synthetic). Calls rotate over the pools of several layers, so that nothing is measured from
the L2 cache, and stand in one CUDA graph, as in a decode step. Every timed configuration is first compared with the
torch reference on poisoned outputs. `--variants` times other settings of the kernels, too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.kernels import page_decode
from longrun.kernels.page_decode import DecodePages, Workspace
from longrun.kernels.page_decode_cuda import CudaPageDecode
from longrun.kernels.page_view import ExactRun, PageRun, decode_attention
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.units import format_tokens, parse_tokens


@dataclass
class Row:
    """One kernel at one length: one layer, one token."""

    kernel: str
    kv_format: str
    settings: str
    shape: str  # KV heads x group x head_dim
    tokens: int
    us: float
    tb_s: float
    of_copy: float  # the faster of both copies
    of_best: float  # of the highest ceiling
    out_error: float
    lse_error: float


def time_us(work: Callable[[], object], per_call: int, repeats: int = 15) -> float:
    """Median over repeats of one graph replay, divided by the calls in it; after 0.3 s of replays, because clocks rise
    only under load."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times, ready = [], time.perf_counter() + 0.3
    while time.perf_counter() < ready:
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / per_call)
    return statistics.median(times)


def measure_ceilings(num_bytes: int = 5 * 2**30) -> dict[str, float]:
    """TB/s over `num_bytes`: device-to-device copies (bytes read and written) by the driver and by a kernel, and
    reading alone; `best_tb_s` is the largest."""
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    found = {
        "copy_tb_s": 2 * source.nbytes / time_us(lambda: target.copy_(source), 1) / 1e6,
        "kernel_copy_tb_s": 2 * source.nbytes / time_us(lambda: torch.mul(source, 2, out=target), 1) / 1e6,
        "read_tb_s": source.nbytes / time_us(lambda: source.sum(), 1) / 1e6,
    }
    return {**found, "best_tb_s": max(found.values())}


def synthetic_layers(num_layers: int, heads: int, num_pages: int, head_dim: int, kv_format: str) -> list[DecodePages]:
    """Layers of random pages, every head's pages at random slots of the layer's own pool."""
    fmt, layers = PageFormat(kv_format, 64, head_dim), []
    for _ in range(num_layers):
        slots = heads * num_pages
        storage = torch.empty(slots, fmt.payload_bytes, dtype=torch.uint8, device="cuda")
        storage.random_(0, 256)
        scales = storage[:, fmt.value_scales_offset :].view(torch.float16).view(slots, 2, 64)
        scales[:, 0] = torch.rand(slots, 64, device="cuda") * 0.2 + 0.1
        scales[:, 1] = -torch.rand(slots, 64, device="cuda") - 1
        index = torch.rand(heads, num_pages, 2, head_dim, device="cuda").half()
        index[:, :, 0] *= 0.2
        index[:, :, 1] -= 1.2
        table = torch.randperm(slots, device="cuda").view(heads, num_pages).int()
        exact = torch.randn(4, heads, 64, head_dim, device="cuda").bfloat16()
        lengths = torch.tensor([0, num_pages, 64, 37], dtype=torch.int32, device="cuda")
        layers.append(DecodePages(storage, table, index, *exact, lengths, kv_format=kv_format))
    return layers


def reference(q: torch.Tensor, pages: DecodePages) -> tuple[torch.Tensor, torch.Tensor]:
    """The torch reference, one head at a time (it dequantizes everything)."""
    first, count, sinks, tails = pages.lengths.tolist()
    found = []
    for h in range(q.shape[0]):
        one = slice(h, h + 1)
        fmt = PageFormat(pages.kv_format, 64, q.shape[2])
        run = PageRun(pages.storage, pages.table[one], pages.index[one], first, count, fmt, pages.slot_offset)
        sink = ExactRun(pages.sink_k[one], pages.sink_v[one], sinks)
        found.append(
            decode_attention(q[one].float(), run, (sink, ExactRun(pages.tail_k[one], pages.tail_v[one], tails)))
        )
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def kernels(heads: int, head_dim: int, kv_format: str, variants: bool) -> list[tuple[str, str, int, Callable]]:
    """(name, settings, splits, decode_attention) of what is timed."""
    found = []
    settings = [(4, 2, 2)]
    if variants:
        settings += [(4, 3, 2), (4, 2, 3), (8, 2, 1), (8, 3, 1)]
    for warps, stages, blocks in settings:
        made = CudaPageDecode(head_dim, kv_format=kv_format, stages=stages, warps=warps, blocks_per_sm=blocks)
        text = f"{warps} warps, {made.stages} stages, {blocks} blocks an SM"
        found.append(("cuda", text, made.default_splits(heads), made.decode_attention))
    settings = [(2, 3, 4, True)]
    if variants:
        settings += [(2, 3, 4, False), (2, 3, 3, True), (4, 3, 2, True)]
    for warps, stages, programs, packed in settings:

        def triton_kernel(q, pages, warps=warps, stages=stages, packed=packed, **more):
            return page_decode.decode_attention(q, pages, num_warps=warps, num_stages=stages, packed=packed, **more)

        splits = page_decode.default_splits(heads, torch.device("cuda"), programs)
        text = f"{warps} warps, {stages} stages, {programs} programs an SM{'' if packed else ', unpacked portably'}"
        found.append(("triton", text, splits, triton_kernel))
    return found


def bench_page_decode(
    lengths: list[int], ceilings: dict[str, float], *, heads: int = 4, group: int = 4, head_dim: int = 128,
    kv_format: str = "int4", variants: bool = False, pool_bytes: int = 3 * 2**30,
) -> list[Row]:  # fmt: skip
    """Decode of one layer (default: Llama-3-8B with half its KV heads kept) at `lengths` tokens."""
    rows, best_copy = [], max(ceilings["copy_tb_s"], ceilings["kernel_copy_tb_s"])
    for tokens in lengths:
        num_pages = tokens // 64
        page_bytes = PageFormat(kv_format, 64, head_dim).page_bytes
        num_layers = max(2, -(-pool_bytes // (heads * num_pages * page_bytes)))
        layers = synthetic_layers(num_layers, heads, num_pages, head_dim, kv_format)
        q = (torch.randn(heads, group, head_dim, device="cuda") * 0.2).bfloat16()
        expected = reference(q, layers[-1])
        for name, text, splits, work in kernels(heads, head_dim, kv_format, variants):
            space = Workspace.empty(heads, splits, group, head_dim, q.device)
            out = torch.full(q.shape, float("nan"), device="cuda")
            lse = torch.full(q.shape[:2], float("nan"), device="cuda")
            space.out.fill_(float("nan")), space.stats.fill_(float("nan"))
            try:

                def step(work=work, space=space, out=out, lse=lse, layers=layers, q=q):
                    for pages in layers:
                        work(q, pages, workspace=space, out=out, lse=lse)

                us = time_us(step, num_layers)
            except Exception as failed:  # a variant that does not fit the GPU is a row of the log, not the end
                print(f"{name} ({text}): {failed!r}", flush=True)
                continue
            tb_s = heads * num_pages * page_bytes / us / 1e6
            shape = f"{heads}x{group}x{head_dim}"
            row = Row(
                name, kv_format, text, shape, tokens, us, tb_s, tb_s / best_copy, tb_s / ceilings["best_tb_s"],
                error(out, expected[0]), error(lse, expected[1]),
            )  # fmt: skip
            print(row, flush=True)
            rows.append(row)
        del layers
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="512K,3.3M", help="tokens, comma-separated")
    parser.add_argument("--kv", default=",".join(QUANTIZED_KV_FORMATS), help="page formats, comma-separated")
    parser.add_argument("--variants", action="store_true", help="time other settings of the kernels, too")
    parser.add_argument("--json", type=path_option, help="write the JSON object here as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("bench_kernels needs an NVIDIA GPU, and torch sees none")
    if unknown := set(args.kv.split(",")) - set(QUANTIZED_KV_FORMATS):
        raise InputError(f"--kv {unknown.pop()} has no decode kernel: choose among {', '.join(QUANTIZED_KV_FORMATS)}")
    ceilings = measure_ceilings()
    print(", ".join(f"{name.removesuffix('_tb_s')} {value:.3f} TB/s" for name, value in ceilings.items()), flush=True)
    lengths = [parse_tokens(x) for x in args.lengths.split(",")]
    rows = []
    for kv_format in args.kv.split(","):
        settings = {"kv_format": kv_format, "variants": args.variants}
        rows += bench_page_decode(lengths, ceilings, **settings)
        rows += bench_page_decode(lengths[:1], ceilings, heads=8, group=1, **settings)
        rows += bench_page_decode(lengths[:1], ceilings, heads=8, group=8, head_dim=64, **settings)
    table = Table(
        "kernel", "pages", "settings", "shape", "tokens", "us", "TB/s", "of copy", "of best", "error", "lse error"
    )
    for r in rows:
        figures = (f"{r.us:.1f}", f"{r.tb_s:.3f}", f"{r.of_copy:.1%}", f"{r.of_best:.1%}", f"{r.out_error:.1e}")
        table.add_row(
            r.kernel, r.kv_format, r.settings, r.shape, format_tokens(r.tokens), *figures, f"{r.lse_error:.1e}"
        )
    Console(width=140).print(table)
    shape = "one layer, shape is retrieval KV heads x group x head_dim, page 64; synthetic pages at random slots"
    result = {"environment": environment(), "ceilings": ceilings, "page_decode": [asdict(r) for r in rows]}
    result["what"] = shape + "; bytes counted: payload and index; all layers' calls in one CUDA graph, median of 15"
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
