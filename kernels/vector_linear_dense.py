"""`vector_linear` in float32 arithmetic and portable Triton: every weight format, every dtype, and the interpreter.

The kernel of bf16 and fp32 weights, and of int8, nf4 and int4 where activations are float32. Also what both kernels
share: the norm before and everything after the product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def root_mean_square(x_ptr, eps, K: tl.constexpr, WIDE: tl.constexpr):
    """1 / sqrt(mean(x * x) + eps) of x [K]; WIDE a power of two, at least K."""
    at = tl.arange(0, WIDE)
    x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)


@triton.jit
def load_x(x_ptr, norm_ptr, rms, where, valid, NORM: tl.constexpr):
    """float32 of x, normalised and rounded to x's dtype with NORM; 0 where not `valid`."""
    x = tl.load(x_ptr + where, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(norm_ptr + where, mask=valid, other=0.0).to(tl.float32)
        x = (x * rms * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def tile_rows(rows, BLOCK_ROWS: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight that this program multiplies, int64, and which of them exist: BLOCK_ROWS, with GATED followed
    by as many up rows."""
    inner = tl.arange(0, 2 * BLOCK_ROWS if GATED else BLOCK_ROWS)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + inner % BLOCK_ROWS
    inside = row < rows
    if GATED:
        row += (inner // BLOCK_ROWS).to(tl.int64) * rows
    return row, inside


@triton.jit
def finish(
    out_ptr, bias_ptr, row, inside, product, rows,
    BLOCK_ROWS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Bias, silu(gate) * up, residual and store, in float32 until the last cast; rows as `tile_rows` gives them."""
    if BIAS:
        product += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(product, (2, BLOCK_ROWS))))
        product = gate / (1.0 + tl.exp(-gate)) * up
    out = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if ADD:
        product += tl.load(out_ptr + out, mask=out < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + out, product.to(out_ptr.dtype.element_ty), mask=out < rows)


@triton.jit
def dense_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, code_ptr, bias_ptr, out_ptr, rows, eps,
    K: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, FORMAT: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program p makes outputs p * BLOCK_ROWS and on, of `rows`. VECTOR: stored items of a 16-byte load. `scale_ptr`:
    float32 row scales of int8, absmax of nf4, bfloat16 steps of int4; `w_ptr` of the last two is of bytes."""
    NF4: tl.constexpr = FORMAT == "nf4"
    NIBBLES: tl.constexpr = NF4 or FORMAT == "int4"
    TILE: tl.constexpr = 2 * BLOCK_ROWS if GATED else BLOCK_ROWS
    ITEMS: tl.constexpr = K // 2 if NIBBLES else K  # stored, a row
    BLOCK: tl.constexpr = BLOCK_K // 2 if NIBBLES else BLOCK_K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, inside = tile_rows(rows, BLOCK_ROWS, GATED)
    rms = 0.0
    if NORM:
        rms = root_mean_square(x_ptr, eps, K, WIDE)
    acc = tl.zeros((TILE, BLOCK // VECTOR), tl.float32)
    for k in tl.range(0, ITEMS, BLOCK, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK)[None, :]
        valid = at < ITEMS
        mask = inside[:, None] & valid
        w = tl.load(w_ptr + row[:, None] * ITEMS + at, mask=mask, other=0)
        if NF4:
            absmax = tl.load(scale_ptr + row[:, None] * (K // 64) + at // 32, mask=mask, other=0.0)
            first = tl.load(code_ptr + (w >> 4).to(tl.int32)) * load_x(x_ptr, norm_ptr, rms, 2 * at, valid, NORM)
            second = tl.load(code_ptr + (w & 15).to(tl.int32)) * load_x(x_ptr, norm_ptr, rms, 2 * at + 1, valid, NORM)
            terms = (first + second) * absmax
        elif NIBBLES:
            step = tl.load(scale_ptr + row[:, None] * (K // 32) + at // 16, mask=mask, other=0.0).to(tl.float32)
            low = at // 4 * 8 + at % 4
            first = ((w & 15).to(tl.float32) - 8.0) * load_x(x_ptr, norm_ptr, rms, low, valid, NORM)
            second = ((w >> 4).to(tl.float32) - 8.0) * load_x(x_ptr, norm_ptr, rms, low + 4, valid, NORM)
            terms = (first + second) * step
        else:
            terms = w.to(tl.float32) * load_x(x_ptr, norm_ptr, rms, at, valid, NORM)
        acc += tl.sum(tl.reshape(terms, (TILE, BLOCK // VECTOR, VECTOR)), 2)
    product = tl.sum(acc, 1)
    if FORMAT == "int8":
        product *= tl.load(scale_ptr + row, mask=inside, other=0.0)
    finish(out_ptr, bias_ptr, row, inside, product, rows, BLOCK_ROWS, GATED, BIAS, ADD)
