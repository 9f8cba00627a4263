"""Rotary position embedding of a prefill chunk in Triton, in place: one read and one write, head norms included.

Torch needs five passes (product, roll, fused multiply-add, cast, copy), and two more for head norms. Moves, a head of
a token: head_dim items read and written; cos and sin of a token, head_dim / 2 float32 each, serve all its heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
_CHANNELS = 2048  # a program: 16 of a thread with 4 warps, so that bfloat16 goes 16 bytes at a time
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_head(what: str, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ConfigError unless head_dim is a power of two from 16 to 256 and dtype one of DTYPES."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim & (head_dim - 1):
        raise ConfigError(
            f"head_dim {head_dim} has no {what} kernel: use a power of two from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, or "
            f"the torch backend"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"{dtype} has no {what} kernel: use bfloat16, float16 or float32, or the torch backend")


@triton.jit
def head_norm(low, high, scale_low, scale_high, mean_square, eps, round_to: tl.constexpr):
    """RMS norm of heads in two halves, float32; rounded to `round_to`, as the decoder's norm is, and float32 again."""
    rate = tl.rsqrt(mean_square + eps)
    low, high = low * rate * scale_low, high * rate * scale_high
    return low.to(round_to).to(tl.float32), high.to(round_to).to(tl.float32)


@triton.jit(do_not_specialize=["num_heads", "split", "eps"])
def rotary_kernel(
    heads_ptr, token_stride, head_stride, cos_ptr, sin_ptr, weight_a_ptr, weight_b_ptr, num_heads, split, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of BLOCK heads)."""
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, HALF)
    inside = (head < num_heads)[:, None]
    at = heads_ptr + token * token_stride + head.to(tl.int64)[:, None] * head_stride + channel[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * D + channel)[None, :]
    sin = tl.load(sin_ptr + token * D + channel)[None, :]
    if NORM:
        first = (head < split)[:, None]
        scale_low = tl.where(
            first, tl.load(weight_a_ptr + channel)[None, :], tl.load(weight_b_ptr + channel)[None, :]
        ).to(tl.float32)
        scale_high = tl.where(
            first, tl.load(weight_a_ptr + HALF + channel)[None, :], tl.load(weight_b_ptr + HALF + channel)[None, :]
        ).to(tl.float32)
        mean_square = (tl.sum(low * low + high * high, 1) / D)[:, None]
        low, high = head_norm(low, high, scale_low, scale_high, mean_square, eps, dtype)
    tl.store(at, (low * cos - high * sin).to(dtype), mask=inside)
    tl.store(at + HALF, (high * cos + low * sin).to(dtype), mask=inside)


def rotary_(
    heads: Tensor, cos: Tensor, sin: Tensor, *, weight_a: Tensor | None = None, weight_b: Tensor | None = None,
    split: int = 0, eps: float = 0.0, block_heads: int | None = None, num_warps: int = 4,
) -> Tensor:  # fmt: skip
    """Turn all heads of a chunk in place, after an optional RMS norm per head.

    Args:
        heads: [T, n, head_dim], any strides with contiguous channels; bfloat16, float16 or float32. Computed in
            float32; a norm is rounded to this dtype before the turn, as a norm of its own would be.
        cos, sin: float32 [T, head_dim], contiguous, the second half a copy of the first (`longrun.model.rope`: angles
            are float64 until the cast to these tables). Channel i turns with channel i + head_dim / 2.
        weight_a, weight_b: [head_dim] weights of the norm of the first `split` heads and of the others (Qwen3: q and
            k); both or neither.
        eps: added to the mean square.
        block_heads: heads a program, a power of two; None takes 2048 channels of them. num_warps: warps that share
            them.

    Returns:
        `heads`.

    Raises:
        ConfigError: a head_dim or dtype that the kernel does not serve.
    """
    num_tokens, num_heads, dim = heads.shape
    check_head("rotary", dim, heads.dtype)
    assert heads.stride(2) == 1 and (weight_a is None) == (weight_b is None)
    for table in (cos, sin):
        assert table.shape == (num_tokens, dim) and table.dtype == torch.float32 and table.is_contiguous()
    for weight in (weight_a, weight_b):
        assert weight is None or (weight.shape == (dim,) and weight.is_contiguous())
    if heads.numel() == 0:
        return heads
    block = min(block_heads or _CHANNELS // dim, triton.next_power_of_2(num_heads))
    rotary_kernel[(num_tokens, triton.cdiv(num_heads, block))](
        heads, heads.stride(0), heads.stride(1), cos, sin, cos if weight_a is None else weight_a,
        sin if weight_b is None else weight_b, num_heads, split, eps,
        D=dim, BLOCK=block, NORM=weight_a is not None, num_warps=num_warps,
    )  # fmt: skip
    return heads


def rotary_reference(
    heads: Tensor, cos: Tensor, sin: Tensor, *, weight_a: Tensor | None = None, weight_b: Tensor | None = None,
    split: int = 0, eps: float = 0.0, block_heads: int | None = None, num_warps: int = 4,
) -> Tensor:  # fmt: skip
    """`rotary_` in torch, as the decoder computes it."""
    if weight_a is not None:
        for part, weight in ((heads[:, :split], weight_a), (heads[:, split:], weight_b)):
            part.copy_(F.rms_norm(part, weight.shape, weight, eps))
    half = heads.shape[2] // 2
    low, high = heads[..., :half].float(), heads[..., half:].float()
    c, s = cos[:, None, :half], sin[:, None, :half]
    heads[..., :half], heads[..., half:] = low * c - high * s, high * c + low * s
    return heads
