"""What the benchmarks of single kernels share: their rows, the table of them, and the check against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from scripts.bench.bench_common import figure, percent
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.gpu_timer import Times

# A row's ceiling: the kind and the key in `measure_ceilings`, and that key's unit, a second.
_CEILINGS = {
    "copy": ("memory", "memory_tb_s", 1e12),
    "host_to_device": ("transfer", "host_to_device_gb_s", 1e9),
    "device_to_host": ("transfer", "device_to_host_gb_s", 1e9),
    "matrix product": ("matmul", "matmul_tflops", 1e12),
}
CEILING_KINDS = tuple(dict.fromkeys(kind for kind, *_ in _CEILINGS.values()))


def kernel_row(
    kernel: str, shape: str, times: Times, *, num_bytes: int | None = None, flops: float | None = None,
    ceiling: str = "copy", **details: Any,
) -> dict[str, Any]:  # fmt: skip
    """One kernel at one shape: microseconds a call, what it moves or computes, and the share of a ceiling it reaches.

    Args:
        num_bytes, flops: one of them: bytes read and written, each once, or operations.
        ceiling: a key of `_CEILINGS`.
        details: what else the row keeps; `settings` (a dictionary) stands in the table.
    """
    amount = flops if num_bytes is None else num_bytes
    assert amount is not None
    kind, key, unit = _CEILINGS[ceiling]
    rate = amount / times.seconds
    return {
        "kernel": kernel, "shape": shape, "microseconds": 1e6 * times.seconds,
        "fastest_microseconds": 1e6 * times.fastest, "slowest_microseconds": 1e6 * times.slowest,
        "bytes": num_bytes, "flops": flops, "per_second": rate, "ceiling": ceiling,
        "fraction_of_ceiling": rate / (measure_ceilings(torch.device("cuda"), kind)[key] * unit), "details": details,
    }  # fmt: skip


def error_of(actual: Tensor, expected: Tensor, limit: float) -> float:
    """Norm of the difference over the norm of what is expected, in float32. AssertionError unless below `limit`."""
    error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < limit, f"the timed kernel computes something else: relative error {error}"
    return error


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table("kernel", "shape", "settings", "us", "least", "most", "moves", "of ceiling", "ceiling")
    for row in rows:
        moves = f"{(row['flops'] or 0) / 1e9:,.1f} GFLOP" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f} MB"
        settings = row["details"].get("settings", {})
        found.add_row(
            row["kernel"], row["shape"], " ".join(f"{key}={value}" for key, value in settings.items()),
            *(figure(row[f"{name}microseconds"], 1) for name in ("", "fastest_", "slowest_")), moves,
            percent(row["fraction_of_ceiling"]), row["ceiling"].replace("_", " "),
        )  # fmt: skip
    return found
