"""Attention of tiles to the pages on their lists in Triton: the second pass of sparse prefill.

Flash attention (Dao, "FlashAttention-2", arXiv:2307.08691) whose key tiles are pages, named by a list. A program serves
a tile, or a part of it: it finds the part of its list that stands in the piece, reads those pages as one pipelined
loop, and merges what it found into the result so far once, at the end. Programs of a KV head run one after the other,
so that the head's piece is read from the L2 cache.

Work: 4 * TILE * page_size * head_dim operations for every listed page of every tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.tile_attention import TILE, check_attend_tiles
from longrun.kernels.tile_page import check_piece, check_served, has_copy_unit, load_page, page_descriptor
from longrun.quant.kv_format import GPU_PAGE_SIZE

_LIMIT = {torch.bfloat16: 2.0**90, torch.float32: 2.0**90, torch.float16: 0.0}
_SEARCHED = 1024  # entries that a program looks at at once; the square of it bounds a list


@dataclass(frozen=True)
class AttendConfig:
    """How the kernel cuts the work; no setting changes the answer beyond rounding.

    Attributes:
        block_m: queries of a program, TILE or a power of two below it from 16.
        pages: pages of an iteration, 1 or 2.
        described: single pages are copied by Hopper's copy unit, which knows the piece by a descriptor; otherwise
            threads copy them.
    """

    block_m: int = TILE
    pages: int = 1
    num_warps: int = 8
    num_stages: int = 2
    described: bool = False


def default_config(q: Tensor) -> AttendConfig:
    """The setting used where none is given."""
    if q.dtype == torch.float32:
        return AttendConfig(block_m=32, num_warps=4, num_stages=1)
    if has_copy_unit(q):
        return AttendConfig(num_stages=3, described=True)
    return AttendConfig()


@triton.jit
def _first_of(entries, count, wanted, SEARCHED: tl.constexpr):
    """Place of the first of `count` ascending entries that is not below `wanted`: two looks instead of a search of 15
    steps that wait for each other."""
    at = tl.arange(0, SEARCHED)
    step = tl.cdiv(count, SEARCHED)
    coarse = tl.load(entries + at * step, mask=at * step < count, other=2147483647)
    begin = tl.maximum(tl.sum((coarse < wanted).to(tl.int32)) - 1, 0) * step
    fine = tl.load(entries + begin + at, mask=(at < step) & (begin + at < count), other=2147483647)
    return begin + tl.sum((fine < wanted).to(tl.int32))


@triton.jit
def _two_pages(x, head, head_stride, entry, other, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    key, column = tl.arange(0, 2 * PAGE_SIZE)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    row = tl.where(key < PAGE_SIZE, entry, other) * PAGE_SIZE + key % PAGE_SIZE
    return tl.load(x + head.to(tl.int64) * head_stride + (row * HEAD_DIM + column))


@triton.jit
def _attend_fixed(
    queries, k, v, head, k_head_stride, v_head_stride, entries, begin, stop, last, first_page, top, weight, found,
    scale_log2,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGES: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pages of entries number [begin, stop), PAGES an iteration: sums of exp2(score - top) and of their values."""
    entry = tl.load(entries + tl.minimum(begin, last))  # always an iteration ahead of the loads that need it
    other = tl.load(entries + tl.minimum(begin + 1, last))
    for at in range(begin, stop, PAGES):
        page, second = entry - first_page, other - first_page
        entry = tl.load(entries + tl.minimum(at + PAGES, last))
        if PAGES == 2:
            other = tl.load(entries + tl.minimum(at + 3, last))
            keys = _two_pages(k, head, k_head_stride, page, second, PAGE_SIZE, HEAD_DIM)
            values = _two_pages(v, head, v_head_stride, page, second, PAGE_SIZE, HEAD_DIM)
        else:
            keys = load_page(k, head, k_head_stride, page, PAGE_SIZE, HEAD_DIM, DESCRIBED)
            values = load_page(v, head, v_head_stride, page, PAGE_SIZE, HEAD_DIM, DESCRIBED)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(products * scale_log2 - top[:, None])
        weight += tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, found, input_precision=PRECISION)
    return weight, found


