"""Streaming-head attention over a chunk in Triton: sinks and a sliding window, keys straight from ring and chunk.

Flash attention (Dao, "FlashAttention-2", arXiv:2307.08691) under the mask of StreamingLLM (Xiao et al.,
arXiv:2309.17453). A program takes a tile of query rows and one list of key tiles, in three stretches: ring slots, sinks
that stand in the chunk, the window within the chunk. One pipelined loop runs over them all, since a tile differs from
the next in its base address only. Ring slots are read in slot order, whatever positions they hold: attention does not
ask for an order, and only tiles near the start of the chunk read more of the ring than its sinks. Everything is counted
from the chunk's first token, so that numbers stay small at any position.

Work of one layer: 4 * T * num_qo_heads * (sink_size + recent_size) * head_dim useful operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError

TRITON_HEAD_DIMS = (64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIMIT = 2**29  # of rows, slots and window, so that sums of two stay within int32


@dataclass(frozen=True)
class BandConfig:
    """How the kernel cuts the work; no setting changes the answer beyond rounding.

    Attributes:
        block_m: query rows of a program, a power of two from 16.
        block_n: keys of a tile, a power of two from 16.
        packed: rows are (token, head of the group), so that a tile spans block_m / group tokens and wastes less of its
            window tiles; otherwise a program serves one query head.
        max_registers: bound of registers a thread, so that two programs share a multiprocessor; None leaves it open.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
    packed: bool = True
    max_registers: int | None = None


def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> BandConfig:
    """The setting used where none is given. Bounds of registers are those that the compiler meets without spilling."""
    if dtype == torch.float32:
        return BandConfig(block_m=32, block_n=32, num_warps=4)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return BandConfig()
    return BandConfig(block_n=32 if head_dim == 128 else 64, num_stages=3, max_registers=128)


_VARYING = ["num_tokens", "held_sinks", "num_valid", "oldest", "sink_limit", "sink_size", "recent_size"]


