"""What a machine does at best, measured in the run that is compared with it: copies, products, attention, transfers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.bench.bench_common import release
from scripts.bench.gpu_timer import gpu_times

COPIED_BYTES, TRANSFERRED_BYTES = 4 * 2**30, 2**30
PRODUCTS = ((8192, 8192, 8192), (16384, 14336, 4096), (16384, 4096, 14336))


def measure_ceilings(device: torch.device, *kinds: str) -> dict[str, Any]:
    """The ceilings of these kinds (`memory`, `matmul`, `attention`, `transfer`), in one dictionary.

    Each kind is measured once a process, and then printed: name them all before anything else of a benchmark runs.
    """
    return {key: value for kind in kinds for key, value in measured(kind, device).items()}


@cache
def measured(kind: str, device: torch.device) -> dict[str, Any]:
    """One kind, from `MEASURES`."""
    measure, line = MEASURES[kind]
    found = measure(device)
    release(device)
    print(f"ceiling: {line.format(**found)}", flush=True)
    return found


def memory(device: torch.device) -> dict[str, Any]:
    """`memory_tb_s`, with which floors are computed.

    On a GPU that is the fastest copy of 4 GiB, bytes read and written, by the driver or by a kernel; reading alone
    is measured, too. On a CPU it is reading.
    """
    if device.type == "cpu":
        big = torch.randn(64 * 2**20)
        return {"memory_tb_s": big.nbytes / _best_of(big.sum, 10) / 1e12, "memory_is": "reading main memory"}
    source = torch.randn(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    found = {
        "driver_copy_tb_s": moved / _seconds(lambda: target.copy_(source)) / 1e12,
        "kernel_copy_tb_s": moved / _seconds(lambda: torch.mul(source, 2, out=target)) / 1e12,
        "read_tb_s": source.nbytes / _seconds(source.sum) / 1e12,
    }
    best = max(found["driver_copy_tb_s"], found["kernel_copy_tb_s"])
    return {"memory_tb_s": best, "memory_is": "device copy, bytes read and written", **found}


def matmul(device: torch.device) -> dict[str, Any]:
    """`matmul_tflops` of the fastest of three large products, bf16 on a GPU, or of one in float32 on a CPU."""
    if device.type == "cpu":
        (m, n, k), dtype, seconds = (1024, 1536, 1536), torch.float32, partial(_best_of, repeats=20)
        products: tuple[tuple[int, int, int], ...] = ((m, n, k),)
    else:
        products, dtype, seconds = PRODUCTS, torch.bfloat16, _seconds
    rates = {}
    for m, n, k in products:
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
        rates[f"{m} x {n} x {k}"] = 2 * m * n * k / seconds(partial(torch.mm, a, b)) / 1e12
    shape = max(rates, key=rates.__getitem__)
    return {"matmul_tflops": rates[shape], "matmul_shape": shape}


def attention(device: torch.device) -> dict[str, Any]:
    """`attention_tflops` of torch's fastest causal attention, bf16 on a GPU, float32 on a CPU."""
    heads, tokens, dim = (4, 1024, 64) if device.type == "cpu" else (32, 32768, 128)
    q = torch.randn(1, heads, tokens, dim, device=device)
    if device.type == "cpu":
        times = {"default": _best_of(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), 5)}
    else:
        q = q.bfloat16()
        times = sdpa_seconds(q, torch.randn_like(q), torch.randn_like(q), causal=True)
    rates = {name: causal_flops(q) / seconds / 1e12 for name, seconds in times.items()}
    fastest = max(rates, key=rates.__getitem__)
    return {
        "attention_tflops": rates[fastest], "attention_by": fastest, "attention_all": rates,
        "attention_shape": f"{heads} heads x {tokens:,} tokens x {dim}, causal",
    }  # fmt: skip


def transfer(device: torch.device) -> dict[str, Any]:
    """`host_to_device_gb_s` and `device_to_host_gb_s` of pinned copies; on a CPU 64 MiB are copied in main memory."""
    if device.type == "cpu":
        source = torch.empty(2**26, dtype=torch.uint8).random_(0, 256)
        rate = source.nbytes / _best_of(partial(torch.empty_like(source).fill_(1).copy_, source), 3) / 1e9
        return {"host_to_device_gb_s": rate, "device_to_host_gb_s": rate, "transfer_is": "copy within main memory"}
    pinned = torch.empty(TRANSFERRED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda").random_(0, 256)
    other = torch.empty(TRANSFERRED_BYTES, dtype=torch.uint8, device=device).fill_(1)
    return {
        "host_to_device_gb_s": pinned.nbytes / _seconds(lambda: other.copy_(pinned, non_blocking=True)) / 1e9,
        "device_to_host_gb_s": pinned.nbytes / _seconds(lambda: pinned.copy_(other, non_blocking=True)) / 1e9,
        "transfer_is": "pinned copy of 1 GiB",
    }


# What measures a kind, and the line that is printed.
MEASURES: dict[str, tuple[Callable[[torch.device], dict[str, Any]], str]] = {
    "memory": (memory, "{memory_tb_s:.4g} TB/s, {memory_is}"),
    "matmul": (matmul, "{matmul_tflops:.4g} TFLOP/s, matrix product of {matmul_shape}"),
    "attention": (attention, "{attention_tflops:.4g} TFLOP/s, attention of {attention_shape}, by {attention_by}"),
    "transfer": (
        transfer, "{host_to_device_gb_s:.4g} GB/s from the host, {device_to_host_gb_s:.4g} GB/s to it, {transfer_is}"
    ),
}  # fmt: skip


def causal_flops(q: Tensor) -> float:
    """Floating-point operations of causal attention of q [1, H, N, D] over itself."""
    _, heads, tokens, dim = q.shape
    return 4 * dim * heads * tokens**2 / 2


def sdpa_seconds(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, float]:
    """Seconds of torch's attention on the GPU, q, k, v [1, H, N, D], by operator: the one that torch chooses, and each
    that can be asked for; one that cannot run here is left out."""
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
    found = {"default": _seconds(attend)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                found[backend.name.lower()] = _seconds(attend)
        except RuntimeError:
            continue
    return found


def _seconds(work: Callable[[], object]) -> float:
    return gpu_times(work, captured=False).seconds


def _best_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls on a CPU."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
