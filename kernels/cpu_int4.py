"""The compiled kernel of `cpu_int4.cpp`: weights to int4 on the CPU, bit for bit what `quant.int4_weight` finds."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.quant.int4_weight import FACTORS, check_int4


class CpuInt4(CpuKernel):
    """Quantizing weights to int4. The torch reference is `quant.int4_weight.quantize_int4_into`."""

    source = "cpu_int4"

    def __init__(self, cache_dir: Path | None, more_flags: tuple[str, ...] = ()) -> None:
        super().__init__(cache_dir, ("-ffp-contract=off", *more_flags))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        types = (pointer, number, number, pointer, number, pointer, pointer, number)
        self._run = self._function("longrun_int4_quantize", *types)
        self._factors = (ctypes.c_float * len(FACTORS))(*FACTORS)

    def quantize(self, weight: Tensor, data: Tensor, scale: Tensor, threads: int | None = None) -> None:
        """Set `data` and `scale` to what int4 stores of `weight`.

        Args:
            weight: float32 [rows, columns], contiguous, on the CPU.
            data, scale: see `quantize_int4_into`; contiguous.
            threads: torch's number without it. Other Python threads run meanwhile.
        """
        check_int4(weight, data, scale)
        assert weight.dtype == torch.float32 and all(x.is_contiguous() for x in (weight, data, scale))
        assert weight.device.type == data.device.type == scale.device.type == "cpu"
        self._run(
            weight.data_ptr(), *weight.shape, self._factors, len(FACTORS), data.data_ptr(), scale.data_ptr(),
            threads or torch.get_num_threads(),
        )  # fmt: skip
