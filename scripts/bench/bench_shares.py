"""The shares of the hardware's ceilings that must not fall: each hot path against what the same machine can do.

A share compares two times of one run on one card, so it holds on any card of a kind, whatever its clock does. Each has
a floor, well below what was measured and well above what the next slower path reaches; `tests/test_gpu_shares.py`
fails where one is missed, and so does `python scripts/bench.py shares`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longrun.cli import Parser
from longrun.errors import InputError
from longrun.paths import path_option
from scripts.bench.bench_common import MemoryWatch, check_device, finish_timed, percent, release, save
from scripts.bench.ceilings import causal_flops, measure_ceilings, sdpa_seconds
from scripts.bench.gpu_timer import gpu_times

Q_HEADS, KV_HEADS, HEAD_DIM, CHUNK, PAST = 16, 4, 128, 32_768, 65_536  # Llama-3-8B, half of its heads kept
TOKENS = 1_000_000


class Reached(NamedTuple):
    """What was reached, and the ceiling, both in `unit`."""

    value: float
    ceiling: float
    unit: str


@dataclass(frozen=True)
class Share:
    """One share.

    Attributes:
        floor: the least `value / ceiling` that counts as sound.
        enough: a value that is sound whatever the ceiling: on an H200 memory is faster than this kernel's instructions.
    """

    name: str
    ceiling: str
    floor: float
    measure: Callable[[], Reached]
    enough: float = math.inf

    def row(self) -> dict[str, Any]:
        """Measure it now."""
        value, ceiling, unit = self.measure()
        share = value / ceiling
        return {
            "name": self.name, "reached": value, "ceiling": ceiling, "unit": unit, "ceiling_is": self.ceiling,
            "share": share, "floor": self.floor, "sound": share >= self.floor or value >= self.enough,
        }  # fmt: skip


def attention_tensors(kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(heads, tokens, HEAD_DIM, device="cuda").bfloat16()

    return random(Q_HEADS, CHUNK), random(KV_HEADS, kv_len), random(KV_HEADS, kv_len)


def dense_attention(kv_len: int) -> Reached:
    """A chunk over itself (causal) or over a past of another length, against the fastest of torch's operators."""
    from longrun.kernels.dense_attention import attention_with_lse

    q, k, v = attention_tensors(kv_len)
    causal = kv_len == CHUNK
    flops = causal_flops(q[None]) if causal else 4 * HEAD_DIM * Q_HEADS * CHUNK * kv_len
    rows = q if causal else q.view(KV_HEADS, -1, HEAD_DIM)  # as prefill asks
    attend = partial(attention_with_lse, rows, k, v, causal, HEAD_DIM**-0.5)
    own = gpu_times(attend, captured=False).seconds
    repeated = [x.repeat_interleave(Q_HEADS // KV_HEADS, dim=0)[None] for x in (k, v)]
    best = min(sdpa_seconds(q[None], *repeated, causal).values())
    return Reached(flops / own / 1e12, flops / best / 1e12, "TFLOP/s")


def page_decode(kv_format: str) -> Reached:
    """One layer's decode attention straight from pages, a million tokens."""
    from longrun.kernels.page_decode import Workspace
    from longrun.kernels.page_decode_cuda import CudaPageDecode
    from longrun.quant.kv_format import PageFormat
    from scripts.bench import bench_kernels as bench

    pages = TOKENS // 64
    layers = bench.synthetic_layers(4, KV_HEADS, pages, HEAD_DIM, kv_format)
    q = (torch.randn(KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM, device="cuda") * 0.2).bfloat16()
    kernel = CudaPageDecode(HEAD_DIM, kv_format=kv_format)
    space = Workspace.empty(KV_HEADS, kernel.default_splits(KV_HEADS), q.shape[1], HEAD_DIM, q.device)
    out, lse = torch.empty(q.shape, device="cuda"), torch.empty(q.shape[:2], device="cuda")
    decode = partial(kernel.decode_attention, q, workspace=space, out=out, lse=lse)
    seconds = gpu_times(*(partial(decode, *layer) for layer in layers)).seconds
    moved = KV_HEADS * pages * PageFormat(kv_format, 64, HEAD_DIM).page_bytes
    return Reached(moved / seconds / 1e12, copy_tb_s(), "TB/s")


def token_linears(weight_format: str) -> Reached:
    """All linears of 8 layers for one token, with what is fused into them."""
    from scripts.bench import bench_vector_linear as bench

    rows = bench.measure([weight_format], layers=8)
    (row,) = [row for row in rows if row["kernel"] == "vector_linear" and row["details"]["matrix"] == "all"]
    return Reached(row["per_second"] / 1e12, copy_tb_s(), "TB/s")


def chunk_linear() -> Reached:
    """gate and up of a chunk, int4 weights dequantized first, against a plain product of the same shape."""
    from scripts.bench import bench_vector_linear as bench

    rows, width, *_ = bench.MATRICES["gate_up"]
    linear = bench.random_layer("int4", rows, width)
    x = torch.randn(CHUNK, width, device="cuda").bfloat16()
    weight = torch.randn(rows, width, device="cuda").bfloat16()
    out = torch.empty(CHUNK, rows, dtype=torch.bfloat16, device="cuda")
    flops = 2 * CHUNK * rows * width
    own, plain = (
        gpu_times(work, captured=False).seconds
        for work in (partial(linear, x, out=out), partial(torch.mm, x, weight.t(), out=out))
    )
    return Reached(flops / own / 1e12, flops / plain / 1e12, "TFLOP/s")


def fetch() -> Reached:
    """Pages of host memory, gathered by a kernel, against one large pinned copy."""
    from longrun.kernels.page_copy import fetch_pages
    from scripts.bench import bench_fused_kernels as bench

    count = 32_768
    host = torch.empty(count, bench.PAYLOAD, dtype=torch.uint8, pin_memory=True).random_(0, 256)
    view, buffer, table = bench.host_view(host, KV_HEADS)
    times = gpu_times(partial(fetch_pages, view, buffer, table, count // KV_HEADS))
    link = measure_ceilings(torch.device("cuda"), "transfer")["host_to_device_gb_s"]
    return Reached(host.nbytes / times.seconds / 1e9, link, "GB/s")


def copy_tb_s() -> float:
    return measure_ceilings(torch.device("cuda"), "memory")["memory_tb_s"]


def whole_model(command: str, *options: str) -> argparse.Namespace:
    """Arguments as `bench.py` makes them, for a planted model of 4 layers in Llama-3-8B's shape, made here once."""
    from scripts.bench import command as bench

    model = planted_model()
    parser = Parser()
    bench.add_command(parser, command)
    return parser.parse_args([
        "--model", model, "--head-map", str(Path(model) / "head_map"), "--retrieval-ratio", "0.5",
        "--weight-format", "int4", *options,
    ])  # fmt: skip


@cache
def planted_model() -> str:
    from longrun.lab.planted import make_planted_model

    folder = tempfile.mkdtemp(prefix="longrun-shares-")
    made = make_planted_model(Path(folder) / "model", "llama-3-8b", layers=4, device="cuda")
    release(torch.device("cuda"))
    assert made.head_map.name == "head_map", made.head_map
    return str(made.path)


def whole_prefill() -> Reached:
    """131,072 tokens really read by 4 layers, against the time of their operations at the ceilings' speeds. The second
    reading counts: over so few layers, what libraries plan and load for new shapes would be half of the first."""
    from scripts.bench import bench_prefill
    from scripts.bench.bench_common import load_runtime

    length = 4 * CHUNK
    args = whole_model("prefill", "--lengths", str(length))
    ceilings = measure_ceilings(torch.device("cuda"), "matmul", "attention")
    runtime, memory = load_runtime(args, length + bench_prefill.SPARE_TOKENS), MemoryWatch(torch.device("cuda"))
    for _ in range(2):
        row = bench_prefill.prefill_row(runtime, length, args, ceilings, memory)
    ideal = row["tokens"] / row["seconds"] / row["of_matmul_and_attention"]
    return Reached(row["tokens_per_s"], ideal, "tokens/s")


def whole_decode() -> Reached:
    """A token after a million, 4 layers, the captured step with everything around it, against the bytes' own time."""
    from scripts.bench import bench_decode
    from scripts.bench.bench_common import load_runtime

    args = whole_model("decode", "--lengths", "1M", "--synthetic-cache")
    memory = MemoryWatch(torch.device("cuda"))
    runtime = load_runtime(args, TOKENS + bench_decode.decoded_tokens(args) + 1)
    row = bench_decode.decode_row(runtime, TOKENS, args, {"memory_tb_s": copy_tb_s()}, memory)
    return Reached(1e3 / row["ms"]["median"], 1e3 / row["floor_ms"], "tokens/s")


_FASTEST = "the fastest of torch's operators"
SHARES: tuple[Share, ...] = (
    Share("attention of a chunk over itself", _FASTEST, 0.80, partial(dense_attention, CHUNK)),
    Share("attention of a chunk over the past", _FASTEST, 0.80, partial(dense_attention, PAST)),
    Share("decode over k5v3 pages, 1M tokens", "device copy", 0.80, partial(page_decode, "k5v3"), 3.1),
    Share("decode over int4 pages, 1M tokens", "device copy", 0.80, partial(page_decode, "int4")),
    Share("linears of one token, int4", "device copy", 0.60, partial(token_linears, "int4")),
    Share("linears of one token, bf16", "device copy", 0.80, partial(token_linears, "bf16")),
    Share("linear of a chunk, int4", "a plain product", 0.80, chunk_linear),
    Share("pages fetched from the host", "pinned copy", 0.80, fetch),
    Share("prefill of 131,072 tokens, 4 layers", "product and attention", 0.72, whole_prefill),
    Share("decode at 1M tokens, 4 layers", "device copy", 0.75, whole_decode),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="TEXT", help="shares whose name holds this text (default: all)")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the JSON object here as well")


def choose(shares: Sequence[Share], only: str | None) -> list[Share]:
    """Raises InputError where no share's name holds `only`."""
    found = [share for share in shares if only is None or only in share.name]
    if not found:
        names = "; ".join(share.name for share in shares)
        raise InputError(f"--only {only!r} is part of no share's name: choose among {names}")
    return found


def run(args: argparse.Namespace) -> int:
    """The command `shares`: status 1 where a share is below its floor."""
    chosen, device = choose(SHARES, args.only), check_device("cuda")
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "shares", "rows": rows}
    for share in chosen:
        rows.append(share.row())
        release(device)
        save(result, args)
    console = Console(width=140)
    console.print(table(rows))
    for row in rows:
        if not row["sound"]:
            console.print(
                f"TOO SLOW: {row['name']}: {row['share']:.1%} of {row['ceiling_is']}, "
                f"and {row['floor']:.0%} is the floor",
                highlight=False,
            )
    finish_timed(result, args)
    return 0 if all(row["sound"] for row in rows) else 1


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table("what", "reached", "ceiling", "", "share", "floor", "")
    for row in rows:
        found.add_row(
            row["name"], f"{row['reached']:,.2f}", f"{row['ceiling']:,.2f} {row['unit']}", row["ceiling_is"],
            percent(row["share"]), percent(row["floor"]), "" if row["sound"] else "TOO SLOW",
        )  # fmt: skip
    return found
