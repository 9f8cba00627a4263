"""The compiled kernel of `cpu_linear.cpp`: a linear layer for a few tokens on the CPU, straight from the stored weight,
with what stands around it: RMS norm before; bias, SwiGLU gate and residual after.

Activations stay float32 and nothing is rounded but sums, so the result is that of the dequantized weight.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.kernels.prepared_call import PreparedCall, addresses
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import WEIGHT_FORMATS

MAX_TOKENS = 4

_ENUM = {"fp32": 0, "bf16": 1, "int8": 2, "nf4": 3, "int4": 4}  # Format in cpu_linear.cpp
assert set(_ENUM) == set(WEIGHT_FORMATS)


class _Call(ctypes.Structure):
    """`Call` in cpu_linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "code", "bias", "norm", "x", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "format", "bf16", "in_features", "num_outputs", "gated", "accumulate", "tokens", "x_stride",
                "out_stride", "threads",
            )
        ),
        ("eps", ctypes.c_double),
    ]  # fmt: skip


class CpuLinear(CpuKernel):
    """One to four tokens through a linear of any weight format.

    Attributes:
        max_tokens: rows that a call may have.
    """

    source = "cpu_linear"
    max_tokens = MAX_TOKENS

    def __init__(self, cache_dir: Path | None, more_flags: tuple[str, ...] = ()) -> None:
        super().__init__(cache_dir, more_flags)
        self._run = self._function("longrun_linear", ctypes.POINTER(_Call))

    def vector_linear(
        self, x: Tensor, linear: QuantLinear, out: Tensor | None = None, *,
        norm_weight: Tensor | None = None, eps: float = 0.0, gated: bool = False, accumulate: bool = False,
    ) -> Tensor:  # fmt: skip
        """Product of a few rows with the weight, bias added: `linear(x)`, or with options, in this order:

        Args:
            x: [T, in_features], 1 to 4 rows of float32 or bfloat16; channels contiguous.
            linear: any weight format, on the CPU.
            out: [T, num_outputs], dtype of x, channels contiguous, not overlapping x; without it a new tensor.
            norm_weight: [in_features], dtype of x; multiply by `rms_norm(x, norm_weight, eps)`, rounded to x's dtype,
                instead of x.
            gated: the weight's rows are gate rows, then as many up rows; the result is `silu(gate) * up`.
            accumulate: add to `out`, in float32.

        Returns:
            [T, out_features], gated [T, out_features // 2], dtype of x; `out` where given. Beside it a call takes
            10 bytes an element of x.
        """
        if out is None:
            out = x.new_empty(x.shape[0], _check(x, linear, None, norm_weight, gated, accumulate))
        self.prepare(x, linear, out, norm_weight=norm_weight, eps=eps, gated=gated, accumulate=accumulate)()
        return out

    def prepare(
        self, x: Tensor, linear: QuantLinear, out: Tensor, *,
        norm_weight: Tensor | None = None, eps: float = 0.0, gated: bool = False, accumulate: bool = False,
    ) -> PreparedCall:  # fmt: skip
        """`vector_linear` to be run again and again, with what the tensors then hold and as many threads as now."""
        num_outputs = _check(x, linear, out, norm_weight, gated, accumulate)
        scale, code = linear.scale, linear.code if linear.weight_format == "nf4" else None
        tensors = (linear.data, scale, code, linear.bias, norm_weight, x, out)
        call = _Call(
            *addresses(tensors),
            _ENUM[linear.weight_format], x.dtype == torch.bfloat16, linear.in_features, num_outputs, gated,
            accumulate, x.shape[0], x.stride(0), out.stride(0), torch.get_num_threads(), eps,
        )  # fmt: skip
        return PreparedCall(self._run, call, tensors=tensors)


def vector_linear_reference(
    x: Tensor, linear: QuantLinear, out: Tensor | None = None, *,
    norm_weight: Tensor | None = None, eps: float = 0.0, gated: bool = False, accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """`CpuLinear.vector_linear` in torch, products and sums in float32 from `linear.dense()`."""
    num_outputs = _check(x, linear, out, norm_weight, gated, accumulate)
    if norm_weight is not None:
        row = x.float()
        x = (row * (row.square().mean(1, keepdim=True) + eps).rsqrt() * norm_weight.float()).to(x.dtype)
    product = F.linear(x.float(), linear.dense().float(), None if linear.bias is None else linear.bias.float())
    if gated:
        product = F.silu(product[:, :num_outputs]) * product[:, num_outputs:]
    if out is None:
        return product.to(x.dtype)
    return out.copy_(out.float() + product if accumulate else product)


def _check(
    x: Tensor, linear: QuantLinear, out: Tensor | None, norm_weight: Tensor | None, gated: bool, accumulate: bool
) -> int:
    """The number of outputs."""
    rows = linear.out_features
    assert 1 <= x.shape[0] <= MAX_TOKENS and x.shape[1] == linear.in_features, x.shape
    assert x.stride(1) == 1 and x.dtype in (torch.float32, torch.bfloat16)
    assert linear.data.device.type == "cpu" and (linear.bias is None or linear.bias.dtype == x.dtype)
    assert not (gated and rows % 2)
    num_outputs = rows // 2 if gated else rows
    assert norm_weight is None or (norm_weight.shape == (linear.in_features,) and norm_weight.dtype == x.dtype)
    assert out is not None or not accumulate
    if out is not None:
        assert out.shape == (x.shape[0], num_outputs) and out.dtype == x.dtype and out.stride(1) == 1
    return num_outputs
