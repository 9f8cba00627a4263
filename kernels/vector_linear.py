"""A linear layer for one token, straight from the stored weight, with what stands around it: RMS norm before; bias,
SwiGLU gate and residual after. One launch, one reading of the weight.

`vector_linear_packed` multiplies int8, nf4 and int4 weights by 16-bit or bfloat16 activations, `vector_linear_dense`
everything else. Every output is made by one program that sums along in_features in float32 in a fixed order: results
do not change from call to call, nor with the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.overlap import overlaps
from longrun.kernels.vector_linear_dense import dense_kernel
from longrun.kernels.vector_linear_packed import code_planes, packed_kernel
from longrun.quant.linear import QuantLinear

MULTIPLE = 64
MAX_IN_FEATURES = 65536
_CHUNK = {"int8": 16, "nf4": 32, "int4": 32}  # weights of 16 bytes


@dataclass(frozen=True)
class Tuning:
    """Shape of a program; changes no result but the order of summation.

    Attributes:
        block_rows: outputs of a program (with a gate, as many rows twice); a power of two.
        block_k: weights of a row that are worked on at a time, a power of two; more than in_features is cut.
        num_warps: warps of a program; they share its rows' weights.
        num_stages: software pipelining over block_k; 1 is none.
    """

    block_rows: int
    block_k: int
    num_warps: int
    num_stages: int


def default_tuning(
    weight_format: str, packed: bool, num_outputs: int, in_features: int, gated: bool, overlap: bool = False
) -> Tuning:
    """What to launch for this shape: at least a few hundred programs, and 8 to 16 loads of 16 bytes a thread. With
    `overlap` a row of several steps holds two of them at a time: they are shorter, and all programs still run at once.
    """
    if not packed:
        block_rows = (2 if gated else 4) if weight_format in ("bf16", "int8") else 2
        return Tuning(block_rows, 2048 if weight_format == "bf16" else 1024, 4, 1)
    block_rows = 8 if num_outputs >= 2048 else 4 if num_outputs >= 1024 else 2
    if weight_format in ("nf4", "int4"):
        return Tuning(block_rows, 2048 if overlap and in_features > 4096 else 4096, 4, 1)
    return Tuning(block_rows, 1024 if overlap and gated else 2048, 4, 1)


def vector_linear(
    x: Tensor, linear: QuantLinear, out: Tensor | None = None, *,
    norm_weight: Tensor | None = None, eps: float = 0.0, gated: bool = False, accumulate: bool = False,
    packed: bool = True, tuning: Tuning | None = None, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """Product of one row with the weight, bias added: `linear(x)`, or with options, in this order:

    Args:
        x: [1, in_features], bfloat16, float16 or float32, the layer's compute dtype, contiguous.
        linear: any weight format; in_features a multiple of 64, at most 65,536.
        out: [1, num_outputs] compute dtype, contiguous, not overlapping x; without it a new tensor.
        norm_weight: [in_features] compute dtype; multiply by `rms_norm(x, norm_weight, eps)`, rounded to x's dtype,
            instead of x.
        gated: the weight's rows are gate rows, then as many up rows; the result is `silu(gate) * up`.
        accumulate: add to `out`, in float32.
        packed: integer products for int8, nf4 and int4 with 16-bit x (needs a GPU); otherwise, and without it, float32.
        tuning: None for `default_tuning`.
        overlap: begin while the kernel before this one ends, where the GPU can (see `overlap.overlaps`).

    Returns:
        [1, out_features], gated [1, out_features // 2], compute dtype; `out` where given. Nothing is allocated then,
        and nothing waits for the device, but in the first call for a shape or a device.

    Raises:
        ConfigError: more than one row; in_features that no kernel serves; gated with an odd number of rows.
    """
    num_outputs = check_shapes(x, linear, norm_weight, gated, accumulate, out)
    in_features, weight_format = linear.in_features, linear.weight_format
    packed = packed and weight_format in _CHUNK and x.dtype != torch.float32
    overlap = overlap and overlaps(x.device)
    tuning = tuning or default_tuning(weight_format, packed, num_outputs, in_features, gated, overlap)
    if out is None:
        out = x.new_empty(1, num_outputs)
    norm = x if norm_weight is None else norm_weight
    bias = x if linear.bias is None else linear.bias
    scale = {"int8": linear.row_scale, "nf4": linear.absmax, "int4": linear.group_scale}.get(weight_format, x)
    wide = triton.next_power_of_2(in_features)
    block_k = min(tuning.block_k, wide)
    options = {
        "K": in_features, "WIDE": wide, "BLOCK_ROWS": tuning.block_rows, "STAGES": tuning.num_stages,
        "NORM": norm_weight is not None, "GATED": gated, "BIAS": linear.bias is not None, "ADD": accumulate,
        "num_warps": tuning.num_warps, "PDL": overlap, "launch_pdl": overlap,
    }  # fmt: skip
    grid = (-(-num_outputs // tuning.block_rows),)
    if packed:
        words = linear.data.view(-1).view(torch.int32)
        table = _code_planes(linear.code) if weight_format == "nf4" else words
        chunks = block_k // _CHUNK[weight_format]
        packed_kernel[grid](
            x, norm, words, scale, table, bias, out, num_outputs, eps, CHUNKS=chunks, FORMAT=weight_format, **options
        )
    else:
        code = linear.code if weight_format == "nf4" else x
        vector = 16 // linear.data.itemsize
        dense_kernel[grid](
            x, norm, linear.data, scale, code, bias, out, num_outputs, eps,
            BLOCK_K=block_k, VECTOR=vector, FORMAT=weight_format, **options,
        )  # fmt: skip
    return out


def vector_linear_reference(
    x: Tensor, linear: QuantLinear, out: Tensor | None = None, *,
    norm_weight: Tensor | None = None, eps: float = 0.0, gated: bool = False, accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """`vector_linear` in torch from `linear.dense()`, products and sums in float32: its rounding of a dequantized
    weight to the compute dtype is the only one that the kernels do not have."""
    num_outputs = check_shapes(x, linear, norm_weight, gated, accumulate, out)
    if norm_weight is not None:
        row = x.float()
        row = row * (row.square().mean(dim=1, keepdim=True) + eps).rsqrt() * norm_weight.float()
        x = row.to(x.dtype)
    bias = None if linear.bias is None else linear.bias.float()
    product = F.linear(x.float(), linear.dense().float(), bias)
    if gated:
        product = F.silu(product[:, :num_outputs]) * product[:, num_outputs:]
    if out is None:
        return product.to(x.dtype)
    return out.copy_(out.float() + product if accumulate else product)


def check_shapes(
    x: Tensor, linear: QuantLinear, norm_weight: Tensor | None, gated: bool, accumulate: bool, out: Tensor | None
) -> int:
    """The number of outputs. Raises ConfigError where no kernel serves the shape; asserts what callers hold anyway."""
    rows, in_features = linear.out_features, linear.in_features
    if x.shape[0] != 1:
        raise ConfigError(f"{x.shape[0]} tokens have no one-token linear kernel: the limit is 1, call the layer itself")
    if in_features % MULTIPLE or not 0 < in_features <= MAX_IN_FEATURES:
        raise ConfigError(
            f"in_features {in_features} has no one-token linear kernel: it serves multiples of {MULTIPLE} up to "
            f"{MAX_IN_FEATURES:,}, call the layer itself"
        )
    if gated and rows % 2:
        raise ConfigError(f"{rows} rows cannot be gate and up rows: their number must be even")
    num_outputs = rows // 2 if gated else rows
    assert x.shape[1] == in_features and x.is_contiguous() and x.dtype == linear.compute_dtype
    assert norm_weight is None or (norm_weight.shape == (in_features,) and norm_weight.is_contiguous())
    assert out is not None or not accumulate
    assert out is None or (out.shape == (1, num_outputs) and out.dtype == x.dtype and out.is_contiguous())
    return num_outputs


@lru_cache(maxsize=8)
def _code_planes(code: Tensor) -> Tensor:
    """`code_planes`, made once a device: all nf4 weights there share one code tensor."""
    return code_planes(code)
