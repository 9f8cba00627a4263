"""Which attention kernel train_long.py runs on a GPU: one that is asked for, or the faster of two, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.training.long_ranks import Ranks

KERNELS = ("flash", "cudnn")
MEASURED_FROM = 32_768
"""Tokens of a sample from which `auto` measures: below, attention is a small part of a step."""
SAME = 0.02
"""How far results of two kernels may be apart, as a share of their norm: several times what bf16 rounds away."""


class Attention:
    """The kernel of the moment. What it cannot run is an error then, and never a T x T matrix.

    cuDNN plans for every pair of lengths it has not seen; samples of one length a stage keep these few.
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
        self, config: Any, rows: int, length: int, measure: Callable[[str], tuple[float, list[Tensor]]] | None = None
    ) -> dict[str, Any] | None:
        """With `auto`, at the first long stage: measure both and keep the faster, the same in every process.

        cuDNN is kept only where its results are those of flash, up to rounding.

        Args:
            rows, length: samples side by side, and tokens of each.
            measure: seconds of one layer's attention, forward and backward, with a kernel, and its results.

        Returns:
            What to log, or None where nothing was measured.
        """
        if not self._measure or length < MEASURED_FROM or not (self.fixed or measure):
            return None
        self._measure = False
        measure = measure or (lambda kernel: self._run(kernel, config, rows, length))
        entry: dict[str, Any] = {"event": "attention", "length": length}
        flash, expected = measure("flash")
        faster = failed = False
        try:
            cudnn, results = measure("cudnn")
            entry |= {"flash_ms": round(1000 * flash, 3), "cudnn_ms": round(1000 * cudnn, 3)}
            entry["difference"] = round(_difference(results, expected), 6)
            faster, failed = cudnn < flash, not entry["difference"] < SAME
        except (RuntimeError, ValueError) as error:  # a failure is a result of the measurement
            failed, entry["cudnn_error"] = True, str(error)[:300]
        failed = self._ranks.any(failed)
        self.kernel = "cudnn" if self._ranks.any(self._ranks.rank == 0 and faster) and not failed else "flash"
        return {**entry, "kernel": self.kernel}

    def _run(self, kernel: str, config: Any, rows: int, length: int) -> tuple[float, list[Tensor]]:
        """Seconds of one layer's attention, forward and backward, at the second time; its output and gradients."""
        device = self._ranks.device
        heads = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_key_value_heads,
            config.num_attention_heads,
        )
        generator = torch.Generator(device).manual_seed(0)
        *tensors, above = (
            torch.randn(
                (rows, length, number, config.head_dim), device=device, dtype=torch.bfloat16, generator=generator
            )
            .transpose(1, 2)
            .requires_grad_()
            for number in heads
        )
        before, self.kernel = self.kernel, kernel
        try:
            for _ in range(2):
                _wait(device)
                began = time.perf_counter()
                with self.using():
                    out = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
                gradients = torch.autograd.grad(out, tensors, above.detach())
                _wait(device)
                seconds = time.perf_counter() - began
            return seconds, [out.detach(), *gradients]
        finally:
            self.kernel = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest share of its norm that a result is off by; nan where one is not finite."""
    apart = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(results, expected, strict=True)]
    return torch.stack(apart).max().item()
