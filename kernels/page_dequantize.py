"""Quantized pages to dense keys and values in Triton: `page_view.dequantize_run` as one kernel.

Moves, a page of head_dim D and output items of B bytes: 64 * D + 256 bytes of payload, 4 * D of index and 128 * D * B
of output (41,728 bytes for D = 128 in bfloat16), each once; with k5v3 the keys' program reads the values' 32 * D bytes
once more, while the values' program next to it does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longrun.errors import ConfigError
from longrun.kernels.page_view import PageRun
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


# one compilation for all pieces of a sequence
@triton.jit(do_not_specialize=["table_head_stride", "first", "count", "slot_offset"])
def dequantize_kernel(
    k_out, v_out, storage, halves, table, index,
    k_head_stride, k_token_stride, v_head_stride, v_token_stride,
    table_head_stride, table_page_stride, index_head_stride, index_page_stride,
    first, count, slot_offset,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Program (head * count + page, 0) writes a page's keys, (head * count + page, 1) its values. `halves` is
    `storage` seen as float16; KEY_BITS is 4 (int4) or 5 (k5v3)."""
    SIDE: tl.constexpr = HEAD_DIM * PAGE_SIZE // 2
    PAYLOAD: tl.constexpr = 2 * SIDE + 4 * PAGE_SIZE
    head = (tl.program_id(0) // count).to(tl.int64)
    page = (tl.program_id(0) % count).to(tl.int64)
    place = first + page
    slot = tl.load(table + head * table_head_stride + place * table_page_stride).to(tl.int64) - slot_offset
    payload = storage + slot * PAYLOAD
    if tl.program_id(1) == 0:
        scales = index + head * index_head_stride + place * index_page_stride
        out = k_out + head * k_head_stride
        _write_keys(out, k_token_stride, payload, scales, page * PAGE_SIZE, HEAD_DIM, PAGE_SIZE, KEY_BITS)
    else:
        scales = halves + slot * (PAYLOAD // 2) + SIDE
        out = v_out + head * v_head_stride
        _write_values(out, v_token_stride, payload + SIDE, scales, page * PAGE_SIZE, HEAD_DIM, PAGE_SIZE, KEY_BITS)


def dequantize_run(run: PageRun, k_out: torch.Tensor, v_out: torch.Tensor, num_warps: int = 4) -> None:
    """Write the run's keys and values, in token order, to k_out and v_out: what `page_view.dequantize_run` writes,
    bit for bit.

    Args:
        run: pages of int4 or k5v3, page_size 64, head_dim 64 or 128; slots of `run.table` must lie in `run.storage`.
        k_out, v_out: [num_heads, count * page_size, head_dim], bfloat16, float16 or float32; any strides of heads and
            tokens, channels contiguous.
        num_warps: warps that share a page's keys, or its values.

    Raises:
        ConfigError: a format that the kernel does not serve.
    """
    fmt = run.fmt
    check_triton_format(fmt)
    shape = (run.table.shape[0], run.count * fmt.page_size, fmt.head_dim)
    assert k_out.shape == v_out.shape == shape and k_out.stride(2) == v_out.stride(2) == 1, (k_out.shape, shape)
    assert run.storage.is_contiguous() and run.storage.shape[1] == fmt.payload_bytes
    assert run.index is not None and run.index.stride()[2:] == (fmt.head_dim, 1)
    assert run.first >= 0 and run.first + run.count <= min(run.table.shape[1], run.index.shape[1])
    if k_out.numel() == 0:
        return
    dequantize_kernel[(shape[0] * run.count, 2)](
        k_out, v_out, run.storage, run.storage.view(torch.float16), run.table, run.index,
        k_out.stride(0), k_out.stride(1), v_out.stride(0), v_out.stride(1),
        run.table.stride(0), run.table.stride(1), run.index.stride(0), run.index.stride(1),
        run.first, run.count, run.slot_offset,
        HEAD_DIM=fmt.head_dim, PAGE_SIZE=fmt.page_size, KEY_BITS=fmt.key_bits, num_warps=num_warps,
    )  # fmt: skip
