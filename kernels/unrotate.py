"""One token's attention in the compute dtype, the values' rotation undone, in Triton: one launch.

It stands where a conversion of torch would stand, so that it costs no launch of its own. A product of torch
would be the only one by cuBLAS in the captured decode step, which would then hold that library's workspace (32 MiB on
an H100). Moves, a channel: 4 bytes read and an item written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.rope_store import hadamard
from longrun.kernels.rotary import check_head
from longrun.quant.rotation import rotation_of, rotation_scales


@triton.jit(do_not_specialize=["num_rotated"])
def unrotate_kernel(found_ptr, signs_ptr, out_ptr, num_rotated, SCALE: tl.constexpr, D: tl.constexpr):
    """Grid: query heads. The transpose of `signs times H` is H, then the signs."""
    HALF: tl.constexpr = D // 2
    head, channel = tl.program_id(0), tl.arange(0, HALF)
    at = head * D + channel
    low, high = tl.load(found_ptr + at), tl.load(found_ptr + at + HALF)
    if head < num_rotated:
        sum_, difference = hadamard(low + high, HALF), hadamard(low - high, HALF)
        low = sum_ * tl.load(signs_ptr + channel) * SCALE
        high = difference * tl.load(signs_ptr + HALF + channel) * SCALE
    tl.store(out_ptr + at, low.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + at + HALF, high.to(out_ptr.dtype.element_ty))


def unrotate(found: Tensor, signs: Tensor, num_rotated: int, out: Tensor, *, num_warps: int = 1) -> None:
    """Write `found` to `out` in its dtype, the first heads as `found @ for_queries.T`.

    Args:
        found: float32 [heads, head_dim], contiguous.
        signs: float32 [head_dim] of 1 and -1, those that the values were rotated with (`quant.rotation.rotation_of`).
        num_rotated: query heads that attended to rotated values; they come first.
        out: [heads, head_dim], contiguous; bfloat16, float16 or float32. May not share memory with `found`.
        num_warps: warps a head.

    Raises:
        ConfigError: a head_dim or dtype that the kernel does not serve.
    """
    _check(found, signs, num_rotated, out)
    heads, dim = found.shape
    check_head("unrotate", dim, out.dtype)
    if heads:
        query_scale, _ = rotation_scales(dim)
        unrotate_kernel[(heads,)](found, signs, out, num_rotated, SCALE=query_scale, D=dim, num_warps=num_warps)


def unrotate_reference(found: Tensor, signs: Tensor, num_rotated: int, out: Tensor, *, num_warps: int = 1) -> None:
    """`unrotate` in torch."""
    _check(found, signs, num_rotated, out)
    out[:num_rotated] = found[:num_rotated] @ rotation_of(signs)[0].T
    out[num_rotated:] = found[num_rotated:]


def _check(found: Tensor, signs: Tensor, num_rotated: int, out: Tensor) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous() and out.is_contiguous()
    assert out.shape == found.shape and 0 <= num_rotated <= found.shape[0]
    assert signs.shape == (found.shape[1],) and signs.dtype == torch.float32 and signs.is_contiguous()
