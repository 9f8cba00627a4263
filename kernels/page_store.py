"""Dense keys and values to quantized pages in a pool, in Triton, and the torch reference of the same signature.

Moves, a page of head_dim D and input items of B bytes: 128 * D * B bytes of keys and values, 64 * D + 256 of payload
and 4 * D of index (41,728 bytes for D = 128 in bfloat16), each once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.page_dequantize import check_triton_format
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import encode_pages


@triton.jit
def _divide(x, divisor, inverse):
    """x / divisor, correctly rounded: one Newton step from the correctly rounded reciprocal (Markstein)."""
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)


@triton.jit
def _group_scale(first, second, axis: tl.constexpr, LAST: tl.constexpr):
    """Scale and minimum, float16, of groups that run along `axis` through both halves; the steps go from 0 to LAST."""
    low = tl.minimum(tl.min(first, axis), tl.min(second, axis))
    high = tl.maximum(tl.max(first, axis), tl.max(second, axis))
    minimum = low.to(tl.float16)
    scale = _divide(high - minimum.to(tl.float32), LAST, 1.0 / LAST)
    return tl.maximum(scale, 0.0).to(tl.float16), minimum


@triton.jit
def _step(x, minimum, step, inverse, LAST: tl.constexpr):
    """The number of x's step in the low byte of an int32; the bits above are no part of it."""
    # The quotient is exact to the last bit so that near-ties round as in the reference. Adding 2**23 rounds half to
    # even and leaves the integer in the mantissa.
    quotient = _divide(x - minimum, step, inverse)
    return (tl.minimum(tl.maximum(quotient, 0.0), LAST) + 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def _steps(first, second, scale, minimum, axis: tl.constexpr, LAST: tl.constexpr):
    """Numbers of steps of both halves, as `_step` has them."""
    step = scale.to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    # Of the 1,024 significands a float16 has, this gives the correctly rounded reciprocal from any start within 2 ulp.
    inverse = 1.0 / step
    inverse = tl.fma(tl.fma(-step, inverse, 1.0), inverse, inverse)
    inverse, step = tl.expand_dims(inverse, axis), tl.expand_dims(step, axis)
    base = tl.expand_dims(minimum.to(tl.float32), axis)
    return _step(first, base, step, inverse, LAST), _step(second, base, step, inverse, LAST)


@triton.jit
def _store_keys(
    source, token_stride, channel_stride, payload, scales, first_row,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Returns what the values' bytes hold of the keys, uint8 [PAGE_SIZE, HEAD_DIM // 2]: 0 with int4."""
    HALF: tl.constexpr = PAGE_SIZE // 2
    LAST: tl.constexpr = 15.0 if KEY_BITS == 4 else 31.0
    # four channels a thread, not eight: a warp reads whole rows, and fewer threads repeat a channel's divisions
    token, channel = tl.arange(0, HALF), tl.max_contiguous(tl.arange(0, HEAD_DIM), 4)
    row, start = first_row + token.to(tl.int64), source + channel.to(tl.int64)[None, :] * channel_stride
    first = tl.load(start + row[:, None] * token_stride).to(tl.float32)
    row += HALF
    second = tl.load(start + row[:, None] * token_stride).to(tl.float32)
    scale, minimum = _group_scale(first, second, 0, LAST)
    place = payload + channel[None, :] * HALF + token[:, None]
    low, high = _steps(first, second, scale, minimum, 0, LAST)
    packed = low | (high << 4) if KEY_BITS == 4 else (low & 15) | (high << 4)
    tl.store(place, packed.to(tl.uint8))
    tl.store(scales + channel, scale)
    tl.store(scales + HEAD_DIM + channel, minimum)
    if KEY_BITS == 5:
        fifth = (((low & 16) >> 1) | ((high & 16) << 3)).to(tl.uint8)
        return tl.reshape(tl.trans(fifth), (PAGE_SIZE, HEAD_DIM // 2))
    else:
        return 0


@triton.jit
def _store_values(
    source, token_stride, channel_stride, payload, scales, first_row, of_keys,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    LAST: tl.constexpr = 15.0 if KEY_BITS == 4 else 7.0
    token, channel = tl.arange(0, PAGE_SIZE), tl.arange(0, HALF)
    row, column = first_row + token.to(tl.int64), channel.to(tl.int64)
    start = source + row[:, None] * token_stride
    first = tl.load(start + column[None, :] * channel_stride).to(tl.float32)
    column += HALF
    second = tl.load(start + column[None, :] * channel_stride).to(tl.float32)
    scale, minimum = _group_scale(first, second, 1, LAST)
    place = payload + token[:, None] * HALF + channel[None, :]
    low, high = _steps(first, second, scale, minimum, 1, LAST)
    tl.store(place, (low | (high << 4)).to(tl.uint8) | of_keys)
    tl.store(scales + token, scale)
    tl.store(scales + PAGE_SIZE + token, minimum)


# one compilation for all chunks of a sequence
@triton.jit(do_not_specialize=["slots_head_stride", "slots_page_stride", "count", "slot_offset"])
def store_kernel(
    k, v, storage, halves, slots, index, page_numbers,
    k_head_stride, k_token_stride, k_channel_stride, v_head_stride, v_token_stride, v_channel_stride,
    slots_head_stride, slots_page_stride, index_head_stride, index_page_stride,
    count, slot_offset,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """With int4 (KEY_BITS 4) program (head * count + page, 0) stores a page's keys, (head * count + page, 1) its
    values; with k5v3 (5) program (head * count + page, 0) stores both. `halves` is `storage` seen as float16."""
    SIDE: tl.constexpr = HEAD_DIM * PAGE_SIZE // 2
    PAYLOAD: tl.constexpr = 2 * SIDE + 4 * PAGE_SIZE
    head = (tl.program_id(0) // count).to(tl.int64)
    page = (tl.program_id(0) % count).to(tl.int64)
    slot = tl.load(slots + head * slots_head_stride + page * slots_page_stride).to(tl.int64) - slot_offset
    payload, row = storage + slot * PAYLOAD, page * PAGE_SIZE
    if KEY_BITS == 5:
        # A byte of the values holds bits of two keys, so one program has both: `tl.reshape` keeps the flat order, which
        # is what the two areas share, and brings the bits to the thread that writes the byte, once.
        number = tl.load(page_numbers + page).to(tl.int64)
        scales = index + head * index_head_stride + number * index_page_stride
        of_keys = _store_keys(
            k + head * k_head_stride, k_token_stride, k_channel_stride, payload, scales, row,
            HEAD_DIM, PAGE_SIZE, KEY_BITS,
        )  # fmt: skip
        scales = halves + slot * (PAYLOAD // 2) + SIDE
        _store_values(
            v + head * v_head_stride, v_token_stride, v_channel_stride, payload + SIDE, scales, row, of_keys,
            HEAD_DIM, PAGE_SIZE, KEY_BITS,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        number = tl.load(page_numbers + page).to(tl.int64)
        scales = index + head * index_head_stride + number * index_page_stride
        _store_keys(
            k + head * k_head_stride, k_token_stride, k_channel_stride, payload, scales, row,
            HEAD_DIM, PAGE_SIZE, KEY_BITS,
        )  # fmt: skip
    else:
        scales = halves + slot * (PAYLOAD // 2) + SIDE
        _store_values(
            v + head * v_head_stride, v_token_stride, v_channel_stride, payload + SIDE, scales, row, 0,
            HEAD_DIM, PAGE_SIZE, KEY_BITS,
        )  # fmt: skip


def _check(
    k: Tensor, v: Tensor, storage: Tensor, slots: Tensor, index: Tensor, page_numbers: Tensor, fmt: PageFormat
) -> None:
    heads, count = slots.shape
    assert k.shape == v.shape == (heads, count * fmt.page_size, fmt.head_dim), (k.shape, slots.shape)
    assert storage.dtype == torch.uint8 and storage.is_contiguous() and storage.shape[1] == fmt.payload_bytes
    assert slots.dtype == page_numbers.dtype == torch.int32
    assert page_numbers.shape == (count,) and page_numbers.is_contiguous()
    assert index.dtype == torch.float16 and index.shape[0] == heads and index.stride()[2:] == (fmt.head_dim, 1)


def reference_store_pages(
    k: Tensor, v: Tensor, storage: Tensor, slots: Tensor, index: Tensor, page_numbers: Tensor, fmt: PageFormat,
    slot_offset: int = 0,
) -> None:  # fmt: skip
    """`store_pages` through `quant.page_codec.encode_pages`; any quantized format."""
    _check(k, v, storage, slots, index, page_numbers, fmt)
    pages = (*slots.shape, fmt.page_size, fmt.head_dim)
    payload, scales = encode_pages(k.reshape(pages), v.reshape(pages), fmt)
    storage[slots.long() - slot_offset] = payload
    index[:, page_numbers.long()] = scales


def store_pages(
    k: Tensor, v: Tensor, storage: Tensor, slots: Tensor, index: Tensor, page_numbers: Tensor, fmt: PageFormat,
    slot_offset: int = 0, num_warps: int = 2,
) -> None:  # fmt: skip
    """Quantize full pages of one layer and write them where they belong.

    The bytes are those of `encode_pages` on the CPU: scales and minima as float16, steps chosen against these, the
    quotient correctly rounded and then rounded half to even. Two exceptions. The sign of a minimum that is zero may
    differ (of zeros of both signs, which one is the minimum is not defined). And torch on a GPU divides the range by
    15, 31 or 7 through a reciprocal, so `encode_pages` run there may, rarely, have a scale one float16 step away.

    Args:
        k, v: [num_heads, n * page_size, head_dim], bfloat16, float16 or float32, finite; any strides.
        storage: uint8 [num_slots, payload_bytes], the pool's payloads.
        slots: int32 [num_heads, n], any strides: page p of head h goes to `storage[slots[h, p] - slot_offset]`. All
            different.
        index: float16 [num_heads, max_pages, 2, head_dim], key scales and minima.
        page_numbers: int32 [n]: page p's scales go to `index[:, page_numbers[p]]`. Read on the device, like `slots`,
            so that a captured graph may be replayed for other pages.
        fmt: int4 or k5v3 with page_size 64, head_dim 64 or 128.
        num_warps: warps that share a page's keys, or its values; with k5v3 twice as many share first the one, then the
            other.

    Raises:
        ConfigError: a format that the kernel does not serve.
    """
    check_triton_format(fmt)
    _check(k, v, storage, slots, index, page_numbers, fmt)
    if k.numel() == 0:
        return
    heads, count = slots.shape
    programs = 2 if fmt.key_bits == 4 else 1
    store_kernel[(heads * count, programs)](
        k, v, storage, storage.view(torch.float16), slots, index, page_numbers,
        *k.stride(), *v.stride(), *slots.stride(), index.stride(0), index.stride(1), count, slot_offset,
        HEAD_DIM=fmt.head_dim, PAGE_SIZE=fmt.page_size, KEY_BITS=fmt.key_bits, num_warps=num_warps * 2 // programs,
    )  # fmt: skip
