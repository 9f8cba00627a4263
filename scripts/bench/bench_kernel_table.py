"""Every kernel alone: runs the kernels' own benchmarks and puts what they measured into one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.errors import InputError
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS
from longrun.units import format_tokens
from scripts.bench.bench_common import figure, finish_timed, percent, release, save

DECODE_TOKENS = [524_288, 1_000_000, 3_300_000]
PAGE_TOKENS = [32_768, 524_288]


def page_decode() -> list[dict[str, Any]]:
    from scripts.bench import bench_kernels as bench

    ceilings, found = bench.measure_ceilings(), []
    for name in QUANTIZED_KV_FORMATS:
        found += bench.bench_page_decode(DECODE_TOKENS, ceilings, kv_format=name)
        found += bench.bench_page_decode(DECODE_TOKENS[:1], ceilings, heads=8, group=1, kv_format=name)
        found += bench.bench_page_decode(DECODE_TOKENS[:1], ceilings, heads=8, group=8, head_dim=64, kv_format=name)
    return [
        {
            "kernel": f"{row.kv_format} decode, {row.kernel}",
            "shape": f"{row.shape}, {format_tokens(row.tokens)} tokens",
            "microseconds": row.us,
            "bytes": round(row.tb_s * row.us * 1e6),
            "fraction_of_ceiling": row.of_copy,
            "ceiling": "copy",
            "details": asdict(row),
        }
        for row in found
    ]


def page_kernels() -> list[dict[str, Any]]:
    from scripts.bench import bench_page_kernels as bench

    ceiling, found = max(bench.copy_ceilings().values()), []
    for tokens, name in product(PAGE_TOKENS, QUANTIZED_KV_FORMATS):
        found += bench.measure(128, torch.bfloat16, 8, tokens, [2], ceiling, name)
    shape = "{heads} heads x {length} tokens x {head_dim}, {kv_format}"
    return [common(row, shape=shape.format(length=format_tokens(row["tokens"]), **row)) for row in found]


def fused_kernels() -> list[dict[str, Any]]:
    from scripts.bench import bench_fused_kernels as bench

    return [common(row) for row in bench.measure()]


def vector_linear() -> list[dict[str, Any]]:
    from scripts.bench import bench_vector_linear as bench

    ceiling = max(bench.copy_ceilings().values())
    return [common(row, shape=f"{row['format']}, {row['matrix']}") for row in bench.measure(ceiling)]


def streaming_kernels() -> list[dict[str, Any]]:
    from scripts.bench import bench_streaming_kernels as bench

    ceilings = bench.ceilings()
    rates = {"flop": ceilings["matmul_flop_per_s"], "bytes": max(v for k, v in ceilings.items() if "bytes" in k)}
    found = []
    for row in bench.measure():
        if "error" in row:
            continue
        amount = "flop" if "flop" in row else "bytes"
        size = f"{row['tokens']:,} tokens" if "tokens" in row else f"{row['num_slots']:,} slots"
        shape = f"{row['kv_heads']} x {row['group']} x {row['head_dim']}, {size}"
        made = common(row, shape=shape, ceiling="matrix product" if amount == "flop" else "copy")
        found.append({**made, "fraction_of_ceiling": row[f"{amount}_per_s"] / rates[amount]})
    return found


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "page_decode": page_decode,
    "page": page_kernels,
    "fused": fused_kernels,
    "vector_linear": vector_linear,
    "streaming": streaming_kernels,
}


def common(row: Any, **given: Any) -> dict[str, Any]:
    """A kernel benchmark's own row (dictionary or dataclass) under the names of this table; `details` keeps it whole.

    Taken by the first name that is there: time (`microseconds`, `us`), amount (`bytes`; `flops`, `flop`) and the
    fraction of the ceiling (`fraction_of_ceiling`, `fraction_of_copy`, `of_copy`, `of_ceiling`). `given` wins.
    """
    row = dict(row) if isinstance(row, dict) else asdict(row)
    fractions = ("fraction_of_ceiling", "fraction_of_copy", "of_copy", "of_ceiling")
    by_copy = "fraction_of_ceiling" not in row and ("fraction_of_copy" in row or "of_copy" in row)
    return {
        "kernel": row["kernel"],
        "shape": str(row.get("shape", "")),
        "microseconds": _first(row, ("microseconds", "us")),
        "bytes": row.get("bytes"),
        "flops": _first(row, ("flops", "flop")),
        "fraction_of_ceiling": _first(row, fractions),
        "ceiling": row.get("ceiling") if isinstance(row.get("ceiling"), str) else "copy" if by_copy else None,
        "details": row,
        **given,
    }


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def run(args: argparse.Namespace) -> int:
    """The command `kernels`. A benchmark that fails is a line of the result, and the others run."""
    wanted = [name.strip() for name in args.only.split(",")] if args.only else list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        raise InputError(f"--only {unknown[0]} is no kernel benchmark: choose from {', '.join(BENCHMARKS)}")
    if not torch.cuda.is_available():
        raise InputError(
            "torch finds no GPU here, and the kernel benchmarks need one: run them on a machine with a GPU"
        )
    rows, problems, console = [], {}, Console(width=160)
    for name in wanted:
        try:
            rows += [{"benchmark": name, **row} for row in BENCHMARKS[name]()]
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:500]
            console.print(f"{name}: {problems[name]}", highlight=False)
        release(torch.device("cuda"))
        save({"benchmark": "kernels", "rows": rows, "problems": problems}, args)
    console.print(table(rows))
    return finish_timed({"benchmark": "kernels", "rows": rows, "problems": problems}, args)


def amount_text(row: dict[str, Any]) -> str:
    """Bytes in MB, or operations in GFLOP."""
    if row.get("bytes") is not None:
        return f"{row['bytes'] / 1e6:,.1f} MB"
    return "-" if row.get("flops") is None else f"{row['flops'] / 1e9:,.1f} GFLOP"


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table("kernel", "shape", "us", "moves", "of ceiling", "ceiling")
    for row in rows:
        found.add_row(
            row["kernel"], row["shape"], figure(row["microseconds"], 1), amount_text(row),
            percent(row["fraction_of_ceiling"]), row["ceiling"] or "-",
        )  # fmt: skip
    return found
