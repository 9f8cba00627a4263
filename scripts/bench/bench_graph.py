"""Timing of GPU kernels by replays of a CUDA graph, and the copy bandwidth they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

REPEATS = 15


def graph_seconds(work: Callable[[], object], inner: int, divide_by: int | None = None) -> list[float]:
    """Seconds a call, sorted, over replays of a CUDA graph of `inner` calls.

    Args:
        divide_by: what one replay counts as; default `inner`.
    """
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            work()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / (divide_by or inner))
    return sorted(times)


def copy_ceilings() -> dict[str, float]:
    """Bytes a second, read and written, of copies of 1 GiB of random bytes: the driver's and an elementwise one."""
    source = torch.randint(0, 2**15, (2**29,), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    ways = {"memcpy": lambda: target.copy_(source), "elementwise": lambda: torch.bitwise_not(source, out=target)}
    return {name: 2 * source.nbytes / statistics.median(graph_seconds(work, 4)) for name, work in ways.items()}
