"""Quantized pages to dense keys and values in Triton: `page_view.dequantize_pages` as one kernel.

Moves, a page of head_dim D and output items of B bytes: 64 * D + 256 bytes of payload, 4 * D of index and 128 * D * B
of output (41,728 bytes for D = 128 in bfloat16), each once; with k5v3 the keys' program reads the values' 32 * D bytes
once more, while the values' program next to it does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.page_view import PageView, check_view
from longrun.quant.kv_format import PageFormat

TRITON_PAGE_SIZE = 64
TRITON_HEAD_DIMS = (64, 128)


def check_triton_format(fmt: PageFormat) -> None:
    """Raises ConfigError where the Triton page kernels do not serve the format."""
    if not fmt.quantized:
        raise ConfigError(f"KV format {fmt.name!r} has no Triton page kernels: use int4 or k5v3, or the torch backend")
    if fmt.page_size != TRITON_PAGE_SIZE:
        raise ConfigError(f"page_size {fmt.page_size} has no Triton page kernels: use {TRITON_PAGE_SIZE}")
    if fmt.head_dim not in TRITON_HEAD_DIMS:
        raise ConfigError(
            f"head_dim {fmt.head_dim} has no Triton page kernels: use a model with {TRITON_HEAD_DIMS[0]} or "
            f"{TRITON_HEAD_DIMS[1]}, or the torch backend"
        )


@triton.jit
def _value(step, scale, minimum):
    # 0x4B000000 is the float 2**23, whose low mantissa bits count ones: a conversion without the slow I2F. The product
    # of 11 and 5 significant bits is exact in float32, so the fused form rounds as the reference does.
    return tl.fma(scale, (step | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0, minimum)


@triton.jit
def _write_keys(
    out, token_stride, payload, scales, first_row,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = PAGE_SIZE // 2
    token, channel = tl.arange(0, HALF), tl.arange(0, HEAD_DIM)
    place = payload + channel[None, :] * HALF + token[:, None]
    packed = tl.load(place).to(tl.int32)
    values = tl.load(place + HEAD_DIM * HALF).to(tl.int32) if KEY_BITS == 5 else 0
    scale = tl.load(scales + channel).to(tl.float32)[None, :]
    minimum = tl.load(scales + HEAD_DIM + channel).to(tl.float32)[None, :]
    row, start = first_row + token.to(tl.int64), out + channel[None, :]
    to = start + row[:, None] * token_stride
    tl.store(to, _value((packed & 15) | ((values & 0x08) << 1), scale, minimum).to(out.dtype.element_ty))
    to = start + (row + HALF)[:, None] * token_stride
    tl.store(to, _value((packed >> 4) | ((values & 0x80) >> 3), scale, minimum).to(out.dtype.element_ty))


@triton.jit
def _write_values(
    out, token_stride, payload, scales, first_row,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    token, channel = tl.arange(0, PAGE_SIZE), tl.arange(0, HALF)
    packed = tl.load(payload + token[:, None] * HALF + channel[None, :]).to(tl.int32)
    if KEY_BITS == 5:
        packed &= 0x77
    scale = tl.load(scales + token).to(tl.float32)[:, None]
    minimum = tl.load(scales + PAGE_SIZE + token).to(tl.float32)[:, None]
    row = first_row + token.to(tl.int64)
    start = out + row[:, None] * token_stride + channel[None, :]
    tl.store(start, _value(packed & 15, scale, minimum).to(out.dtype.element_ty))
    tl.store(start + HALF, _value(packed >> 4, scale, minimum).to(out.dtype.element_ty))


@triton.jit
def payload_of(slot, storage, other, other_slot, PAYLOAD: tl.constexpr):
    """Where a slot's page stands; `other` is None or a second memory, from `other_slot` on."""
    slot = slot.to(tl.int64)
    place = storage + slot * PAYLOAD
    if other is not None:
        place = tl.where(slot < other_slot, place, other + (slot - other_slot) * PAYLOAD)
    return place


# one compilation for all pieces of a sequence
@triton.jit(do_not_specialize=["table_stride", "pages_stride", "skip", "limit", "count", "other_slot"])
def dequantize_kernel(
    k_out, v_out, storage, other, table, index, pages, begins, counts,
    k_head_stride, k_token_stride, v_head_stride, v_token_stride, table_stride, index_stride, pages_stride,
    skip, limit, count, other_slot,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Program (head * count + e, 0) writes the keys of entry e of the head's list, (head * count + e, 1) its values.
    KEY_BITS is 4 (int4) or 5 (k5v3)."""
    SIDE: tl.constexpr = HEAD_DIM * PAGE_SIZE // 2
    PAYLOAD: tl.constexpr = 2 * SIDE + 4 * PAGE_SIZE
    head = (tl.program_id(0) // count).to(tl.int64)
    entry = (tl.program_id(0) % count).to(tl.int64)
    if entry < tl.minimum(tl.load(counts + head) - skip, limit):
        page = tl.load(pages + head * pages_stride + tl.load(begins + head) + skip + entry).to(tl.int64)
        payload = payload_of(tl.load(table + head * table_stride + page), storage, other, other_slot, PAYLOAD)
        row = entry * PAGE_SIZE
        if tl.program_id(1) == 0:
            scales = index + head * index_stride + page * (2 * HEAD_DIM)
            out = k_out + head * k_head_stride
            _write_keys(out, k_token_stride, payload, scales, row, HEAD_DIM, PAGE_SIZE, KEY_BITS)
        else:
            scales = (payload + 2 * SIDE).to(tl.pointer_type(tl.float16))
            out = v_out + head * v_head_stride
            _write_values(out, v_token_stride, payload + SIDE, scales, row, HEAD_DIM, PAGE_SIZE, KEY_BITS)


def dequantize_pages(view: PageView, k_out: Tensor, v_out: Tensor | None, num_warps: int = 4) -> None:
    """Write the listed pages' keys and values: what `page_view.dequantize_pages` writes, bit for bit.

    Args:
        view: pages of int4 or k5v3, page_size 64, head_dim 64 or 128; lists and lengths are read when the kernel runs.
        k_out, v_out: [num_heads, n * page_size, head_dim] with n at least the longest list, bfloat16, float16 or
            float32; any strides of heads and tokens, channels contiguous. With v_out None only keys are written.
        num_warps: warps that share a page's keys, or its values.

    Raises:
        ConfigError: a format that the kernel does not serve.
    """
    fmt = view.fmt
    check_triton_format(fmt)
    check_view(view)
    sides = 2
    if v_out is None:
        sides, v_out = 1, k_out
    assert k_out.shape == v_out.shape and k_out.stride(2) == v_out.stride(2) == 1
    assert k_out.shape[0] == view.num_heads and k_out.shape[2] == fmt.head_dim
    count = min(k_out.shape[1] // fmt.page_size, view.limit)
    if count == 0:
        return
    assert view.index is not None
    dequantize_kernel[(view.num_heads * count, sides)](
        k_out, v_out, view.storage, view.other, view.table, view.index, view.pages, view.begins, view.counts,
        k_out.stride(0), k_out.stride(1), v_out.stride(0), v_out.stride(1),
        view.table.stride(0), view.index.stride(0), view.pages.stride(0), view.skip, view.limit, count, view.other_slot,
        HEAD_DIM=fmt.head_dim, PAGE_SIZE=fmt.page_size, KEY_BITS=fmt.key_bits, num_warps=num_warps,
    )  # fmt: skip
