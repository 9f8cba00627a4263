"""silu(gate) * up in Triton, written over gate: the MLP's elementwise part in one pass instead of two.

Moves, an item of width: gate and up read, the product written; torch reads and writes gate once more.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.rotary import DTYPES


@triton.jit
def silu_mul_kernel(gate_up_ptr, row_stride, width, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of BLOCK columns)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up_ptr + tl.program_id(0).to(tl.int64) * row_stride + column
    gate = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=column < width, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(at, product.to(gate_up_ptr.dtype.element_ty), mask=column < width)


def silu_mul_(gate_up: Tensor, *, block: int = 2048, num_warps: int = 4) -> Tensor:
    """silu(gate) * up over gate.

    Args:
        gate_up: [T, 2 * width], gate before up; any row stride, contiguous columns; bfloat16, float16 or float32.
            Computed in float32 and rounded once, where torch's pair of operations rounds twice.
        block: columns a program, a power of two; num_warps: warps that share them.

    Returns:
        The gate half, a view [T, width] with the row stride of `gate_up`.

    Raises:
        ConfigError: a dtype that the kernel does not serve.
    """
    rows, both = gate_up.shape
    if gate_up.dtype not in DTYPES:
        raise ConfigError(f"{gate_up.dtype} has no silu_mul kernel: use bfloat16, float16 or float32")
    assert both % 2 == 0 and gate_up.stride(1) == 1
    width = both // 2
    if gate_up.numel():
        silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up, gate_up.stride(0), width, BLOCK=block, num_warps=num_warps
        )
    return gate_up[:, :width]


def silu_mul_reference(gate_up: Tensor, *, block: int = 2048, num_warps: int = 4) -> Tensor:
    """`silu_mul_` in torch, as the decoder computes it."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate, inplace=True).mul_(up)
