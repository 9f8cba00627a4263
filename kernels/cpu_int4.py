"""The compiled kernel of `cpu_int4.cpp`: weights to int4 on the CPU, bit for bit what `quant.int4_weight` finds."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import load_cpu_library
from longrun.quant.int4_weight import FACTORS, check_int4


class CpuInt4:
    """Quantizing weights to int4. The torch reference is `quant.int4_weight.quantize_int4_into`.

    Args:
        cache_dir: keeps the compiled library; None, or one that cannot: it is compiled for this process alone.
        more_flags: for the compiler, to leave instructions out.

    Attributes:
        notices: what was wrong with a kept library or its folder.

    Raises:
        KernelUnavailable: no compiler, or the build failed.
    """

    def __init__(self, cache_dir: Path | None, more_flags: tuple[str, ...] = ()) -> None:
        library, self.notices = load_cpu_library("cpu_int4", cache_dir, ("-ffp-contract=off", *more_flags))
        self._run = library.longrun_int4_quantize
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes = (pointer, number, number, pointer, number, pointer, pointer, number)
        self._run.restype = None
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
