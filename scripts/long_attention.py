"""Which attention kernel train_long.py runs on a GPU: one that is asked for, or the faster of two, measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from long_ranks import Ranks

KERNELS = ("flash", "cudnn")
MEASURED_FROM = 32_768
"""Tokens of a sample from which `auto` measures: below, attention is a small part of a step."""


class Attention:
    """The kernel of the moment. What it cannot run is an error then, and never a T x T matrix.

    cuDNN plans anew for every pair of lengths it has not seen, which samples of one length a stage keep few.
    """

    def __init__(self, wanted: str, ranks: Ranks, dtype: torch.dtype) -> None:
        """`wanted`: flash, cudnn, or auto: flash until `choose` measured cuDNN's to be faster."""
        self.kernel = "flash" if wanted == "auto" else wanted
        self._ranks, self._measure = ranks, wanted == "auto"
        self.fixed = ranks.device.type == "cuda" and dtype == torch.bfloat16

    def using(self) -> AbstractContextManager[None]:
        """Within it scaled_dot_product_attention is the kernel; with anything but bf16 on a GPU, PyTorch chooses."""
        if not self.fixed:
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[self.kernel])

    def choose(
        self, config: Any, rows: int, length: int, measure: Callable[[str], float] | None = None
    ) -> dict[str, Any] | None:
        """With `auto`, at the first long stage: measure both and keep the faster, the same in every process.

        Args:
            rows, length: samples side by side, and tokens of each.
            measure: seconds of one layer's attention, forward and backward, with a kernel.

        Returns:
            What to log, or None where nothing was measured.
        """
        if not self._measure or length < MEASURED_FROM or not (self.fixed or measure):
            return None
        self._measure = False
        measure = measure or (lambda kernel: self._seconds(kernel, config, rows, length))
        entry: dict[str, Any] = {"event": "attention", "length": length}
        found: dict[str, float] = {"flash": measure("flash")}
        failed = False
        try:
            found["cudnn"] = measure("cudnn")
        except (RuntimeError, ValueError) as error:  # what is not to be had is a result of the measurement
            failed, entry["cudnn_error"] = True, str(error)[:300]
        failed = self._ranks.any(failed)
        faster = self._ranks.any(self._ranks.rank == 0 and not failed and found["cudnn"] < found["flash"])
        self.kernel = "cudnn" if faster else "flash"
        entry |= {f"{kernel}_ms": round(1000 * seconds, 3) for kernel, seconds in found.items()}
        return {**entry, "kernel": self.kernel}

    def _seconds(self, kernel: str, config: Any, rows: int, length: int) -> float:
        """Of one layer's attention, forward and backward, at the second time."""
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        shapes = [(rows, length, number, config.head_dim) for number in heads]
        plain, self.kernel = self.kernel, kernel
        try:
            tensors = [
                torch.randn(shape, device=self._ranks.device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
                for shape in shapes
            ]
            for _ in range(2):
                torch.cuda.synchronize(self._ranks.device)
                began = time.perf_counter()
                with self.using():
                    out = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
                torch.autograd.grad(out, tensors, torch.ones_like(out))
                torch.cuda.synchronize(self._ranks.device)
                seconds = time.perf_counter() - began
            return seconds
        finally:
            self.kernel = plain
