"""Merge of two partial attention results by log-sum-exp in Triton, in place; a side may be empty.

`dense_attention.merge_partial` in one pass. Moves, a row: head_dim float32 read and written, head_dim items of the
other side read, and three float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.rotary import check_head


@triton.jit(do_not_specialize=["rows", "inner"])
def merge_kernel(
    out_ptr, lse_ptr, other_ptr, other_lse_ptr, to_ptr, outer_stride, inner_stride, rows, inner,
    D: tl.constexpr, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of BLOCK rows. Row r stays where it is (to_ptr is out_ptr), or goes to (r // inner, r % inner)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    channel = tl.arange(0, D)[None, :]
    at = row[:, None] * D + channel
    out = tl.load(out_ptr + at, mask=inside[:, None], other=0.0)
    other = tl.load(other_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    a = tl.load(lse_ptr + row, mask=inside, other=0.0)
    b = tl.load(other_lse_ptr + row, mask=inside, other=0.0)
    has_a, has_b = a > float("-inf"), b > float("-inf")  # NaN is empty as well
    a, b = tl.where(has_a, a, float("-inf")), tl.where(has_b, b, float("-inf"))
    top = tl.maximum(a, b)
    weight_a = tl.where(has_a, tl.exp(a - top), 0.0)
    weight_b = tl.where(has_b, tl.exp(b - top), 0.0)
    total = weight_a + weight_b
    rate = tl.where(total > 0.0, 1.0 / total, 0.0)
    # an empty side may hold NaN, which a weight of 0 would let through
    merged = tl.where(has_a[:, None], out * (weight_a * rate)[:, None], 0.0)
    merged += tl.where(has_b[:, None], other * (weight_b * rate)[:, None], 0.0)
    if IN_PLACE:
        tl.store(to_ptr + at, merged, mask=inside[:, None])
        tl.store(lse_ptr + row, top + tl.log(total), mask=inside)
    else:
        small = row.to(tl.int32)  # a division of 64 bits takes a subroutine
        to = (small // inner).to(tl.int64) * outer_stride + (small % inner).to(tl.int64) * inner_stride
        tl.store(to_ptr + to[:, None] + channel, merged.to(to_ptr.dtype.element_ty), mask=inside[:, None])


def _check(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    check_head("merge", out.shape[-1], other_out.dtype)
    assert out.dtype == lse.dtype == other_lse.dtype == torch.float32
    assert out.shape == other_out.shape and lse.shape == other_lse.shape == out.shape[:-1]
    assert all(x.is_contiguous() for x in (out, lse, other_out, other_lse)) and lse.numel() < 2**31 - 64


def merge_partial_(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, *, block_rows: int = 16, num_warps: int = 4
) -> None:
    """Attention over the union of two disjoint sets of keys, from the results over each, into `out` and `lse`.

    A side whose lse is -inf or NaN is empty: it adds nothing, whatever its output holds. Two empty sides give 0 and
    -inf.

    Args:
        out: float32 [..., head_dim], contiguous; lse: float32 [...], natural log-sum-exp. Both are overwritten.
        other_out: bfloat16, float16 or float32, shape of `out`, contiguous; other_lse: float32 [...].
        block_rows: rows a program, a power of two; num_warps: warps that share them.

    Raises:
        ConfigError: a head_dim or dtype that the kernel does not serve.
    """
    _check(out, lse, other_out, other_lse)
    rows, dim = lse.numel(), out.shape[-1]
    if rows:
        merge_kernel[(triton.cdiv(rows, block_rows),)](
            out, lse, other_out, other_lse, out, 0, 0, rows, rows,
            D=dim, BLOCK=block_rows, IN_PLACE=True, num_warps=num_warps,
        )  # fmt: skip


def merge_into(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, final: Tensor, *,
    block_rows: int = 16, num_warps: int = 4,
) -> None:  # fmt: skip
    """The last merge: `merge_partial_`, with the result written to `final` instead; `out` and `lse` stay.

    Args:
        out, lse, other_out, other_lse: as in `merge_partial_`, with out [A, B, head_dim].
        final: [A, B, head_dim], bfloat16, float16 or float32; any strides with contiguous channels, so that heads
            before tokens may be written as tokens before heads.

    Raises:
        ConfigError: a head_dim or dtype that the kernel does not serve.
    """
    _check(out, lse, other_out, other_lse)
    assert out.dim() == 3 and final.shape == out.shape and final.stride(2) == 1
    check_head("merge", out.shape[-1], final.dtype)
    rows, dim = lse.numel(), out.shape[-1]
    if rows:
        merge_kernel[(triton.cdiv(rows, block_rows),)](
            out, lse, other_out, other_lse, final, final.stride(0), final.stride(1), rows, out.shape[1],
            D=dim, BLOCK=block_rows, IN_PLACE=False, num_warps=num_warps,
        )  # fmt: skip


def _merged(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.full_like(lse, float("-inf"))
    a, b = torch.where(lse.isnan(), empty, lse), torch.where(other_lse.isnan(), empty, other_lse)
    total = torch.logaddexp(a, b)
    merged = torch.zeros_like(out)
    for part, weight in ((out, a), (other_out, b)):
        there = (weight > empty)[..., None]
        merged += torch.where(there, part.float() * torch.exp(weight - total)[..., None], 0.0)
    return merged, total


def merge_partial_reference(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, *, block_rows: int = 16, num_warps: int = 4
) -> None:
    """`merge_partial_` in torch."""
    merged, total = _merged(out, lse, other_out, other_lse)
    out.copy_(merged)
    lse.copy_(total)


def merge_into_reference(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, final: Tensor, *,
    block_rows: int = 16, num_warps: int = 4,
) -> None:  # fmt: skip
    """`merge_into` in torch."""
    final.copy_(_merged(out, lse, other_out, other_lse)[0])
