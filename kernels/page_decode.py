"""Decode attention straight from quantized pages, in Triton: the portable kernel, and what both GPU kernels share.

One query token, split over the cache (flash-decoding): every program attends to a run of pages of one head and writes
a partial result with its log-sum-exp; a second kernel merges. Lists and lengths are read from device memory, so one
captured CUDA graph serves all of them. The torch reference is `page_view.decode_attention`; `page_decode_cuda` is the
faster kernel with this signature, for sm_80 and newer.

A nibble is never converted: left in the low bits of a float16 it is the subnormal `nibble * 2^-24`, a high nibble is 16
times that, and the powers of two are taken out of the float32 result; a fifth bit (k5v3) is put above its nibble. Key
scales are folded into q, value scales into the probabilities, minima add one number a query. Both products are rounded
to float16, so value scales must stay below 255 (values of one token that span 3,800, with k5v3 1,780) and q times a key
scale below 65,504.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.page_dequantize import payload_of
from longrun.kernels.page_view import ExactTokens, PageView, check_view
from longrun.quant.kv_format import GPU_HEAD_DIMS, GPU_MAX_GROUP, GPU_PAGE_SIZE

HEAD_DIMS, PAGE_SIZE, MAX_GROUP = GPU_HEAD_DIMS, GPU_PAGE_SIZE, GPU_MAX_GROUP
_LOG2E = 1.4426950408889634
_ROWS = 16  # of a tensor-core tile: the group, padded


@dataclass(frozen=True)
class Workspace:
    """Partial results of one call, float32: out [num_heads, splits, group, head_dim], stats [num_heads, splits, group,
    2] (reference exponent in units of log 2, sum). Calls that run one after the other may share it."""

    out: Tensor
    stats: Tensor

    @classmethod
    def empty(cls, num_heads: int, splits: int, group: int, head_dim: int, device: torch.device) -> Workspace:
        shape = (num_heads, splits, group)
        return cls(torch.empty(*shape, head_dim, device=device), torch.empty(*shape, 2, device=device))

    @staticmethod
    def bytes_for(num_heads: int, splits: int, group: int, head_dim: int) -> int:
        return 4 * num_heads * splits * group * (head_dim + 2)


def check_shapes(q: Tensor, view: PageView, exact: ExactTokens | None) -> None:
    """Raise ConfigError where no GPU kernel serves the shape; assert what callers must hold anyway."""
    heads, group, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ConfigError(f"head_dim {dim} has no INT4 decode kernel: use one of {HEAD_DIMS}")
    if not 1 <= group <= MAX_GROUP:
        raise ConfigError(f"{group} query heads a KV head have no INT4 decode kernel: the limit is {MAX_GROUP}")
    if view.fmt.page_size != PAGE_SIZE:
        raise ConfigError(f"page_size {view.fmt.page_size} has no INT4 decode kernel: use {PAGE_SIZE}")
    assert q.is_contiguous() and q.dtype in (torch.float32, torch.bfloat16)
    check_view(view)
    assert view.fmt.quantized and view.index is not None and (view.num_heads, view.fmt.head_dim) == (heads, dim)
    for aligned in (view.storage, view.index, view.storage if view.other is None else view.other):
        assert aligned.data_ptr() % 16 == 0
    if exact is not None:
        assert exact.lengths.dtype == torch.int32 and exact.lengths.shape == (3,) and exact.lengths.is_contiguous()
        for x in (exact.sink_k, exact.sink_v, exact.tail_k, exact.tail_v):
            assert x.dtype == torch.bfloat16 and x.shape[::2] == (heads, dim) and x[0].is_contiguous()
        assert exact.sink_k.stride() == exact.sink_v.stride() and exact.tail_k.stride() == exact.tail_v.stride()


# of four bytes ($4) the low nibbles to the float16 of $0 and $1, the high ones to those of $2 and $3
FOUR_BITS_PTX = tl.constexpr(
    "{.reg .b32 x, y; prmt.b32 x, $4, 0, 0x4140; prmt.b32 y, $4, 0, 0x4342;"
    " and.b32 $0, x, 0x000f000f; and.b32 $1, y, 0x000f000f;"
    " and.b32 $2, x, 0x00f000f0; and.b32 $3, y, 0x00f000f0;}"
)
THREE_BITS_PTX = tl.constexpr(FOUR_BITS_PTX.value.replace("f", "7"))
# the same with the highest bit of every nibble of $5 as the fifth
FIVE_BITS_PTX = tl.constexpr(
    "{.reg .b32 x, y, u, v, a, b; prmt.b32 x, $4, 0, 0x4140; prmt.b32 y, $4, 0, 0x4342;"
    " prmt.b32 u, $5, 0, 0x4140; prmt.b32 v, $5, 0, 0x4342; shl.b32 u, u, 1; shl.b32 v, v, 1;"
    " and.b32 a, x, 0x000f000f; and.b32 b, u, 0x00100010; or.b32 $0, a, b;"
    " and.b32 a, y, 0x000f000f; and.b32 b, v, 0x00100010; or.b32 $1, a, b;"
    " and.b32 a, x, 0x00f000f0; and.b32 b, u, 0x01000100; or.b32 $2, a, b;"
    " and.b32 a, y, 0x00f000f0; and.b32 b, v, 0x01000100; or.b32 $3, a, b;}"
)


@triton.jit
def _nibbles(packed, BITS: tl.constexpr, PACKED: tl.constexpr):
    """The low BITS of low and of high nibbles, float16; PACKED: times 2^-24 and 2^-20."""
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            FOUR_BITS_PTX if BITS == 4 else THREE_BITS_PTX,
            "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    elif BITS == 4:
        low, high = (packed & 15).to(tl.float16), (packed >> 4).to(tl.float16)
    else:
        low, high = (packed & 7).to(tl.float16), ((packed >> 4) & 7).to(tl.float16)
    return low, high


@triton.jit
def _five_bits(packed, values, PACKED: tl.constexpr):
    """Keys of k5v3 as `_nibbles` has those of int4; `values`: the values' bytes at the same places."""
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            FIVE_BITS_PTX,
            "=r,=r,=r,=r,r,r", [packed, values], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = ((packed & 15) | ((values & 8) << 1)).to(tl.float16)
        high = ((packed >> 4) | ((values & 0x80) >> 3)).to(tl.float16)
    return low, high