@triton.jit(do_not_specialize=_VARYING)  # one compilation for all chunks of a sequence
def banded_prefill_kernel(
    q, k, v, ring_k, ring_v, out,
    q_token_stride, q_head_stride, q_group_stride, out_token_stride, out_head_stride, out_group_stride,
    k_head_stride, k_token_stride, v_head_stride, v_token_stride, ring_head_stride,
    num_tokens, held_sinks, num_valid, oldest, sink_limit, sink_size, recent_size, scale_log2,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, head * (GROUP // PACK) + member). Tokens and keys are counted from the chunk's first token.

    held_sinks: ring slots that hold sinks. num_valid: ring slots that hold a token. oldest: ring slot, after the
    sinks, that the chunk's first token would take. sink_limit: keys below it are sinks (sink_size - start).
    """
    FAR: tl.constexpr = 2**30
    shares: tl.constexpr = GROUP // PACK
    head = (tl.program_id(1) // shares).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    member = (tl.program_id(1) % shares + row % PACK).to(tl.int64)
    token = tl.minimum(row // PACK, num_tokens - 1)
    first_token = tl.program_id(0) * BLOCK_M // PACK
    last_token = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // PACK, num_tokens - 1)
    column, key = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N)

    start = q + head * q_head_stride + column[None, :]
    queries = tl.load(start + (token.to(tl.int64) * q_token_stride + member * q_group_stride)[:, None])
    k += head * k_head_stride
    v += head * v_head_stride
    ring_k += head * ring_head_stride
    ring_v += head * ring_head_stride

    ring_stop = tl.where(first_token < recent_size - 1, num_valid, held_sinks)
    window_first = tl.maximum(first_token - recent_size + 1, 0)
    sink_stop = tl.maximum(tl.minimum(sink_limit, window_first), 0)
    sinks_from = tl.cdiv(ring_stop, BLOCK_N)
    window_from = sinks_from + tl.cdiv(sink_stop, BLOCK_N)
    tiles = window_from + tl.cdiv(last_token + 1 - window_first, BLOCK_N)

    top = tl.full([BLOCK_M], -1e38, tl.float32)  # finite, so that a row which has seen no key yet keeps zeros
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for tile in range(tiles):
        in_ring, in_window = tile < sinks_from, tile >= window_from
        skipped = tl.where(in_ring, 0, tl.where(in_window, window_from, sinks_from))
        first = (tile - skipped) * BLOCK_N + tl.where(in_window, window_first, 0)
        stop = tl.where(in_ring, ring_stop, tl.where(in_window, last_token + 1, sink_stop))
        row_in_tile = tl.minimum(key, stop - 1 - first)[:, None]  # a key too many is read as the last, then masked
        k_stride = tl.where(in_ring, HEAD_DIM, k_token_stride)
        v_stride = tl.where(in_ring, HEAD_DIM, v_token_stride)
        k_tile = tl.where(in_ring, ring_k, k) + first.to(tl.int64) * k_stride
        v_tile = tl.where(in_ring, ring_v, v) + first.to(tl.int64) * v_stride
        keys = tl.load(k_tile + (row_in_tile * k_stride + column[None, :]))
        values = tl.load(v_tile + (row_in_tile * v_stride + column[None, :]))

        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        before = tl.where(in_ring, held_sinks, sink_stop)
        inside = (first > last_token - recent_size) & (first + BLOCK_N <= first_token + 1)
        full = tl.where(in_window, inside, first + BLOCK_N <= before)
        if not full:
            age = first + key - sink_size - oldest
            held = tl.where(first + key < held_sinks, -FAR, tl.where(age < 0, age, age - recent_size))
            place = tl.where(in_ring, held, first + key)
            place = tl.where(first + key < stop, place, FAR)[None, :]
            seen = (place <= token[:, None]) & ((place > token[:, None] - recent_size) | (place < sink_limit))
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, found * shrink[:, None], input_precision=PRECISION)
        top = new_top
    found = found / total[:, None]
    start = out + head * out_head_stride + column[None, :]
    place = token.to(tl.int64) * out_token_stride + member * out_group_stride
    tl.store(start + place[:, None], found.to(out.dtype.element_ty), mask=(row < num_tokens * PACK)[:, None])


def check_banded_prefill(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int, sink_size: int, recent_size: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Raises ConfigError where the arguments do not fit together or the kernel does not serve them."""
    tokens, heads, group, dim = q.shape
    if dim not in TRITON_HEAD_DIMS:
        raise ConfigError(
            f"head_dim {dim} has no Triton streaming kernels: use a model with {TRITON_HEAD_DIMS[0]} or "
            f"{TRITON_HEAD_DIMS[1]}, or the torch backend"
        )
    if q.dtype not in TRITON_DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ConfigError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: pass all three in one of bfloat16, float16 or float32"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape != (heads, tokens, dim):
            raise ConfigError(
                f"{name} has shape {list(x.shape)}, q asks for {[heads, tokens, dim]}: pass the chunk's own"
            )
    if out.shape != q.shape:
        raise ConfigError(f"out has shape {list(out.shape)}, q has {list(q.shape)}: make out as large as q")
    if start < 0 or sink_size < 0 or recent_size < 1:
        raise ConfigError(
            f"start {start}, sink_size {sink_size}, recent_size {recent_size}: they must be at least 0, 0 and 1"
        )
    slots = min(start, sink_size + recent_size)
    if ring_k.shape != ring_v.shape or ring_k.shape[::2] != (heads, dim) or ring_k.shape[1] < slots:
        raise ConfigError(
            f"ring_k and ring_v have shapes {list(ring_k.shape)} and {list(ring_v.shape)}, position {start} asks for "
            f"{[heads, slots, dim]} or more slots: pass the ring of this layer's streaming heads"
        )
    strided = {"q": q, "k": k, "v": v, "out": out}
    loose = [name for name, x in strided.items() if x.stride(-1) != 1]
    loose += [name for name, x in (("ring_k", ring_k), ("ring_v", ring_v)) if not x.is_contiguous()]
    if loose:
        raise ConfigError(f"{', '.join(loose)} not contiguous (rings) or with strided channels: make a contiguous copy")
    far = max(k.stride(1), v.stride(1)) * 256  # within a tile of keys, offsets are 32-bit
    if max(tokens * group, recent_size, sink_size, far) > _LIMIT:
        raise ConfigError(
            f"{tokens} tokens x {group} heads a group, window {sink_size} + {recent_size}, token strides "
            f"{k.stride(1)} and {v.stride(1)}: the kernel counts to {_LIMIT}, strides to {_LIMIT // 256}; take a "
            "smaller chunk or window"
        )


def banded_prefill(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int, sink_size: int, recent_size: int,
    softmax_scale: float, out: Tensor, config: BandConfig | None = None, in_order: bool = False,
) -> None:  # fmt: skip
    """Attention of one layer's streaming heads over a chunk of tokens [start, start + T), written to `out`.

    A query at position p sees the keys at positions below sink_size (never later than itself) and at positions
    p - recent_size + 1 .. p; those from `start` on are in k and v, the older ones in the ring.

    Args:
        q: [T, num_heads, group, head_dim], bfloat16, float16 or float32; any strides, channels contiguous.
        k, v: [num_heads, T, head_dim], dtype of q; any strides, channels contiguous.
        ring_k, ring_v: [num_heads, num_slots, head_dim], contiguous, as `cache.ring.Ring` leaves them before the
            chunk is appended; rounded to q's dtype if theirs is another.
        start: position of the chunk's first token.
        sink_size, recent_size: the window, as the ring's.
        softmax_scale: factor of the scores, above 0.
        out: [T, num_heads, group, head_dim], any strides, channels contiguous; every element is written.
        config: how to cut the work (None: `default_config`).
        in_order: ring_k and ring_v hold the sinks and then the newest tokens from the oldest on, instead of a ring.

    Raises:
        ConfigError: head_dim other than 64 and 128, or arguments that do not fit together.
    """
    check_banded_prefill(q, k, v, ring_k, ring_v, start, sink_size, recent_size, out)
    assert softmax_scale > 0, softmax_scale  # the largest score is taken before scaling
    tokens, heads, group, dim = q.shape
    if q.numel() == 0:
        return
    config = default_config(dim, q.dtype, q.device) if config is None else config
    pack = group if config.packed else 1
    ring_k, ring_v = ring_k.to(q.dtype), ring_v.to(q.dtype)
    oldest = 0 if in_order and start >= sink_size + recent_size else (start - sink_size) % recent_size
    banded_prefill_kernel[(triton.cdiv(tokens * pack, config.block_m), heads * (group // pack))](
        q, k, v, ring_k, ring_v, out, *q.stride()[:3], *out.stride()[:3], *k.stride()[:2], *v.stride()[:2],
        ring_k.stride(0), tokens, min(sink_size, start), min(start, sink_size + recent_size),
        oldest, max(sink_size - start, -_LIMIT), sink_size, recent_size,
        softmax_scale * math.log2(math.e),
        GROUP=group, PACK=pack, HEAD_DIM=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip


def banded_prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int, sink_size: int, recent_size: int,
    softmax_scale: float, out: Tensor, in_order: bool = False,
) -> None:  # fmt: skip
    """`banded_prefill` in torch, in float32 (float64 for float64 q): a mask over the positions of all keys held. Same
    arguments, any head_dim; slow, and meant for tests."""
    tokens, heads, _, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    old = [*range(min(sink_size, start)), *range(max(sink_size, start - recent_size), start)]
    ring = [p if p < sink_size else sink_size + (p - sink_size) % recent_size for p in old]
    slots = list(range(len(old))) if in_order else ring
    positions = torch.tensor([*old, *range(start, start + tokens)], device=q.device)
    for head in range(heads):
        keys = torch.cat((ring_k[head, slots].to(q.dtype), k[head])).to(exact)
        values = torch.cat((ring_v[head, slots].to(q.dtype), v[head])).to(exact)
        for first in range(0, tokens, 1024):
            p = torch.arange(start + first, min(start + first + 1024, start + tokens), device=q.device)[:, None]
            hidden = (positions > p) | ((positions <= p - recent_size) & (positions >= sink_size))
            scores = q[first : first + 1024, head].to(exact).transpose(0, 1) @ keys.T * softmax_scale
            weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
            out[first : first + 1024, head] = (weights @ values).transpose(0, 1).to(out.dtype)
