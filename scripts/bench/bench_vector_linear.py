#!/usr/bin/env python
"""Time the one-token linear kernels on a GPU: the four matrices of Llama-3-8B and all 32 layers; JSON is the last line.

    python scripts/bench/bench_vector_linear.py [--formats nf4,int4,int8,bf16] [--no-sweep] [--json FILE]

Every time is of a CUDA graph over 32 distinct weights, so that L2 serves none of them. Bytes are those of the stored
weight with its scales, each once; the ceiling is a device copy. qkv and gate_up include RMS norm, gate_up the gate, o
and down the residual; the products of torch and bitsandbytes include nothing. *dense* is what prefill does
before a product of many rows: the whole weight in bf16, read and written. Weights are random bytes, and results are
compared with a float32 product of what the bytes mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from longrun import cli
from longrun.errors import InputError
from longrun.kernels.vector_linear import Tuning, default_tuning, vector_linear
from longrun.kernels.weight_dequantize import dequantize_int8_reference
from longrun.paths import path_option
from longrun.quant.int4_weight import dequantize_int4
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import is_quantized, linear_bytes
from scripts.bench.bench_common import finish_timed
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.gpu_timer import Work, gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row, table

LAYERS = 32
EPS = 1e-5
LIMIT = 1e-2  # relative error to a product in float32
# rows, columns, norm, gated, accumulate
MATRICES = {
    "qkv": (6144, 4096, True, False, False),
    "o": (4096, 4096, False, False, True),
    "gate_up": (28672, 4096, True, True, False),
    "down": (4096, 14336, False, False, True),
}
# The code of QLoRA (arXiv 2305.14314), as bitsandbytes holds it: this runs without bitsandbytes too.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# block_rows (halved with a gate), block_k, num_warps, num_stages
SWEEP = {
    "nf4": ((8, 2048, 4, 1), (8, 4096, 4, 1), (4, 4096, 4, 1), (8, 2048, 2, 1), (8, 2048, 2, 2), (8, 4096, 8, 1)),
    "int4": ((8, 2048, 4, 1), (8, 4096, 4, 1), (4, 4096, 4, 1), (16, 4096, 4, 1), (16, 2048, 4, 1), (16, 2048, 2, 1),
             (8, 2048, 2, 1), (8, 2048, 2, 2), (8, 4096, 8, 1)),
    "int8": ((8, 1024, 4, 1), (8, 2048, 4, 1), (4, 2048, 4, 1), (8, 1024, 2, 1), (8, 2048, 4, 2), (8, 4096, 8, 1)),
    "bf16": ((8, 2048, 4, 1), (4, 2048, 4, 1), (2, 2048, 4, 1), (4, 1024, 2, 1), (4, 2048, 4, 2), (4, 4096, 8, 1)),
}  # fmt: skip


def tunings(weight_format: str, matrix: str, sweep: bool) -> list[Tuning]:
    """The default, and what else is tried."""
    rows, width, _, gated, _ = MATRICES[matrix]
    default = default_tuning(weight_format, weight_format != "bf16", rows // 2 if gated else rows, width, gated)
    others = [Tuning(r // 2 if gated else r, *rest) for r, *rest in SWEEP[weight_format]] if sweep else []
    return [default, *(t for t in others if t != default)]


def random_layer(weight_format: str, rows: int, width: int) -> QuantLinear:
    """A layer of random stored bytes on the GPU, without a weight to quantize: gigabytes of them in no time."""
    if weight_format == "bf16":
        weight = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_(0, width**-0.5)
        return QuantLinear(weight, "bf16")
    if weight_format == "int8":
        data = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
        scale = torch.rand(rows, 1, device="cuda").add_(0.5).mul_(width**-0.5 / 73)
    elif weight_format == "int4":
        data = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device="cuda")
        scale = torch.rand(rows, width // 32, device="cuda").add_(0.5).mul_(width**-0.5 / 4.6).bfloat16()
    else:
        data = torch.randint(0, 256, (rows * width // 2, 1), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(rows * width // 64, device="cuda").add_(0.5).mul_(2 * width**-0.5)
        scale = nf4_state(absmax, rows, width)
    return QuantLinear.of_stored(data, weight_format, scale, (rows, width), torch.bfloat16)


@cache
def nf4_code() -> Tensor:
    """One tensor for all weights, as `QuantLinear` holds it."""
    return torch.tensor(NF4_CODE, device="cuda")


def nf4_state(absmax: Tensor, rows: int, width: int) -> Any:
    """bitsandbytes' state where it can be imported, else as much of it as the kernel reads."""
    code = nf4_code()
    if bitsandbytes() is None:
        return SimpleNamespace(absmax=absmax, code=code)
    state = bitsandbytes().functional.QuantState
    return state(absmax, torch.Size((rows, width)), code, 64, "nf4", torch.bfloat16)


def bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def exact_rows(linear: QuantLinear, count: int) -> Tensor:
    """float32 [count, in_features]: the first rows of what is stored."""
    if linear.weight_format == "bf16":
        return linear.data[:count].float()
    if linear.weight_format == "int8":
        return linear.data[:count].float() * linear.row_scale[:count]
    if linear.weight_format == "int4":
        return dequantize_int4(linear.data[:count], linear.group_scale[:count], linear.in_features, torch.float32)
    data = linear.data.view(linear.out_features, -1)[:count]
    nibbles = torch.stack((data >> 4, data & 15), dim=-1).view(-1, 64).long()
    absmax = linear.absmax.view(linear.out_features, -1)[:count].reshape(-1, 1)
    return (linear.code[nibbles] * absmax).view(count, linear.in_features)


class Matrix:
    """One matrix of all layers, with its input, its output and what the layer does around it."""

    def __init__(self, weight_format: str, name: str, layers: int) -> None:
        rows, width, normed, self.gated, self.accumulate = MATRICES[name]
        self.name, self.rows, self.width = name, rows, width
        self.linears = [random_layer(weight_format, rows, width) for _ in range(layers)]
        self.x = torch.randn(1, width, dtype=torch.bfloat16, device="cuda")
        self.norm = (1 + 0.1 * torch.randn(width, device="cuda")).bfloat16() if normed else None
        self.out = torch.zeros(1, rows // 2 if self.gated else rows, dtype=torch.bfloat16, device="cuda")
        self.product = torch.empty(1, rows, dtype=torch.bfloat16, device="cuda")
        self.bytes = linear_bytes(rows, width, weight_format, 2, False)

    def run(self, layer: int, tuning: Tuning | None = None) -> None:
        vector_linear(
            self.x, self.linears[layer], self.out, norm_weight=self.norm, eps=EPS, gated=self.gated,
            accumulate=self.accumulate, tuning=tuning,
        )  # fmt: skip

    def check(self, tuning: Tuning | None) -> float:
        """Relative error of the first 128 outputs of the first layer, against float32. AssertionError above LIMIT."""
        count = 128
        before = torch.randn_like(self.out)
        self.out.copy_(before) if self.accumulate else self.out.fill_(float("nan"))
        self.run(0, tuning)
        x = self.x if self.norm is None else F.rms_norm(self.x, (self.width,), self.norm, EPS)
        expected = x.float() @ exact_rows(self.linears[0], count).T
        if self.gated:
            up = exact_rows(self.linears[0], self.rows // 2 + count)[self.rows // 2 :]
            expected = F.silu(expected) * (x.float() @ up.T)
        if self.accumulate:
            expected += before[:, :count].float()
        assert self.out.isfinite().all(), f"{self.name}, {tuning}: the timed kernel left outputs unwritten"
        return error_of(self.out[:, :count], expected, LIMIT)


def row(kernel: str, weight_format: str, matrix: str, num_bytes: int, works: Sequence[Work], **more: Any) -> dict:
    more |= {"format": weight_format, "matrix": matrix}
    return kernel_row(kernel, f"{weight_format}, {matrix}", gpu_times(*works), num_bytes=num_bytes, **more)


def measure(
    weight_formats: Sequence[str] = ("nf4", "int4", "int8", "bf16"), layers: int = LAYERS, sweep: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows by format and matrix, of `layers` layers' matrices in a row (microseconds are of one), and of all four in
    all layers, as decoding reads them (matrix `all`: microseconds of all layers).

    Args:
        sweep: also try `SWEEP`, and time `all` with the best of each matrix as kernel `vector_linear best`.
    """
    for weight_format in weight_formats:
        yield from measure_format(weight_format, layers, sweep)


def measure_format(weight_format: str, layers: int, sweep: bool) -> Iterator[dict[str, Any]]:
    matrices = [Matrix(weight_format, name, layers) for name in MATRICES]
    moved = sum(m.bytes for m in matrices) * layers
    best: dict[str, Tuning] = {}
    for m in matrices:
        least = float("inf")
        for i, tuning in enumerate(tunings(weight_format, m.name, sweep)):
            label = "vector_linear sweep" if i else "vector_linear"
            more = {"settings": asdict(tuning), "relative_error": m.check(tuning)}
            works = [partial(m.run, layer, tuning) for layer in range(layers)]
            found = row(label, weight_format, m.name, m.bytes, works, **more)
            if found["microseconds"] < least:
                least, best[m.name] = found["microseconds"], tuning
            yield found
    ways: dict[str, Callable[[Matrix, int], object]] = {"vector_linear": lambda m, layer: m.run(layer)}
    if sweep:
        ways["vector_linear best"] = lambda m, layer: m.run(layer, best[m.name])
    if weight_format == "bf16":
        ways["cublas"] = lambda m, layer: torch.mm(m.x, m.linears[layer].data.t(), out=m.product)
    if weight_format == "nf4" and bitsandbytes() is not None:
        ways["bitsandbytes"] = lambda m, layer: m.linears[layer](m.x, out=m.product)
    for label, way in ways.items():

        def all_layers(way=way) -> None:
            for layer in range(layers):
                for m in matrices:
                    way(m, layer)

        yield row(label, weight_format, "all", moved, [all_layers])
        if not label.startswith("vector_linear"):
            for m in matrices:
                works = [partial(way, m, layer) for layer in range(layers)]
                yield row(label, weight_format, m.name, m.bytes, works)
    yield from measure_dense(weight_format, matrices)


def measure_dense(weight_format: str, matrices: Sequence[Matrix]) -> Iterator[dict[str, Any]]:
    """Dequantizing all matrices of all layers to bf16, as prefill does once a chunk: stored bytes read, dense ones
    written."""
    if not is_quantized(weight_format) or (weight_format == "nf4" and bitsandbytes() is None):
        return
    ways: dict[str, Callable[[QuantLinear], Tensor]] = {"dense": QuantLinear.dense}
    if weight_format == "int8":
        ways["dense, torch"] = lambda linear: dequantize_int8_reference(linear.data, linear.row_scale, torch.bfloat16)
    linears = [(m, linear) for m in matrices for linear in m.linears]
    moved = sum(m.bytes + 2 * m.rows * m.width for m, _ in linears)
    for label, way in ways.items():

        def all_layers(way=way) -> None:
            for _, linear in linears:
                way(linear)

        yield row(label, weight_format, "all", moved, [all_layers])


def compile_all(weight_formats: Sequence[str], sweep: bool, share: str | None) -> None:
    """Compile every kernel into Triton's cache in processes of their own: one process would take minutes."""
    wanted = [(f, name, t) for f in weight_formats for name in MATRICES for t in tunings(f, name, sweep)]
    if share is not None:
        first, step = (int(part) for part in share.split("/"))
        for weight_format, name, tuning in wanted[first::step]:
            Matrix(weight_format, name, 1).run(0, tuning)
        torch.cuda.synchronize()
        return
    step = max(1, min(14, (os.cpu_count() or 2) - 2, len(wanted)))
    command = [sys.executable, __file__, "--formats", ",".join(weight_formats), *([] if sweep else ["--no-sweep"])]
    workers = [subprocess.Popen([*command, "--compile-share", f"{i}/{step}"]) for i in range(step)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise InputError("a kernel did not compile: see above")


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", default="nf4,int4,int8,bf16")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=path_option)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is visible to torch: run this benchmark on a machine with a GPU")
    weight_formats = args.formats.split(",")
    if unknown := [name for name in weight_formats if name not in SWEEP]:
        raise InputError(f"--formats {unknown[0]!r} is unknown: use some of {', '.join(SWEEP)}")
    if args.compile_share:
        compile_all(weight_formats, not args.no_sweep, args.compile_share)
        return 0
    ceilings = measure_ceilings(torch.device("cuda"), "memory")
    compile_all(weight_formats, not args.no_sweep, None)
    rows = list(measure(weight_formats, sweep=not args.no_sweep))
    Console(width=180).print(table(rows))
    return finish_timed({"benchmark": "vector linear", "ceilings": ceilings, "rows": rows}, args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