@triton.jit
def _attend(
    queries, k, v, head, k_head_stride, v_head_stride, entries, begin, stop, last, first_page, scale_log2,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same relative to the largest score so far: (top, weight, found)."""
    top = tl.full([BLOCK_M], -1e38, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    entry = tl.load(entries + begin)
    for at in range(begin, stop):
        page = entry - first_page
        entry = tl.load(entries + tl.minimum(at + 1, last))
        keys = load_page(k, head, k_head_stride, page, PAGE_SIZE, HEAD_DIM, DESCRIBED)
        values = load_page(v, head, v_head_stride, page, PAGE_SIZE, HEAD_DIM, DESCRIBED)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(products, 1) * scale_log2)
        weights = tl.exp2(products * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, found * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, weight, found


# one compilation for all pieces and chunks of a sequence
@triton.jit(do_not_specialize=["num_tokens", "first_page", "pages"])
def attend_tiles_kernel(
    q, k, v, lists, counts, total, lse,
    q_head_stride, q_group_stride, q_token_stride, k_head_stride, v_head_stride,
    list_head_stride, list_group_stride, list_tile_stride, count_head_stride, count_group_stride, count_tile_stride,
    total_head_stride, total_group_stride, total_token_stride, lse_head_stride, lse_group_stride, lse_token_stride,
    num_tokens, first_page, pages, scale_log2,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PAGES: tl.constexpr,
    DESCRIBED: tl.constexpr, LIMIT: tl.constexpr, SEARCHED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (part of a tile, query head of the group, KV head). LIMIT: sum of a row's weights up to which they may be
    relative to what was found before; 0: never."""
    PARTS: tl.constexpr = TILE // BLOCK_M
    tile = (tl.program_id(0) // PARTS).to(tl.int64)
    member, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lists += head * list_head_stride + member * list_group_stride + tile * list_tile_stride
    count = tl.load(counts + head * count_head_stride + member * count_group_stride + tile * count_tile_stride)
    begin = _first_of(lists, count, first_page, SEARCHED)
    stop = _first_of(lists, count, first_page + pages, SEARCHED)
    if begin == stop:
        return

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_tokens
    token = tl.minimum(row, num_tokens - 1).to(tl.int64)
    lse_at = lse + head * lse_head_stride + member * lse_group_stride + token * lse_token_stride
    before = tl.load(lse_at) * 1.4426950408889634
    there = before > float("-inf")  # NaN is empty as well
    column = tl.arange(0, HEAD_DIM)[None, :]
    queries = tl.load(q + head * q_head_stride + member * q_group_stride + (token * q_token_stride)[:, None] + column)

    kv_head, last = tl.program_id(2), stop - 1
    if LIMIT > 0:
        # Weights relative to the attention found before ask for no maximum, and nothing ever shrinks.
        top = tl.where(there, before, 0.0)
        weight = tl.zeros([BLOCK_M], tl.float32)
        found = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        fixed_stop = tl.where(tl.min(there.to(tl.int32)) == 1, stop, begin)
        single = begin
        if PAGES == 2:
            single += (fixed_stop - begin) // 2 * 2
            weight, found = _attend_fixed(
                queries, k, v, kv_head, k_head_stride, v_head_stride, lists, begin, single, last, first_page,
                top, weight, found, scale_log2,
                HEAD_DIM, PAGE_SIZE, 2, DESCRIBED, PRECISION,
            )  # fmt: skip
        weight, found = _attend_fixed(
            queries, k, v, kv_head, k_head_stride, v_head_stride, lists, single, fixed_stop, last, first_page,
            top, weight, found, scale_log2,
            HEAD_DIM, PAGE_SIZE, 1, DESCRIBED, PRECISION,
        )  # fmt: skip
        fits = tl.min((weight < LIMIT).to(tl.int32)) == 1  # NaN does not
        if (fixed_stop == begin) | (not fits):
            top, weight, found = _attend(
                queries, k, v, kv_head, k_head_stride, v_head_stride, lists, begin, stop, last, first_page, scale_log2,
                BLOCK_M, HEAD_DIM, PAGE_SIZE, DESCRIBED, PRECISION,
            )  # fmt: skip
    else:
        top, weight, found = _attend(
            queries, k, v, kv_head, k_head_stride, v_head_stride, lists, begin, stop, last, first_page, scale_log2,
            BLOCK_M, HEAD_DIM, PAGE_SIZE, DESCRIBED, PRECISION,
        )  # fmt: skip

    before = tl.where(there, before, float("-inf"))
    found_lse = top + tl.log2(weight)  # -inf where it is nothing beside what was found before
    highest = tl.maximum(before, found_lse)
    both = tl.exp2(before - highest) + tl.exp2(found_lse - highest)
    total += head * total_head_stride + member * total_group_stride
    total_at = total + (token * total_token_stride)[:, None] + column
    old = tl.load(total_at, mask=there[:, None], other=0.0)
    merged = found * (tl.exp2(top - highest) / both)[:, None] + old * (tl.exp2(before - highest) / both)[:, None]
    tl.store(total_at, merged, mask=inside[:, None])
    tl.store(lse_at, (highest + tl.log2(both)) * 0.6931471805599453, mask=inside)


def attend_tiles_(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, first_page: int, total: Tensor, lse: Tensor,
    softmax_scale: float, page_size: int = GPU_PAGE_SIZE, config: AttendConfig | None = None,
) -> None:  # fmt: skip
    """`tile_attention.attend_tiles_reference`: same arguments, same result up to rounding.

    Args:
        k, v: as `tile_page.check_piece` asks.
        page_size: GPU_PAGE_SIZE.
        config: how to cut the work (None: `default_config`).

    Raises:
        ConfigError: head_dim other than 64 and 128, or another page_size.
    """
    check_attend_tiles(q, k, v, lists, counts, first_page, total, lse, page_size)
    check_served(q.shape[3], page_size)
    heads, group, tokens, dim = q.shape
    pages = k.shape[1] // page_size
    assert softmax_scale > 0, softmax_scale  # the largest score is taken before scaling
    assert lists.shape[3] <= _SEARCHED**2, lists.shape
    for x in (k, v):
        check_piece(x)
    if min(heads, group, tokens, pages, lists.shape[3]) == 0:
        return
    config = config or default_config(q)
    described = config.described and config.pages == 1
    of_k, of_v = (page_descriptor(x, page_size) for x in (k, v)) if described else (k, v)
    attend_tiles_kernel[(triton.cdiv(tokens, config.block_m), group, heads)](
        q, of_k, of_v, lists, counts, total, lse,
        *q.stride()[:3], k.stride(0), v.stride(0), *lists.stride()[:3], *counts.stride(), *total.stride()[:3],
        *lse.stride(), tokens, first_page, pages, softmax_scale * math.log2(math.e),
        HEAD_DIM=dim, PAGE_SIZE=page_size, BLOCK_M=config.block_m, TILE=TILE, PAGES=config.pages, DESCRIBED=described,
        LIMIT=_LIMIT[q.dtype], SEARCHED=_SEARCHED, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
