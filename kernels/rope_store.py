"""One token's head norms, RoPE, rotation and append in Triton: from the fused projection into q, tails and rings, one
launch.

A decode step in torch takes a dozen small launches a layer for this. Where the token goes is read from device memory
when the kernel runs, so that one captured CUDA graph serves every position.

A head is rotated in registers: of H_2n the kernel has both halves ([a + b, a - b] times H_n), and H_n is the
Kronecker product of two small Hadamard matrices, whose elements are parities of i & j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.overlap import overlaps
from longrun.kernels.rotary import check_head, head_norm, rotary_reference
from longrun.quant.rotation import rotation_of, rotation_scales


@triton.jit
def _sylvester(N: tl.constexpr):
    """Sylvester's Hadamard matrix of N <= 256 rows: float32 [N, N]."""
    parity = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return 1.0 - 2.0 * (parity & 1).to(tl.float32)


@triton.jit
def hadamard(x, N: tl.constexpr):
    """float32 [N] times Sylvester's matrix of N rows, 8 to 128: two sums of 2 to 16 items in place of one of N."""
    A: tl.constexpr = 2 if N < 16 else (4 if N < 64 else 8)
    B: tl.constexpr = N // A
    rows = tl.sum(tl.reshape(x, (A, B))[:, None, :] * _sylvester(A)[:, :, None], 0)
    return tl.reshape(tl.sum(rows[:, :, None] * _sylvester(B)[None, :, :], 1), (N,))


@triton.jit(do_not_specialize=["num_qo_heads", "num_kv_heads", "num_retrieval", "num_retrieval_qo", "eps"])
def rope_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_out_ptr, tail_k_ptr, tail_v_ptr, ring_k_ptr, ring_v_ptr, slots_ptr,
    q_norm_ptr, k_norm_ptr, signs_ptr, num_qo_heads, num_kv_heads, num_retrieval, num_retrieval_qo, tail_stride,
    ring_stride, eps, QUERY_SCALE: tl.constexpr, KEY_SCALE: tl.constexpr,
    D: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, VALUES: tl.constexpr = False, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid: a program a query head, then one a KV head (its key and its value). VALUES: they are rotated, too."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    head = tl.program_id(0)
    channel = tl.arange(0, HALF)
    at = head * D + channel
    low = tl.load(qkv_ptr + at).to(tl.float32)
    high = tl.load(qkv_ptr + at + HALF).to(tl.float32)
    cos, sin = tl.load(cos_ptr + channel), tl.load(sin_ptr + channel)
    if ROTATE:
        sign_low, sign_high = tl.load(signs_ptr + channel), tl.load(signs_ptr + HALF + channel)
    if NORM:
        weight_ptr = k_norm_ptr
        if head < num_qo_heads:
            weight_ptr = q_norm_ptr
        scale_low = tl.load(weight_ptr + channel).to(tl.float32)
        scale_high = tl.load(weight_ptr + HALF + channel).to(tl.float32)
        mean_square = tl.sum(low * low + high * high, 0) / D
        low, high = head_norm(low, high, scale_low, scale_high, mean_square, eps, dtype)
    turned_low = (low * cos - high * sin).to(dtype)
    turned_high = (high * cos + low * sin).to(dtype)
    if ROTATE:
        retrieval_key = (head >= num_qo_heads) & (head < num_qo_heads + num_retrieval)
        if (head < num_retrieval_qo) | retrieval_key:
            scale = tl.where(head < num_qo_heads, QUERY_SCALE, KEY_SCALE)
            low = turned_low.to(tl.float32) * sign_low * scale
            high = turned_high.to(tl.float32) * sign_high * scale
            turned_low = hadamard(low + high, HALF).to(dtype)
            turned_high = hadamard(low - high, HALF).to(dtype)
    if head < num_qo_heads:
        tl.store(q_out_ptr + at, turned_low)
        tl.store(q_out_ptr + at + HALF, turned_high)
    else:
        cache: tl.constexpr = tail_k_ptr.dtype.element_ty
        kv_head = (head - num_qo_heads).to(tl.int64)
        v_low = tl.load(qkv_ptr + num_kv_heads * D + at)
        v_high = tl.load(qkv_ptr + num_kv_heads * D + at + HALF)
        if VALUES:  # noqa: SIM102  (decided when it is compiled)
            if kv_head < num_retrieval:
                low = v_low.to(tl.float32) * sign_low * KEY_SCALE
                high = v_high.to(tl.float32) * sign_high * KEY_SCALE
                v_low, v_high = hadamard(low + high, HALF).to(dtype), hadamard(low - high, HALF).to(dtype)
        v_low, v_high = v_low.to(cache), v_high.to(cache)
        if kv_head < num_retrieval:
            to = kv_head * tail_stride + tl.load(slots_ptr) * D + channel
            tl.store(tail_k_ptr + to, turned_low.to(cache))
            tl.store(tail_k_ptr + to + HALF, turned_high.to(cache))
            tl.store(tail_v_ptr + to, v_low)
            tl.store(tail_v_ptr + to + HALF, v_high)
        else:
            to = (kv_head - num_retrieval) * ring_stride + tl.load(slots_ptr + 1) * D + channel
            tl.store(ring_k_ptr + to, turned_low.to(cache))
            tl.store(ring_k_ptr + to + HALF, turned_high.to(cache))
            tl.store(ring_v_ptr + to, v_low)
            tl.store(ring_v_ptr + to + HALF, v_high)


