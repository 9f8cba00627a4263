#!/usr/bin/env python
"""Time the Triton page kernels on a GPU against the copy bandwidth measured in the same run; JSON is the last line.

    python scripts/bench/bench_page_kernels.py [--heads 8] [--tokens 4096,32768,524288] [--warps 2,4] [--json FILE]

Every input and output byte counts once (`bytes_per_page`); the ceiling is the faster of two large device-to-device
copies, its bytes read and written. Keys and values lie as a fused projection leaves them: [tokens, heads, 2, head_dim].
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from longrun import cli
from longrun.arguments import COUNT
from longrun.errors import InputError
from longrun.kernels.page_dequantize import dequantize_run
from longrun.kernels.page_store import reference_store_pages, store_pages
from longrun.kernels.page_view import PageRun
from longrun.paths import path_option
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.units import parse_tokens
from scripts.bench.bench_common import finish_timed
from scripts.bench.bench_graph import copy_ceilings, graph_seconds


def bytes_per_page(fmt: PageFormat, itemsize: int) -> int:
    return fmt.page_bytes + 2 * fmt.page_size * fmt.head_dim * itemsize


def row(kernel: str, fmt: PageFormat, dtype: torch.dtype, heads: int, tokens: int, warps: int, ceiling: float, work):
    moved = heads * tokens // fmt.page_size * bytes_per_page(fmt, dtype.itemsize)
    times = graph_seconds(work, max(2, min(50, int(2e-3 * ceiling / moved))))
    median = statistics.median(times)
    return {
        "kernel": kernel, "kv_format": fmt.name, "head_dim": fmt.head_dim,
        "dtype": str(dtype).removeprefix("torch."), "heads": heads, "tokens": tokens,
        "num_warps": warps, "bytes": moved, "microseconds": median * 1e6,
        "fastest_microseconds": times[0] * 1e6, "slowest_microseconds": times[-1] * 1e6,
        "tb_per_s": moved / median / 1e12, "fraction_of_copy": moved / median / ceiling,
        "fits_l2": moved < torch.cuda.get_device_properties(0).L2_cache_size,
    }  # fmt: skip


def measure(
    head_dim: int, dtype: torch.dtype, heads: int, tokens: int, warps: list[int], ceiling: float, name: str = "int4"
) -> list[dict]:
    fmt, pages = PageFormat(name, 64, head_dim), tokens // 64
    fused = torch.randn(tokens, heads, 2, head_dim, dtype=dtype, device="cuda")
    k, v = (fused[:, :, side].transpose(0, 1) for side in (0, 1))
    slots = torch.randperm(heads * pages, device="cuda").int().view(heads, pages)
    storage = torch.full((heads * pages, fmt.payload_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    index = torch.full((heads, pages, 2, head_dim), float("nan"), dtype=torch.float16, device="cuda")
    numbers = torch.arange(pages, dtype=torch.int32, device="cuda")
    out = torch.full((2, heads, tokens, head_dim), float("nan"), dtype=dtype, device="cuda")
    run = PageRun(storage, slots, index, 0, pages, fmt)
    found = []
    for num_warps in warps:
        kernels = {
            "page_store": partial(store_pages, k, v, storage, slots, index, numbers, fmt, num_warps=num_warps),
            "page_dequantize": partial(dequantize_run, run, *out, num_warps=num_warps),
        }
        found += [row(name, fmt, dtype, heads, tokens, num_warps, ceiling, work) for name, work in kernels.items()]
    part = slice(0, 64 * min(pages, 16))
    some = slots[:, : part.stop // 64].cpu()
    expected = torch.empty(heads * pages, fmt.payload_bytes, dtype=torch.uint8)
    expected_index = torch.empty(heads, some.shape[1], 2, head_dim, dtype=torch.float16)
    order = torch.arange(some.shape[1], dtype=torch.int32)
    reference_store_pages(k[:, part].cpu(), v[:, part].cpu(), expected, some, expected_index, order, fmt)
    assert torch.equal(storage.cpu()[some.long()], expected[some.long()]), "the timed kernel wrote other bytes"
    assert not out.isnan().any(), "the timed kernel left outputs unwritten"
    return found


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=COUNT, default=8)
    parser.add_argument("--tokens", default="4096,32768,524288")
    parser.add_argument("--warps", default="2,4")
    parser.add_argument("--json", type=path_option)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to torch: run this benchmark on a machine with a GPU")
    lengths = [parse_tokens(text.strip(), "--tokens") // 64 * 64 for text in args.tokens.split(",")]
    warps = [int(text) for text in args.warps.split(",")]
    ceilings = copy_ceilings()
    ceiling = max(ceilings.values())
    print("copy, TB/s:", ", ".join(f"{name} {speed / 1e12:.3f}" for name, speed in ceilings.items()))
    rows = []
    for tokens in lengths:
        for name in QUANTIZED_KV_FORMATS:
            rows += measure(128, torch.bfloat16, args.heads, tokens, warps, ceiling, name)
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float32)):
        rows += measure(head_dim, dtype, args.heads, min(lengths[-1], 131072), warps, ceiling)
    again = copy_ceilings()
    for r in rows:
        print(f"{r['kernel']:16} {r['kv_format']:5} D{r['head_dim']:<4} {r['dtype']:9} {r['tokens']:>7} tokens "
              f"{r['num_warps']} warps "
              f"{r['microseconds']:9.1f} us {r['tb_per_s']:6.3f} TB/s {r['fraction_of_copy']:6.1%}")  # fmt: skip
    return finish_timed({
        "benchmark": "page kernels", "rows": rows,
        "copy_bytes_per_s": ceilings, "copy_bytes_per_s_afterwards": again,
    }, args)  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main))
