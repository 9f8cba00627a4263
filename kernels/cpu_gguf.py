"""The compiled kernel of `cpu_gguf.cpp`: quantized tensors of GGUF files to values, bit for bit what `gguf` finds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel, built_or_none

# Values and bytes of a block.
_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip


class CpuGguf(CpuKernel):
    """Dequantizing. The reference is `gguf.dequantize`, and `Tensor.copy_` for bfloat16.

    Attributes:
        by_type: name of a tensor type -> function of (stored: uint8 numpy array, the blocks one behind the other; out:
            float32 or bfloat16 tensor of as many values, contiguous, on the CPU), which sets `out`. Other Python
            threads run meanwhile. Most files need no other types.
    """

    source = "cpu_gguf"

    def __init__(self, cache_dir: Path | None, more_flags: tuple[str, ...] = ()) -> None:
        super().__init__(cache_dir, ("-ffp-contract=off", *more_flags))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.by_type: dict[str, Callable[[Any, Tensor], None]] = {
            name: partial(_run, self._function(f"longrun_gguf_{name}", pointer, number, number, pointer), *block)
            for name, block in _BLOCKS.items()
        }


def gguf_dequantizer(notices: list[str]) -> CpuGguf | None:
    """The compiled kernel, kept in the user's cache folder, or None where there is no compiler; `notices` gets what is
    wrong."""

    def build(folder: Path | None) -> tuple[CpuGguf, list[str]]:
        kernel = CpuGguf(folder)
        return kernel, kernel.notices

    return built_or_none(build, "numpy reads the weights, which takes longer", notices)


def _run(function: Callable[..., Any], block_values: int, block_bytes: int, stored: Any, out: Tensor) -> None:
    count = out.numel() // block_values
    assert stored.dtype == "uint8" and stored.flags.c_contiguous and stored.nbytes == count * block_bytes
    assert out.is_contiguous() and out.numel() == count * block_values and out.device.type == "cpu"
    assert out.dtype in (torch.float32, torch.bfloat16)
    function(stored.ctypes.data, count, out.dtype == torch.bfloat16, out.data_ptr())
