"""Stored pages to their digests in Triton: one launch for any number of pages, which may stand in host memory.

Moves, a page of head_dim D: 32 * D bytes of keys (with k5v3 as many of values, which hold bits of keys), 4 * D of index
twice, and the digest's bytes, 528 with D = 128 and 4 bits a centre.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.page_dequantize import check_triton_format
from longrun.kernels.page_digest import check_digest
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.rotation import rotation_scales

TRITON_GROUP_SIZE = 16


@triton.jit
def _pairs(x, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """x [ROWS, OUTER * 2 * INNER] as its two halves of every 2 * INNER channels, [ROWS, OUTER, INNER] each."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, OUTER, 2, INNER)), (0, 1, 3, 2)))


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr):
    """One step of `quant.rotation.hadamard_product` on x [ROWS, D]: channels INNER apart."""
    low, high = _pairs(x, ROWS, D // (2 * INNER), INNER)
    both = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(both, (ROWS, D))


@triton.jit
def _sum_halves(x, ROWS: tl.constexpr, D: tl.constexpr):
    """x [ROWS, D] -> [ROWS // 2, D]: row i and row i + ROWS // 2 together."""
    low, high = tl.split(tl.permute(tl.reshape(x, (2, ROWS // 2, D)), (1, 2, 0)))
    return low + high


@triton.jit
def _codes(x, LAST: tl.constexpr):
    """Codes (int32) and float16 scale of one group's values x [D]."""
    most = tl.max(tl.abs(x), 0) * (1.0 / LAST)
    scale = tl.minimum(tl.maximum(most, 5.9604644775390625e-08), 65504.0).to(tl.float16)
    quotient = tl.div_rn(x, tl.zeros_like(x) + scale.to(tl.float32))
    quotient = tl.minimum(tl.maximum(quotient, -LAST), LAST)
    # adding 1.5 * 2**23 rounds half to even
    return ((quotient + 12582912.0) - 12582912.0).to(tl.int32), scale


@triton.jit
def _store_nibbles(out, codes, D: tl.constexpr):
    low, high = tl.split(tl.trans(tl.reshape(codes, (2, D // 2))))
    tl.store(out + tl.arange(0, D // 2), (low | (high << 4)).to(tl.uint8))


@triton.jit
def _store_scale(out, scale):
    bits = scale.to(tl.uint16, bitcast=True)
    tl.store(out, (bits & 255).to(tl.uint8))
    tl.store(out + 1, (bits >> 8).to(tl.uint8))


@triton.jit
def _store_group(
    out, x, SCALE: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, CENTRE_BITS: tl.constexpr
):  # fmt: skip
    """The digest of keys x [GROUP, D] (GROUP 16), rotated."""
    rows = _sum_halves(_sum_halves(x, GROUP, D), GROUP // 2, D)
    rows = _sum_halves(_sum_halves(rows, GROUP // 4, D), GROUP // 8, D)
    if CENTRE_BITS == 8:
        codes, scale = _codes(tl.reshape(rows, (D,)) * (1.0 / GROUP), 127.0)
        tl.store(out + tl.arange(0, D), codes.to(tl.uint8))
    else:
        codes, scale = _codes(tl.reshape(rows, (D,)) * (1.0 / GROUP), 7.0)
        _store_nibbles(out, codes + 8, D)
    HALF_AT: tl.constexpr = D * CENTRE_BITS // 8
    SCALES_AT: tl.constexpr = HALF_AT + D // 2
    _store_scale(out + SCALES_AT, scale)
    x = _butterfly(_butterfly(_butterfly(x, GROUP, D, 1), GROUP, D, 2), GROUP, D, 4)
    x = _butterfly(_butterfly(_butterfly(x, GROUP, D, 8), GROUP, D, 16), GROUP, D, 32)
    if D == 128:
        x = _butterfly(x, GROUP, D, 64)
    x = x * SCALE
    codes, scale = _codes((tl.max(x, 0) - tl.min(x, 0)) * 0.5, 15.0)
    _store_nibbles(out + HALF_AT, codes, D)
    _store_scale(out + SCALES_AT + 2, scale)


# one compilation for all chunks of a sequence
@triton.jit(do_not_specialize=["slots_head_stride", "slots_page_stride", "count", "slot_offset"])
def digest_kernel(
    storage, slots, index, out, slots_head_stride, slots_page_stride, index_head_stride, index_page_stride,
    out_head_stride, out_page_stride, count, slot_offset,
    SCALE: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, KEY_BITS: tl.constexpr,
    CENTRE_BITS: tl.constexpr,
):  # fmt: skip
    """Program (head * count + page, part) writes the groups `part` and `part + PAGE_SIZE / 2 / GROUP` of a page, whose
    keys share bytes. KEY_BITS is 4 (int4) or 5 (k5v3)."""
    HALF: tl.constexpr = PAGE_SIZE // 2
    SIDE: tl.constexpr = D * HALF
    PAYLOAD: tl.constexpr = 2 * SIDE + 4 * PAGE_SIZE
    GROUP_BYTES: tl.constexpr = D * CENTRE_BITS // 8 + D // 2 + 4
    head = (tl.program_id(0) // count).to(tl.int64)
    page = (tl.program_id(0) % count).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + head * slots_head_stride + page * slots_page_stride).to(tl.int64) - slot_offset
    token, channel = tl.arange(0, GROUP), tl.arange(0, D)
    place = storage + slot * PAYLOAD + channel[None, :] * HALF + part * GROUP + token[:, None]
    packed = tl.load(place).to(tl.int32)
    values = tl.load(place + SIDE).to(tl.int32) if KEY_BITS == 5 else 0
    scales = index + head * index_head_stride + page * index_page_stride
    scale = tl.load(scales + channel).to(tl.float32)[None, :]
    minimum = tl.load(scales + D + channel).to(tl.float32)[None, :]
    out += head * out_head_stride + page * out_page_stride + part * GROUP_BYTES
    # the product of 11 and 5 significant bits is exact in float32: fused or not, the sum is rounded once
    low = minimum + scale * ((packed & 15) | ((values & 0x08) << 1)).to(tl.float32)
    _store_group(out, low, SCALE, D, GROUP, CENTRE_BITS)
    high = minimum + scale * ((packed >> 4) | ((values & 0x80) >> 3)).to(tl.float32)
    _store_group(out + HALF // GROUP * GROUP_BYTES, high, SCALE, D, GROUP, CENTRE_BITS)


def digest_pages(
    storage: Tensor, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat,
    slot_offset: int = 0, num_warps: int = 4,
) -> None:  # fmt: skip
    """Write the digests of stored pages: `quant.page_digest.encode_digest` of their dequantized keys, bit for bit.

    Args:
        storage: uint8 [num_slots, payload_bytes], a pool's payloads; on the GPU, or pinned.
        slots: int32 [num_heads, n], any strides: page p of head h stands in `storage[slots[h, p] - slot_offset]`.
        index: float16 [num_heads, n, 2, head_dim], key scales and minima of these pages; any strides of heads and
            pages.
        out: uint8 [num_heads, n, digest_format.page_bytes], any strides of heads and pages.
        fmt: int4 or k5v3 with page_size 64, head_dim 64 or 128.
        digest_format: groups of 16 tokens.
        num_warps: warps that share half a page.

    Raises:
        ConfigError: a format that the kernel does not serve.
    """
    check_triton_format(fmt)
    if digest_format.group_size != TRITON_GROUP_SIZE:
        raise ConfigError(
            f"digests of groups of {digest_format.group_size} tokens have no Triton kernel: use {TRITON_GROUP_SIZE}"
        )
    check_digest(storage, slots, index, out, fmt, digest_format)
    heads, count = slots.shape
    if heads * count == 0:
        return
    digest_kernel[(heads * count, fmt.page_size // 2 // TRITON_GROUP_SIZE)](
        storage, slots, index, out, *slots.stride(), index.stride(0), index.stride(1), out.stride(0), out.stride(1),
        count, slot_offset,
        SCALE=rotation_scales(fmt.head_dim)[0], D=fmt.head_dim, PAGE_SIZE=fmt.page_size, GROUP=TRITON_GROUP_SIZE,
        KEY_BITS=fmt.key_bits, CENTRE_BITS=digest_format.centre_bits, num_warps=num_warps,
    )  # fmt: skip