@triton.jit
def _seen(position, sink_size, first):
    return (position < sink_size) | (position >= first)


@triton.jit(
    do_not_specialize=[
        "group", "splits", "other_slot", "table_stride", "pages_stride", "skip", "limit", "sink_size", "origin"
    ]
)  # fmt: skip
def split_kernel(
    q_ptr, storage_ptr, other_ptr, other_slot, table_ptr, table_stride, index_ptr, index_stride,
    pages_ptr, pages_stride, begins_ptr, counts_ptr, first_ptr, skip, limit, sink_size, origin,
    sink_k_ptr, sink_v_ptr, sink_stride, tail_k_ptr, tail_v_ptr, tail_stride, lengths_ptr,
    out_ptr, stats_ptr, group, splits, to_log2,
    D: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Grid: heads * splits. View and exact tokens as `page_view` says; without exact tokens their pointers are None.
    origin: position of the first token of page 0. PACKED: unpack four bytes at a time in PTX; without it the same in
    portable Triton. KEY_BITS: 4 (int4) or 5 (k5v3)."""
    head = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    count = tl.maximum(tl.minimum(tl.load(counts_ptr + head) - skip, limit), 0).to(tl.int64)
    begin = count * split // splits  # int64, and so is every page number
    end = count * (split + 1) // splits
    first = tl.load(first_ptr + head)
    rows, chans, half, toks = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, D // 2), tl.arange(0, 32)
    at = (head * group + rows[:, None]) * D + chans[None, :]
    q = tl.load(q_ptr + at, mask=rows[:, None] < group, other=0.0).to(tl.float32)
    q16 = q.to(tl.float16)
    pages_ptr += head * pages_stride + tl.load(begins_ptr + head) + skip
    table_ptr += head * table_stride
    index_ptr += head * index_stride
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    added = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS, D // 2), tl.float32)
    high = tl.zeros((ROWS, D // 2), tl.float32)
    for entry in tl.range(begin, end, num_stages=STAGES):
        page = tl.load(pages_ptr + entry).to(tl.int64)
        base = payload_of(tl.load(table_ptr + page), storage_ptr, other_ptr, other_slot, 64 * D + 256)
        kb = tl.load(base + chans[:, None] * 32 + toks[None, :])
        index = index_ptr + page * (2 * D) + chans
        scale, minimum = tl.load(index), tl.load(index + D)
        vb0 = tl.load(base + 32 * D + toks[:, None] * (D // 2) + half[None, :])
        vb1 = tl.load(base + 48 * D + toks[:, None] * (D // 2) + half[None, :])
        scales_ptr = (base + 64 * D).to(tl.pointer_type(tl.float16)) + toks
        vs0, vs1 = tl.load(scales_ptr), tl.load(scales_ptr + 32)
        vm0, vm1 = tl.load(scales_ptr + 64), tl.load(scales_ptr + 96)
        if KEY_BITS == 5:
            k0, k1 = _five_bits(kb, tl.load(base + 32 * D + chans[:, None] * 32 + toks[None, :]), PACKED)
        else:
            k0, k1 = _nibbles(kb, 4, PACKED)
        qs = q16 * scale[None, :]
        bias = tl.sum(q * minimum.to(tl.float32)[None, :], 1)[:, None]
        s0 = tl.dot(qs, k0)
        s1 = tl.dot(qs, k1)
        if PACKED:
            s0 *= 16777216.0
            s1 *= 1048576.0
        s0 = (s0 + bias) * to_log2
        s1 = (s1 + bias) * to_log2
        position = page * 64 + origin
        if (position + 64 > sink_size) & (position < first):
            s0 = tl.where(_seen(position + toks, sink_size, first)[None, :], s0, float("-inf"))
            s1 = tl.where(_seen(position + 32 + toks, sink_size, first)[None, :], s1, float("-inf"))
        new = tl.maximum(top, tl.maximum(tl.max(s0, 1), tl.max(s1, 1)))
        fade = tl.exp2(top - new)
        top = new
        p0 = tl.exp2(s0 - new[:, None])
        p1 = tl.exp2(s1 - new[:, None])
        total = total * fade + tl.sum(p0 + p1, 1)
        added = added * fade + tl.sum(p0 * vm0.to(tl.float32)[None, :] + p1 * vm1.to(tl.float32)[None, :], 1)
        # 2^8 keeps small probabilities out of float16's subnormals
        w0 = (p0 * (vs0.to(tl.float32) * 256.0)[None, :]).to(tl.float16)
        w1 = (p1 * (vs1.to(tl.float32) * 256.0)[None, :]).to(tl.float16)
        a0, b0 = _nibbles(vb0, 8 - KEY_BITS, PACKED)
        a1, b1 = _nibbles(vb1, 8 - KEY_BITS, PACKED)
        # a page's own sum first: tensor cores cut off what they add, and over many pages that is a bias
        low = low * fade[:, None] + tl.dot(w1, a1, tl.dot(w0, a0))
        high = high * fade[:, None] + tl.dot(w1, b1, tl.dot(w0, b0))
    if PACKED:
        low *= 16777216.0 / 256.0
        high *= 1048576.0 / 256.0
    else:
        low *= 1.0 / 256.0
        high *= 1.0 / 256.0
    low += added[:, None]
    high += added[:, None]
    # exact tokens, 16 at a time, dealt out over the programs
    if lengths_ptr is not None:
        sinks, tails, tail_start = tl.load(lengths_ptr), tl.load(lengths_ptr + 1), tl.load(lengths_ptr + 2)
        few = tl.arange(0, 16)
        for piece in tl.range(split, (sinks + tails + 15) // 16, splits):
            token = piece * 16 + few
            in_tail = token >= sinks
            sink_at = head * sink_stride + token * D
            tail_at = head * tail_stride + (token - sinks) * D
            sink_mask, tail_mask = (token < sinks)[:, None], (in_tail & (token < sinks + tails))[:, None]
            sink_all, tail_all = sink_at[:, None] + chans[None, :], tail_at[:, None] + chans[None, :]
            k = tl.load(sink_k_ptr + sink_all, mask=sink_mask, other=0.0).to(tl.float32)
            k += tl.load(tail_k_ptr + tail_all, mask=tail_mask, other=0.0).to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
            position = tl.where(in_tail, token - sinks + tail_start, token)
            seen = (token < sinks + tails) & _seen(position, sink_size, first)
            s = tl.where(seen[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp2(top - new)
            top = new
            p = tl.exp2(s - new[:, None])
            total = total * fade + tl.sum(p, 1)
            sink_half, tail_half = sink_at[:, None] + half[None, :], tail_at[:, None] + half[None, :]
            v = tl.load(sink_v_ptr + sink_half, mask=sink_mask, other=0.0).to(tl.float32)
            v += tl.load(tail_v_ptr + tail_half, mask=tail_mask, other=0.0).to(tl.float32)
            low = tl.dot(p, v, low * fade[:, None], input_precision="ieee")
            v = tl.load(sink_v_ptr + D // 2 + sink_half, mask=sink_mask, other=0.0).to(tl.float32)
            v += tl.load(tail_v_ptr + D // 2 + tail_half, mask=tail_mask, other=0.0).to(tl.float32)
            high = tl.dot(p, v, high * fade[:, None], input_precision="ieee")
    to = (head * splits + split) * group + rows
    tl.store(out_ptr + to[:, None] * D + half[None, :], low, mask=rows[:, None] < group)
    tl.store(out_ptr + to[:, None] * D + D // 2 + half[None, :], high, mask=rows[:, None] < group)
    tl.store(stats_ptr + to * 2, top, mask=rows < group)
    tl.store(stats_ptr + to * 2 + 1, total, mask=rows < group)


@triton.jit(do_not_specialize=["group", "splits"])
def merge_kernel(part_ptr, stats_ptr, out_ptr, lse_ptr, group, splits, D: tl.constexpr, MANY: tl.constexpr):
    """Grid: heads * group; MANY: a power of two, at least `splits`."""
    head = (tl.program_id(0) // group).to(tl.int64)
    row = tl.program_id(0) % group
    split, chans = tl.arange(0, MANY), tl.arange(0, D)
    at = (head * splits + split) * group + row
    tops = tl.load(stats_ptr + at * 2, mask=split < splits, other=-1e30)
    top = tl.max(tops, 0)
    weight = tl.where(split < splits, tl.exp2(tops - top), 0.0)
    total = tl.sum(weight * tl.load(stats_ptr + at * 2 + 1, mask=split < splits, other=0.0), 0)
    part = tl.load(part_ptr + at[:, None] * D + chans[None, :], mask=(split < splits)[:, None], other=0.0)
    out = tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + chans, tl.where(total > 0.0, out / total, 0.0))
    tl.store(lse_ptr + tl.program_id(0), (top + tl.log2(total)) * 0.6931471805599453)


def default_splits(num_heads: int, device: torch.device, programs_per_sm: int = 4) -> int:
    """Programs a head so that all of them run at once: fixed per machine and shape, never by length."""
    if device.type != "cuda":
        return 2
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count * programs_per_sm // num_heads)


def decode_attention(
    q: Tensor, view: PageView, exact: ExactTokens | None, *, softmax_scale: float = 1.0,
    workspace: Workspace | None = None, out: Tensor | None = None, lse: Tensor | None = None, splits: int | None = None,
    packed: bool = True, num_warps: int = 2, num_stages: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token's attention over the listed pages and the exact tokens that each head sees: `page_view`'s on a GPU.

    Args:
        q: bfloat16 or float32 [num_heads, group, head_dim]; scores are q . k * softmax_scale.
        view: lists, lengths and slots are read when the kernel runs.
        exact: bfloat16, or None.
        workspace: partial results; its shape decides the number of splits. None allocates one.
        out, lse: where to write; None allocates.
        packed: unpack in PTX; False is the portable way, for the interpreter.

    Returns:
        out: float32 [num_heads, group, head_dim]; lse: float32 [num_heads, group], natural log-sum-exp of the scores.
        A head that sees no token has 0 and -inf.

    Raises:
        ConfigError: no kernel for this head_dim, group or page_size.
    """
    check_shapes(q, view, exact)
    heads, group, dim = q.shape
    assert view.index is not None
    if workspace is None:
        workspace = Workspace.empty(heads, splits or default_splits(heads, q.device), group, dim, q.device)
    splits = workspace.out.shape[1]
    assert workspace.out.shape == (heads, splits, group, dim) and workspace.stats.shape == (heads, splits, group, 2)
    out = q.new_empty(q.shape, dtype=torch.float32) if out is None else out
    lse = q.new_empty(heads, group, dtype=torch.float32) if lse is None else lse
    exact_args = (None, None, 0, None, None, 0, None)
    if exact is not None:
        exact_args = (
            exact.sink_k, exact.sink_v, exact.sink_k.stride(0), exact.tail_k, exact.tail_v, exact.tail_k.stride(0),
            exact.lengths,
        )  # fmt: skip
    split_kernel[(heads * splits,)](
        q, view.storage, view.other, view.other_slot, view.table, view.table.stride(0), view.index,
        view.index.stride(0), view.pages, view.pages.stride(0), view.begins, view.counts, view.first,
        view.skip, view.limit, view.sink_size, view.fmt.sink_pages * PAGE_SIZE, *exact_args,
        workspace.out, workspace.stats, group, splits, softmax_scale * _LOG2E,
        D=dim, ROWS=_ROWS, PACKED=packed, STAGES=num_stages, KEY_BITS=view.fmt.key_bits, num_warps=num_warps,
    )  # fmt: skip
    merge_kernel[(heads * group,)](
        workspace.out, workspace.stats, out, lse, group, splits, D=dim, MANY=triton.next_power_of_2(splits), num_warps=4
    )
    return out, lse
