"""`vector_linear` over int8, NF4 and INT4 weights: exact integer products of packed weights, in Triton with some PTX.

**Activations** become 16-bit fixed point once a program: a chunk of x (16 values for int8, 32 for nf4 and int4, the
weights of one 16-byte load) is `top / 32639 * (256 a + b)`, `top` its largest magnitude and a, b signed bytes, four to
a register. The rounding is 2^-16 of the chunk's largest value.

**int8**: `dp4a` multiplies four weights with four a or b and adds up, exactly: half an instruction a weight.

**nf4** (QLoRA, arXiv 2305.14314): the 16 code values become `(128 h + l - 8256) / 8127` with 7-bit h and l, within
6.2e-5 of the code. `prmt` looks four nibbles up in eight table bytes by their low three bits, and replicates the sign
bit, 0 in every entry, where the fourth bit is set: the lookup of the other half is 0 by itself, and the two are or-ed.
Of the four products h*a, h*b, l*a and l*b the last is below 2^-16 of the largest and is left out. 21 instructions for
eight weights.

**int4**: the low nibbles of a word are four weights in order, and so are the high ones, which are left where they are,
as 16 times their value; sums of the low ones are multiplied by 16 on the way. That nibbles stand 8 too high is taken
off the sums' start, once a program. 2 `and`, 4 `dp4a` for eight weights, and 2 instructions a chunk.

Sums over a chunk stay below 2^22, so an accumulator that starts at the bits of the float 1.5 * 2^23 can be read as that
float plus the sum: no conversion from integer. Chunks are added up in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.vector_linear_dense import finish, load_x, root_mean_square, tile_rows

CODE_ONE, CODE_ZERO = 8127, 8256  # steps of 128 h + l from 0 to 1, and where 0 stands
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float whose low 22 mantissa bits count ones
_MAGIC_BITS = tl.constexpr(0x4B400000)
_TOP = tl.constexpr(32639.0)  # 127 * 256 + 127
_NF4_STEP = tl.constexpr(128.0 / 8127.0 / 32639.0)
_INT8_STEP = tl.constexpr(1.0 / 32639.0)
_INT4_STEP = tl.constexpr(1.0 / 16.0 / 32639.0)

# $0, $1: bytes a and b of four integers, from their low 16 bits plus 128
PACK_PTX = tl.constexpr(
    "{.reg .b32 p, q; prmt.b32 p, $2, $3, 0x5140; prmt.b32 q, $4, $5, 0x5140;"
    " prmt.b32 $1, p, q, 0x5410; prmt.b32 $0, p, q, 0x7632; xor.b32 $1, $1, 0x80808080;}"
)
# $0: $1, in a register of every thread: the compiler cannot know that the two masks share no bit. Tables it knows to be
# the same in all threads go to uniform registers, which prmt cannot read: one move a weight.
KEEP_PTX = tl.constexpr(
    "{.reg .b32 p, q; mov.u32 p, %lanemask_lt; mov.u32 q, %lanemask_ge; and.b32 p, p, q; xor.b32 $0, $1, p;}"
)
# $0: $2 - 64 * the sum of the four signed bytes of $1
OFFSET_PTX = tl.constexpr("{.reg .b32 m; mov.b32 m, 0xc0c0c0c0; dp4a.s32.s32 $0, $1, m, $2;}")
# $0: $2 - 128 * the sum of the four signed bytes of $1
INT4_OFFSET_PTX = tl.constexpr("{.reg .b32 m; mov.b32 m, 0x80808080; dp4a.s32.s32 $0, $1, m, $2;}")
# $0, $1: $5, $6 plus the products of the four int8 weights $2 with bytes a $3 and bytes b $4
INT8_PTX = tl.constexpr("dp4a.s32.s32 $0, $2, $3, $5; dp4a.s32.s32 $1, $2, $4, $6;")
# $0, $1, $2: $8, $9, $10 plus h*a, h*b and l*a of the eight nibbles $3; a in $4, $5, b in $6, $7; tables $11 to $18
NF4_PTX = tl.constexpr(
    """{.reg .b32 u, f, h, l, m;
    xor.b32 f, $3, 0x88888888;
    prmt.b32 h, $11, $12, $3; prmt.b32 m, $13, $14, f; or.b32 h, h, m;
    prmt.b32 l, $15, $16, $3; prmt.b32 m, $17, $18, f; or.b32 l, l, m;
    dp4a.u32.s32 $0, h, $4, $8; dp4a.u32.s32 $1, h, $6, $9; dp4a.u32.s32 $2, l, $4, $10;
    shr.u32 u, $3, 16; shr.u32 f, f, 16;
    prmt.b32 h, $11, $12, u; prmt.b32 m, $13, $14, f; or.b32 h, h, m;
    prmt.b32 l, $15, $16, u; prmt.b32 m, $17, $18, f; or.b32 l, l, m;
    dp4a.u32.s32 $0, h, $5, $0; dp4a.u32.s32 $1, h, $7, $1; dp4a.u32.s32 $2, l, $5, $2;}"""
)

# $0, $1: $22, $23 plus 16 times the products of the 32 nibbles of $2 to $5 with a in $6 to $13 and b in $14 to $21
INT4_PTX = tl.constexpr(
    """{.reg .b32 n, p, q;
    and.b32 n, $2, 0x0f0f0f0f; dp4a.u32.s32 p, n, $6, 0; dp4a.u32.s32 q, n, $14, 0;
    and.b32 n, $3, 0x0f0f0f0f; dp4a.u32.s32 p, n, $8, p; dp4a.u32.s32 q, n, $16, q;
    and.b32 n, $4, 0x0f0f0f0f; dp4a.u32.s32 p, n, $10, p; dp4a.u32.s32 q, n, $18, q;
    and.b32 n, $5, 0x0f0f0f0f; dp4a.u32.s32 p, n, $12, p; dp4a.u32.s32 q, n, $20, q;
    mad.lo.s32 p, p, 16, $22; mad.lo.s32 q, q, 16, $23;
    and.b32 n, $2, 0xf0f0f0f0; dp4a.u32.s32 p, n, $7, p; dp4a.u32.s32 q, n, $15, q;
    and.b32 n, $3, 0xf0f0f0f0; dp4a.u32.s32 p, n, $9, p; dp4a.u32.s32 q, n, $17, q;
    and.b32 n, $4, 0xf0f0f0f0; dp4a.u32.s32 p, n, $11, p; dp4a.u32.s32 q, n, $19, q;
    and.b32 n, $5, 0xf0f0f0f0; dp4a.u32.s32 $0, n, $13, p; dp4a.u32.s32 $1, n, $21, q;}"""
)


def code_planes(code: Tensor) -> Tensor:
    """Lookup tables of `prmt`, int32 [8]: bytes h of entries 0-3, 4-7, 8-11, 12-15 of `code`, then bytes l.

    Args:
        code: [16] between -1 and 1.
    """
    steps = (code.detach().double().cpu() * CODE_ONE).round().to(torch.int32) + CODE_ZERO
    assert steps.shape == (16,) and int(steps.min()) >= 0 and int(steps.max()) < 2**14
    planes = torch.stack((steps >> 7, steps & 127)).to(torch.uint8)
    return planes.view(torch.int32).flatten().to(code.device)


@triton.jit
def _split4(x, A: tl.constexpr, B: tl.constexpr):
    """[A, 4 * B] or [B, 4] as four [A, B]: every fourth, from 0, 1, 2 and 3. In one thread it moves nothing."""
    even, odd = tl.split(tl.reshape(x, (A, B, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _pack(v0, v1, v2, v3):
    return tl.inline_asm_elementwise(
        PACK_PTX, "=&r,=&r,r,r,r,r", [v0, v1, v2, v3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _table(table_ptr, i: tl.constexpr):
    word = tl.load(table_ptr + i)
    return tl.inline_asm_elementwise(KEEP_PTX, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _offset(word, start, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX, "=r,r,r", [word, start], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _offset4(w0, w1, w2, w3, start, PTX: tl.constexpr):
    return _offset(w3, _offset(w2, _offset(w1, _offset(w0, start, PTX), PTX), PTX), PTX)


@triton.jit
def _int8_word(w, a, b, s0, s1):
    return tl.inline_asm_elementwise(
        INT8_PTX, "=&r,=&r,r,r,r,r,r", [w, a, b, s0, s1], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _nf4_word(w, a0, a1, b0, b1, s0, s1, s2, t0, t1, t2, t3, t4, t5, t6, t7):
    return tl.inline_asm_elementwise(
        NF4_PTX, "=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, a0, a1, b0, b1, s0, s1, s2, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _int4_chunk(w0, w1, w2, w3, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7, s0, s1):
    return tl.inline_asm_elementwise(
        INT4_PTX, "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w0, w1, w2, w3, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7, s0, s1],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _split8(x, CHUNKS: tl.constexpr):
    """[CHUNKS, 8] as eight [1, CHUNKS]."""
    low, high = tl.split(tl.reshape(x, (CHUNKS, 4, 2)))
    x0, x2, x4, x6 = _split4(low, 1, CHUNKS)
    x1, x3, x5, x7 = _split4(high, 1, CHUNKS)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _float(total):
    return total.to(tl.float32, bitcast=True) - _MAGIC


@triton.jit
def _load_words(w_ptr, row, inside, chunk, K: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """int32 [rows, 4 * CHUNKS]: 16 bytes a chunk of SIZE weights."""
    word = chunk * 4 + tl.arange(0, CHUNKS * 4)
    valid = inside[:, None] & (word < K // SIZE * 4)[None, :]
    return tl.load(w_ptr + row[:, None] * (K // SIZE * 4) + word[None, :], mask=valid, other=0)


@triton.jit
def _load_scales(scale_ptr, row, inside, chunk, K: tl.constexpr, SHARED: tl.constexpr, CHUNKS: tl.constexpr):
    """[rows, CHUNKS] of 4-bit weights: one scale for SHARED chunks."""
    at = chunk + tl.arange(0, CHUNKS)
    valid = inside[:, None] & (at < K // 32)[None, :]
    return tl.load(scale_ptr + row[:, None] * (K // 32 // SHARED) + (at // SHARED)[None, :], mask=valid, other=0.0)


@triton.jit
def _planes(
    x_ptr, norm_ptr, rms, eps, chunk,
    K: tl.constexpr, SIZE: tl.constexpr, SWAP: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """a, b: int32 [CHUNKS, words] of the chunks' fixed point; top: float32 [CHUNKS]. SWAP: the bytes of each two values
    change places. WHOLE: the chunks are all of x, and the norm takes its mean from them, not from `rms`."""
    at = chunk + tl.arange(0, CHUNKS)
    where = at[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    valid = (at < K // SIZE)[:, None]
    if NORM and WHOLE:
        x = tl.load(x_ptr + where, mask=valid, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + where, mask=valid, other=0.0).to(tl.float32)
        rms = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / K + eps)
        x = (x * rms * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
    else:
        x = load_x(x_ptr, norm_ptr, rms, where, valid, NORM)
    # The largest magnitude by its bits: NaN is above every number and reaches the output.
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    # The bits of the sum end in the rounded integer plus 128.
    fixed = (x * (1.0 / top * _TOP)[:, None] + (_MAGIC + 128.0)).to(tl.int32, bitcast=True)
    v0, v1, v2, v3 = _split4(fixed, CHUNKS, SIZE // 4)
    if SWAP:
        a, b = _pack(v1, v0, v3, v2)
    else:
        a, b = _pack(v0, v1, v2, v3)
    return a, b, top


@triton.jit
def packed_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, table_ptr, bias_ptr, out_ptr, rows, eps,
    K: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program p makes outputs p * BLOCK_ROWS and on; `rows` outputs in all. `w_ptr` is int32, `scale_ptr` the absmax
    of nf4, the bfloat16 steps of int4 or the row scales of int8, `table_ptr` the `code_planes` of nf4."""
    NF4: tl.constexpr = FORMAT == "nf4"
    GROUPED: tl.constexpr = FORMAT != "int8"
    SIZE: tl.constexpr = 32 if GROUPED else 16
    SHARED: tl.constexpr = 2 if NF4 else 1
    TILE: tl.constexpr = 2 * BLOCK_ROWS if GATED else BLOCK_ROWS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, inside = tile_rows(rows, BLOCK_ROWS, GATED)
    # The first step's loads start here, where it is the only one or loads are made a step ahead: the norm and the fixed
    # point of x are made while they are in flight.
    ONE_STEP: tl.constexpr = CHUNKS * SIZE >= K
    if ONE_STEP or PDL:
        words = _load_words(w_ptr, row, inside, 0, K, SIZE, CHUNKS)
        if GROUPED:
            scales = _load_scales(scale_ptr, row, inside, 0, K, SHARED, CHUNKS)
    if PDL:
        tl.extra.cuda.gdc_wait()  # from here on x, and out, which earlier kernels may still be reading or writing
    rms = 0.0
    if NORM and not ONE_STEP:
        rms = root_mean_square(x_ptr, eps, K, WIDE)
    if NF4:
        t0, t1, t2, t3 = _table(table_ptr, 0), _table(table_ptr, 1), _table(table_ptr, 2), _table(table_ptr, 3)
        t4, t5, t6, t7 = _table(table_ptr, 4), _table(table_ptr, 5), _table(table_ptr, 6), _table(table_ptr, 7)
    acc = tl.zeros((TILE, CHUNKS), tl.float32)
    start = tl.full((1, CHUNKS), _MAGIC_BITS, tl.int32)
    for chunk in tl.range(0, K // SIZE, CHUNKS, num_stages=STAGES):
        if not ONE_STEP and not PDL:
            words = _load_words(w_ptr, row, inside, chunk, K, SIZE, CHUNKS)
            if GROUPED:
                scales = _load_scales(scale_ptr, row, inside, chunk, K, SHARED, CHUNKS)
        if not ONE_STEP and PDL:
            next_words = _load_words(w_ptr, row, inside, chunk + CHUNKS, K, SIZE, CHUNKS)
            if GROUPED:
                next_scales = _load_scales(scale_ptr, row, inside, chunk + CHUNKS, K, SHARED, CHUNKS)
        a, b, top = _planes(x_ptr, norm_ptr, rms, eps, chunk, K, SIZE, NF4, NORM, ONE_STEP, CHUNKS)
        w0, w1, w2, w3 = _split4(words, TILE, CHUNKS)
        if GROUPED:
            a0, a1, a2, a3, a4, a5, a6, a7 = _split8(a, CHUNKS)
            b0, b1, b2, b3, b4, b5, b6, b7 = _split8(b, CHUNKS)
            PTX: tl.constexpr = OFFSET_PTX if NF4 else INT4_OFFSET_PTX
            less_a = _offset4(a1, a3, a5, a7, _offset4(a0, a2, a4, a6, start, PTX), PTX)
            less_b = _offset4(b1, b3, b5, b7, _offset4(b0, b2, b4, b6, start, PTX), PTX)
        if NF4:
            s0, s1, s2 = _nf4_word(w0, a0, a1, b0, b1, less_a, less_b, less_a, t0, t1, t2, t3, t4, t5, t6, t7)
            s0, s1, s2 = _nf4_word(w1, a2, a3, b2, b3, s0, s1, s2, t0, t1, t2, t3, t4, t5, t6, t7)
            s0, s1, s2 = _nf4_word(w2, a4, a5, b4, b5, s0, s1, s2, t0, t1, t2, t3, t4, t5, t6, t7)
            s0, s1, s2 = _nf4_word(w3, a6, a7, b6, b7, s0, s1, s2, t0, t1, t2, t3, t4, t5, t6, t7)
            total = _float(s0) * 256.0 + (_float(s1) + _float(s2) * 2.0)
            acc += total * (scales * top[None, :])
        elif GROUPED:
            s0, s1 = _int4_chunk(
                w0, w1, w2, w3, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7, less_a, less_b
            )
            acc += (_float(s0) * 256.0 + _float(s1)) * (scales.to(tl.float32) * top[None, :])
        else:
            a0, a1, a2, a3 = _split4(a, 1, CHUNKS)
            b0, b1, b2, b3 = _split4(b, 1, CHUNKS)
            s0, s1 = _int8_word(w0, a0, b0, start, start)
            s0, s1 = _int8_word(w1, a1, b1, s0, s1)
            s0, s1 = _int8_word(w2, a2, b2, s0, s1)
            s0, s1 = _int8_word(w3, a3, b3, s0, s1)
            acc += (_float(s0) * 256.0 + _float(s1)) * top[None, :]
        if not ONE_STEP and PDL:
            words = next_words
            if GROUPED:
                scales = next_scales
    product = tl.sum(acc, 1)
    if NF4:
        product *= _NF4_STEP
    elif GROUPED:
        product *= _INT4_STEP
    else:
        product *= _INT8_STEP * tl.load(scale_ptr + row, mask=inside, other=0.0)
    finish(out_ptr, bias_ptr, row, inside, product, rows, BLOCK_ROWS, GATED, BIAS, ADD)
