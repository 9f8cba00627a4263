"""Whole quantized weights as dense ones, for products of many rows: int4 and int8, in Triton.

Memory-bound: an int4 weight is read in half a byte, its step in a sixteenth of two, and written in two. Values are
those of the torch references, bit for bit: an exact float32 product (int4) or a rounded one (int8), rounded once to the
output's dtype. Where these layouts come from: `quant/int4_weight.py`, `quant/linear.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.quant.weight_format import INT4_GROUP, INT4_WORD

_WORDS = 1024  # int4 words of a program
_COLUMNS = 2048  # int8 weights of a program
# A nibble or-ed into the bits of 2^23 is 2^23 plus the nibble: no conversion from integer.
_TWO_23_BITS = tl.constexpr(0x4B000000)
_TWO_23_AND_8 = tl.constexpr(8388616.0)


def dequantize_int4(data: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features] `dtype`, see `quant.int4_weight.dequantize_int4`, its reference.

    Args:
        data: uint8 [out_features, 4 * ceil(in_features / 8)], contiguous, on a GPU.
        scale: bfloat16 [out_features, ceil(in_features / 32)], contiguous.
    """
    assert data.is_contiguous() and scale.is_contiguous()
    out = torch.empty(data.shape[0], in_features, dtype=dtype, device=data.device)
    words = data.view(torch.int32)
    grid = (triton.cdiv(words.numel(), _WORDS),)
    int4_dequantize_kernel[grid](
        words, scale, out, words.numel(), K=in_features, GROUP=INT4_GROUP, WORD=INT4_WORD, WORDS=_WORDS, num_warps=4
    )
    return out


def dequantize_int8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features] `dtype`: each row of `data` times its scale.

    Args:
        data: int8 [out_features, in_features], contiguous, on a GPU.
        scale: float32 [out_features, 1].
    """
    assert data.is_contiguous()
    rows, columns = data.shape
    out = torch.empty(rows, columns, dtype=dtype, device=data.device)
    grid = (rows, triton.cdiv(columns, _COLUMNS))
    int8_dequantize_kernel[grid](data, scale, out, K=columns, COLUMNS=_COLUMNS, num_warps=4)
    return out


def dequantize_int8_reference(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_int8` in torch, on any device."""
    return torch.mul(data, scale, out=torch.empty_like(data, dtype=dtype))


@triton.jit
def int4_dequantize_kernel(
    w_ptr, scale_ptr, out_ptr, num_words, K: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Program p unpacks WORDS words of `w_ptr` (int32) from p * WORDS on."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = at < num_words
    lane = tl.arange(0, WORD)
    if K % GROUP == 0:  # rows end with a group: no position needs its row
        group = at // (GROUP // WORD)
        where = at[:, None] * WORD + lane[None, :]
        mask = inside[:, None]
    else:
        ROW: tl.constexpr = (K + WORD - 1) // WORD  # words of a row
        row, word = at // ROW, at % ROW
        group = row * ((K + GROUP - 1) // GROUP) + word // (GROUP // WORD)
        column = word[:, None] * WORD + lane[None, :]
        where = row[:, None] * K + column
        mask = inside[:, None] & (column < K)
    words = tl.load(w_ptr + at, mask=inside, other=0)
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
    shift = lane % 4 * 8 + lane // 4 * 4
    bits = (words[:, None] >> shift[None, :]) & 15 | _TWO_23_BITS
    value = (bits.to(tl.float32, bitcast=True) - _TWO_23_AND_8) * scale[:, None]
    tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def int8_dequantize_kernel(w_ptr, scale_ptr, out_ptr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (r, c) makes COLUMNS columns of row r from c * COLUMNS on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < K
    w = tl.load(w_ptr + row * K + column, mask=inside, other=0).to(tl.float32)
    value = w * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * K + column, value.to(out_ptr.dtype.element_ty), mask=inside)