def _counts(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
    ring_k: Tensor | None, ring_v: Tensor | None, slots: Tensor, num_qo_heads: int,
    q_norm: Tensor | None, k_norm: Tensor | None, signs: Tensor | None, rotate_values: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """head_dim, retrieval heads, streaming heads; asserts all that callers must hold."""
    dim = q_out.shape[1]
    caches = [(k, v) for k, v in ((tail_k, tail_v), (ring_k, ring_v)) if k is not None and v is not None]
    assert caches and (tail_k is None) == (tail_v is None) and (ring_k is None) == (ring_v is None)
    retrieval, streaming = (0 if k is None else k.shape[0] for k in (tail_k, ring_k))
    assert qkv.is_contiguous() and qkv.numel() == (num_qo_heads + 2 * (retrieval + streaming)) * dim, qkv.shape
    assert q_out.shape == (num_qo_heads, dim) and q_out.dtype == qkv.dtype and q_out.is_contiguous()
    for table in (cos, sin):
        assert table.numel() == dim and table.dtype == torch.float32 and table.is_contiguous()
    for k, v in caches:
        assert k.shape == v.shape and k.stride() == v.stride() and k.stride()[1:] == (dim, 1) and k.shape[2] == dim
        assert k.dtype == v.dtype == caches[0][0].dtype
    assert slots.dtype == torch.int64 and slots.shape == (2,) and slots.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    for weight in (q_norm, k_norm):
        assert weight is None or (weight.shape == (dim,) and weight.is_contiguous())
    assert signs is not None or not rotate_values
    if signs is not None:
        assert signs.shape == (dim,) and signs.dtype == torch.float32 and signs.is_contiguous()
        assert num_qo_heads % (retrieval + streaming) == 0
    return dim, retrieval, streaming


def rope_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
    ring_k: Tensor | None, ring_v: Tensor | None, slots: Tensor, num_qo_heads: int, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, signs: Tensor | None = None,
    rotate_values: bool = False, num_warps: int = 1, overlap: bool = False,
) -> None:  # fmt: skip
    """Norm and turn one token's query and key heads; write q_out, and keys and values to their place in the cache.

    Args:
        qkv: [(num_qo_heads + 2 * num_kv_heads) * head_dim] in any shape, contiguous; bfloat16, float16 or float32.
            Query heads, then key heads, then value heads, KV heads in permuted order: R retrieval heads, then S
            streaming heads.
        cos, sin: float32 [head_dim] of the token's position, the second half a copy of the first (any shape of
            head_dim items). sin is plain: the first half of a head is x * cos - partner * sin.
        q_out: [num_qo_heads, head_dim], dtype of qkv.
        tail_k, tail_v: [R, page_size, head_dim], written at token slots[0]; None where R is 0.
        ring_k, ring_v: [S, ring slots, head_dim], written at token slots[1]; None where S is 0. All four of one dtype;
            values are rounded to the dtype of qkv first, as the decoder rounds them. Tokens and channels contiguous.
        slots: int64 [2] on the device, read when the kernel runs.
        q_norm, k_norm: [head_dim] weights of an RMS norm per head before the turn (Qwen3), both or neither; eps is
            added to the mean square, and the norm is rounded to the dtype of qkv.
        signs: float32 [head_dim] of 1 and -1, which choose the rotation of retrieval KV heads' keys and of their query
            heads (`quant.rotation.rotation_of`): turned heads are rounded to the dtype of qkv, rotated with float32
            sums, and rounded again, as in prefill. Streaming heads are left alone. None rotates nothing.
        rotate_values: rotate retrieval heads' values as their keys; needs `signs`.
        num_warps: warps a head.
        overlap: see `vector_linear`.

    Raises:
        ConfigError: a head_dim or dtype that the kernel does not serve.
    """
    dim, retrieval, streaming = _counts(
        qkv, cos, sin, q_out, tail_k, tail_v, ring_k, ring_v, slots, num_qo_heads, q_norm, k_norm, signs, rotate_values
    )
    check_head("rope_store", dim, qkv.dtype)
    overlap = overlap and overlaps(qkv.device)
    if tail_k is None or tail_v is None:
        tail_k, tail_v = ring_k, ring_v  # never written: there is no retrieval head
    if ring_k is None or ring_v is None:
        ring_k, ring_v = tail_k, tail_v
    assert tail_k is not None and ring_k is not None
    query_scale, key_scale = rotation_scales(dim)
    rope_store_kernel[(num_qo_heads + retrieval + streaming,)](
        qkv, cos, sin, q_out, tail_k, tail_v, ring_k, ring_v, slots, cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm, cos if signs is None else signs, num_qo_heads, retrieval + streaming,
        retrieval, retrieval * (num_qo_heads // (retrieval + streaming)), tail_k.stride(0), ring_k.stride(0), eps,
        QUERY_SCALE=query_scale, KEY_SCALE=key_scale, D=dim, NORM=q_norm is not None, ROTATE=signs is not None,
        VALUES=rotate_values, num_warps=num_warps, PDL=overlap, launch_pdl=overlap,
    )  # fmt: skip


def rope_store_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
    ring_k: Tensor | None, ring_v: Tensor | None, slots: Tensor, num_qo_heads: int, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, signs: Tensor | None = None,
    rotate_values: bool = False, num_warps: int = 1, overlap: bool = False,
) -> None:  # fmt: skip
    """`rope_store` in torch; waits for the device to read `slots`."""
    dim, retrieval, streaming = _counts(
        qkv, cos, sin, q_out, tail_k, tail_v, ring_k, ring_v, slots, num_qo_heads, q_norm, k_norm, signs, rotate_values
    )
    heads = qkv.clone().view(1, -1, dim)
    turned, v = heads[:, : -(retrieval + streaming)], heads[0, -(retrieval + streaming) :]
    rotary_reference(
        turned, cos.view(1, dim), sin.view(1, dim), weight_a=q_norm, weight_b=k_norm, split=num_qo_heads, eps=eps
    )
    q, k = turned[0, :num_qo_heads], turned[0, num_qo_heads:]
    if signs is not None:
        for_queries, for_keys = (matrix.to(qkv.dtype) for matrix in rotation_of(signs))
        rotated_q, rotated_k = q[: num_qo_heads // (retrieval + streaming) * retrieval], k[:retrieval]
        rotated_q.copy_(rotated_q @ for_queries)
        rotated_k.copy_(rotated_k @ for_keys)
        if rotate_values:
            v = torch.cat((v[:retrieval] @ for_keys, v[retrieval:]))
    q_out.copy_(q)
    tail, ring = slots.tolist()
    if tail_k is not None and tail_v is not None:
        tail_k[:, tail], tail_v[:, tail] = k[:retrieval], v[:retrieval]
    if ring_k is not None and ring_v is not None:
        ring_k[:, ring], ring_v[:, ring] = k[retrieval:], v[retrieval:]
