"""What one token found among rotated values, turned back in Triton: a program a query head, in place.

A product of torch would do; but nothing else in the captured decode step is cuBLAS's, whose workspace (32 MiB on an
H100) the capture would then hold. Moves 8 * head_dim bytes a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.rope_store import hadamard
from longrun.kernels.rotary import check_head
from longrun.quant.rotation import rotation_of, rotation_scales


@triton.jit
def turn_back_kernel(found_ptr, signs_ptr, SCALE: tl.constexpr, D: tl.constexpr):
    """Grid: query heads. The transpose of `signs times H` is H, then the signs."""
    HALF: tl.constexpr = D // 2
    channel = tl.arange(0, HALF)
    at = found_ptr + tl.program_id(0) * D + channel
    low, high = tl.load(at), tl.load(at + HALF)
    tl.store(at, hadamard(low + high, HALF) * tl.load(signs_ptr + channel) * SCALE)
    tl.store(at + HALF, hadamard(low - high, HALF) * tl.load(signs_ptr + HALF + channel) * SCALE)


def turn_back_(found: Tensor, signs: Tensor, *, num_warps: int = 1) -> None:
    """Turn back what query heads attended to where values are rotated: `found @ for_queries.T`, in place.

    Args:
        found: float32 [heads, head_dim], contiguous.
        signs: float32 [head_dim] of 1 and -1, those that the values were rotated with (`quant.rotation.rotation_of`).
        num_warps: warps a head.

    Raises:
        ConfigError: a head_dim that the kernel does not serve.
    """
    _check(found, signs)
    check_head("turn_back", found.shape[1], found.dtype)
    if found.numel():
        query_scale, _ = rotation_scales(found.shape[1])
        turn_back_kernel[(found.shape[0],)](found, signs, SCALE=query_scale, D=found.shape[1], num_warps=num_warps)


def turn_back_reference(found: Tensor, signs: Tensor, *, num_warps: int = 1) -> None:
    """`turn_back_` in torch."""
    _check(found, signs)
    found.copy_(found @ rotation_of(signs)[0].T)


def _check(found: Tensor, signs: Tensor) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert signs.shape == (found.shape[1],) and signs.dtype == torch.float32 and signs.is_contiguous()
