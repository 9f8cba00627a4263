"""What a machine does at best, measured in the run that is compared with it: copies, products, attention, transfers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WARM_SECONDS = 0.3  # clocks rise only under load


def best_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, on the host's clock."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def gpu_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a call by CUDA events, after warming up under load."""
    until = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < until:
        work()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def cpu_ceilings() -> dict[str, float]:
    """A float32 matrix product (GFLOP/s) and reading memory (GB/s)."""
    a, b = torch.randn(1024, 1536), torch.randn(1536, 1536)
    product = best_of(lambda: a @ b, 20)
    big = torch.randn(64 * 2**20)
    read = best_of(lambda: big.sum(), 10)
    return {"gemm_gflops": 2 * 1024 * 1536 * 1536 / product / 1e9, "memory_read_gb_s": big.nbytes / read / 1e9}


def memory_ceilings(device: torch.device, num_bytes: int = 4 * 2**30) -> dict[str, Any]:
    """The device's memory bandwidth; `memory_tb_s` is what floors are computed with.

    On a GPU that is the fastest copy of `num_bytes`, bytes read and written, by the driver or by a kernel; reading
    alone stands beside it. On a CPU it is reading.
    """
    if device.type == "cpu":
        found = cpu_ceilings()
        return {"memory_tb_s": found["memory_read_gb_s"] / 1e3, "memory_is": "reading main memory", **found}
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    found = {
        "driver_copy_tb_s": moved / gpu_seconds(lambda: target.copy_(source)) / 1e12,
        "kernel_copy_tb_s": moved / gpu_seconds(lambda: torch.mul(source, 2, out=target)) / 1e12,
        "read_tb_s": source.nbytes / gpu_seconds(lambda: source.sum()) / 1e12,
    }
    best = max(found["driver_copy_tb_s"], found["kernel_copy_tb_s"])
    return {"memory_tb_s": best, "memory_is": "device copy, bytes read and written", **found}


def compute_ceilings(device: torch.device) -> dict[str, Any]:
    """`matmul_tflops` (bf16 on a GPU, float32 on a CPU) and `attention_tflops` (torch's fastest causal SDPA)."""
    if device.type == "cpu":
        matmul, backend = cpu_ceilings()["gemm_gflops"] / 1e3, "default"
        q = torch.randn(1, 4, 1024, 64)
        seconds = best_of(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), 5)
        return {
            "matmul_tflops": matmul, "attention_tflops": causal_flops(q) / seconds / 1e12, "attention_by": backend,
        }  # fmt: skip
    best_matmul, shape = 0.0, None
    for m, n, k in ((8192, 8192, 8192), (16384, 14336, 4096), (16384, 4096, 14336)):
        a, b = (torch.randn(size, device=device).bfloat16() for size in ((m, k), (k, n)))
        rate = 2 * m * n * k / gpu_seconds(lambda a=a, b=b: a @ b) / 1e12
        if rate > best_matmul:
            best_matmul, shape = rate, f"{m} x {n} x {k}"
    rates = _attention_rates(torch.randn(1, 32, 32768, 128, device=device).bfloat16())
    fastest = max(rates, key=rates.__getitem__)
    return {
        "matmul_tflops": best_matmul, "matmul_shape": shape, "attention_tflops": rates[fastest],
        "attention_by": fastest, "attention_all": rates, "attention_shape": "32 heads x 32,768 tokens x 128, causal",
    }  # fmt: skip


def causal_flops(q: Tensor) -> float:
    """Floating-point operations of causal attention of q [1, H, N, D] over itself."""
    _, heads, tokens, dim = q.shape
    return 4 * dim * heads * tokens**2 / 2


def _attention_rates(q: Tensor) -> dict[str, float]:
    """TFLOP/s by backend; one that cannot run here is left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    k, v = torch.randn_like(q), torch.randn_like(q)
    rates = {"default": causal_flops(q) / gpu_seconds(_attend(q, k, v)) / 1e12}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                rates[backend.name.lower()] = causal_flops(q) / gpu_seconds(_attend(q, k, v)) / 1e12
        except RuntimeError:
            continue
    return rates


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def transfer_ceilings(device: torch.device, num_bytes: int = 2**30) -> dict[str, Any]:
    """`host_to_device_gb_s` and `device_to_host_gb_s` of pinned copies; on a CPU 64 MiB are copied in main memory."""
    num_bytes = num_bytes if device.type == "cuda" else 2**26
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").random_(0, 256)
    other = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    if device.type == "cpu":
        rate = num_bytes / best_of(lambda: other.copy_(pinned), 3) / 1e9
        return {"host_to_device_gb_s": rate, "device_to_host_gb_s": rate, "transfer_is": "copy within main memory"}
    return {
        "host_to_device_gb_s": num_bytes / gpu_seconds(lambda: other.copy_(pinned, non_blocking=True)) / 1e9,
        "device_to_host_gb_s": num_bytes / gpu_seconds(lambda: pinned.copy_(other, non_blocking=True)) / 1e9,
        "transfer_is": "pinned copy of 1 GiB",
    }
