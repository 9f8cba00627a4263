"""The benchmarks' one GPU timer: seconds of a call, by CUDA events around a graph's replay or around the call itself.

*Captured*, the default: the calls stand in one CUDA graph, as in the decode step, and a replay is timed. A kernel of
microseconds takes less time than its launch from Python, so events around the launch would time the host.

*Not captured*: events around the calls, for work of milliseconds, of which a launch is no part worth counting: large
copies, products and attention (whose libraries choose an operator and allocate at every call), and a graph's own
replay.

L2 is not flushed. Give several calls over different data instead, more than L2 holds between them, as the layers of a
model do; that also works inside a graph, where nothing can be done between two kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

REPEATS = 15
WARM_SECONDS = 0.3  # clocks rise only under load
Work = Callable[[], object]


class Times(NamedTuple):
    """Seconds of one call: the median of the repeats, and the least and most of them."""

    seconds: float
    fastest: float
    slowest: float


class Gpu:
    """What the timer asks of the device and of the host's clock; tests give it another one."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, works: Sequence[Work]) -> Work:
        """One graph of all works; calling the result replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
        return graph.replay

    def elapsed(self, work: Work) -> float:
        """Seconds between the events before and after `work`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def now(self) -> float:
        return time.perf_counter()


def gpu_times(
    *works: Work, captured: bool = True, prepare: Work | None = None, repeats: int = REPEATS, gpu: Gpu | None = None
) -> Times:
    """Seconds of one of `works`, which run one after the other, over `repeats` runs of all of them.

    Every work is called once before anything is captured, so that it compiles and its library loads outside the graph;
    then all of them run for WARM_SECONDS.

    Args:
        prepare: runs before every run, outside the time: what restores an input that the works overwrite.
    """
    gpu = gpu or Gpu()
    for work in works:
        work()
    gpu.synchronize()

    def one_by_one() -> None:
        for work in works:
            work()

    run = gpu.capture(works) if captured else one_by_one
    until = gpu.now() + WARM_SECONDS
    while gpu.now() < until:
        if prepare is not None:
            prepare()
        run()
        gpu.synchronize()
    times = []
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        times.append(gpu.elapsed(run) / len(works))
    return Times(statistics.median(times), min(times), max(times))
