"""A short measurement of this machine, once: `first_speeds` before a run. On a GPU it happens in a process of its own.

A product, attention and copies there would leave torch and cuBLAS memory behind that no plan knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F

from longrun.machine.speeds import CPU_ATTENTION, Speeds, cpu_name, keep_speeds, kept_speeds, known_speeds, num_cores

_CHILD_SECONDS = 120
_WARM_SECONDS = 0.2  # clocks rise only under load


def first_speeds(device_type: str, tell: Callable[[str], object] = lambda text: None) -> Speeds | None:
    """The speeds of this machine: kept ones, else measured now (a second on a CPU, some seconds on a GPU) and kept.

    Args:
        tell: told before a GPU is measured.

    Returns:
        An estimate where measuring fails (the GPU's memory may be taken), None where there is none either.
    """
    kept = kept_speeds(device_type)
    if kept is not None:
        return kept
    if device_type == "cuda":
        tell("measuring this GPU, once")
    found = measure_cpu() if device_type == "cpu" else _in_child()
    if found is None:
        return known_speeds(device_type)
    if device_type == "cuda" or os.getloadavg()[0] <= num_cores():  # a busy machine is measured again next time
        keep_speeds(device_type, found)
    return found


def measure_cpu() -> Speeds:
    """A float32 product and reading memory; attention is taken from the product."""
    a, b = torch.randn(1024, 1536), torch.randn(1536, 1536)
    product = 2 * 1024 * 1536 * 1536 / _best(lambda: a @ b, 0.2) / 1e12
    big = torch.randn(24 * 2**20)
    other = torch.empty_like(big)
    return Speeds(
        device=f"{cpu_name()}, {num_cores()} cores",
        matmul_tflops=product,
        attention_tflops=CPU_ATTENTION * product,
        memory_gb_s=big.nbytes / _best(lambda: big.sum(), 0.2) / 1e9,
        link_gb_s=big.nbytes / _best(lambda: other.copy_(big), 0.1) / 1e9,
        measured=True,
    )


def measure_gpu(device: str = "cuda") -> Speeds:
    """bf16 product, causal attention of 32 heads over 16,384 tokens, device copy of 1 GiB, pinned copy of 256 MiB."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    q, k, v = (torch.randn(1, 32, 16384, 128, device=device).bfloat16() for _ in range(3))
    source = torch.empty(2**30, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True).fill_(1)
    attended = 4 * 128 * 32 * 16384**2 / 2
    return Speeds(
        device=torch.cuda.get_device_name(device),
        matmul_tflops=2 * 8192**3 / _gpu_seconds(lambda: a @ b) / 1e12,
        attention_tflops=attended
        / _gpu_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        / 1e12,
        memory_gb_s=2 * source.nbytes / _gpu_seconds(lambda: target.copy_(source)) / 1e9,
        link_gb_s=pinned.nbytes / _gpu_seconds(lambda: target[: pinned.nbytes].copy_(pinned, non_blocking=True)) / 1e9,
        measured=True,
    )


def _best(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call within about `seconds`, of two at least."""
    until, times = time.perf_counter() + seconds, []
    while len(times) < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a call under load, by CUDA events around `repeats` of them."""
    until = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < until:
        work()
        torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def _in_child() -> Speeds | None:
    """What `main` prints in a process of its own; None where it fails."""
    command = [sys.executable, "-m", "longrun.machine.measure"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_SECONDS, check=True)
        return Speeds(**json.loads(done.stdout))
    except (subprocess.SubprocessError, OSError, ValueError, TypeError):
        return None


def main() -> None:
    print(json.dumps(asdict(measure_gpu())))


if __name__ == "__main__":
    main()
