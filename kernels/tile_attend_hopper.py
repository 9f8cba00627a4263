"""Attention of tiles to the pages on their lists on Hopper, in Triton's Gluon: products of the next page beside the
softmax of this one.

`tile_attend` says what is computed, and takes over the tiles that this kernel leaves. What differs is the order of
work, as in FlashAttention-3 (Shah et al., arXiv:2407.08608): while the softmax of a page runs, the tensor cores compute
the next page's scores and the values of the page before, and pages arrive by the copy unit STAGES ahead, keys and
values each as soon as their place is free.
"""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longrun.kernels.tile_attention import TILE
from longrun.kernels.tile_page import rows_of_heads

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name until Triton 3.6
_SEARCHED = 1024


@gluon.jit
def _first_of(entries, count, wanted, SEARCHED: gl.constexpr):
    """As in `tile_attend`."""
    layout: gl.constexpr = gl.BlockedLayout([SEARCHED // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    at = gl.arange(0, SEARCHED, layout=layout)
    step = (count + SEARCHED - 1) // SEARCHED
    coarse = gl.load(entries + at * step, mask=at * step < count, other=2147483647)
    begin = gl.maximum(gl.sum((coarse < wanted).to(gl.int32), 0) - 1, 0) * step
    fine = gl.load(entries + begin + at, mask=(at < step) & (begin + at < count), other=2147483647)
    return begin + gl.sum((fine < wanted).to(gl.int32), 0)


@gluon.jit
def _copy(pages, row, places, bars, number, wanted, STAGES: gl.constexpr):
    """Page number `number` of the loop, from row `row` on, to its place; nothing unless it is wanted."""
    stage = number % STAGES
    mbarrier.expect(bars.index(stage), pages.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(pages, [row, 0], bars.index(stage), places.index(stage), pred=wanted)


@gluon.jit
def attend_tiles_kernel(
    q, k, v, lists, counts, total, lse, undone,
    q_head_stride, q_group_stride, q_token_stride, k_head_rows, v_head_rows,
    list_head_stride, list_group_stride, list_tile_stride, count_head_stride, count_group_stride, count_tile_stride,
    total_head_stride, total_group_stride, total_token_stride, lse_head_stride, lse_group_stride, lse_token_stride,
    num_tokens, first_page, pages, scale_log2,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TILE: gl.constexpr, LIMIT: gl.constexpr, SEARCHED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Program (tile, query head of the group, KV head). k, v: descriptors of pages, all heads one behind the other,
    k_head_rows and v_head_rows apart. undone: int8, set to 1 for tiles whose weights are not below LIMIT or that have
    no attention before; nothing else of them is written."""
    num_warps: gl.constexpr = gl.num_warps()
    of_products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PAGE_SIZE, 16])
    of_found: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD_DIM, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_found, 2)
    of_queries: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = k.dtype

    tile = gl.program_id(0).to(gl.int64)
    member, head = gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64)
    lists += head * list_head_stride + member * list_group_stride + tile * list_tile_stride
    count_at = head * count_head_stride + member * count_group_stride + tile * count_tile_stride
    count = gl.load(counts + count_at)
    begin = _first_of(lists, count, first_page, SEARCHED)
    stop = _first_of(lists, count, first_page + pages, SEARCHED)
    num = stop - begin
    if num == 0:
        return
    lists += begin
    k_row = gl.program_id(2) * k_head_rows - first_page * PAGE_SIZE
    v_row = gl.program_id(2) * v_head_rows - first_page * PAGE_SIZE

    k_places = gl.allocate_shared_memory(dtype, [STAGES, PAGE_SIZE, HEAD_DIM], k.layout)
    v_places = gl.allocate_shared_memory(dtype, [STAGES, PAGE_SIZE, HEAD_DIM], v.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(stage), count=1)
        mbarrier.init(v_bars.index(stage), count=1)
    _barrier()
    for stage in gl.static_range(STAGES):
        row = gl.load(lists + gl.minimum(stage, num - 1)) * PAGE_SIZE
        _copy(k, k_row + row, k_places, k_bars, stage, stage < num, STAGES)
        _copy(v, v_row + row, v_places, v_bars, stage, stage < num, STAGES)

    token = gl.program_id(0) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, of_queries))
    from_token = gl.minimum(token, num_tokens - 1).to(gl.int64) * q_token_stride
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, of_queries))
    q += head * q_head_stride + member * q_group_stride
    queries = gl.allocate_shared_memory(dtype, [TILE, HEAD_DIM], k.layout)
    queries.store(gl.load(q + from_token[:, None] + column[None, :]))
    hopper.fence_async_shared()
    _barrier()

    row = gl.program_id(0) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, of_products))
    lse += head * lse_head_stride + member * lse_group_stride
    lse_at = lse + gl.minimum(row, num_tokens - 1).to(gl.int64) * lse_token_stride
    before = gl.load(lse_at) * 1.4426950408889634
    there = before > float("-inf")  # not of NaN
    top = gl.where(there, before, 0.0)
    weight = gl.zeros([TILE], gl.float32, layout=gl.SliceLayout(1, of_products))
    nothing = gl.zeros([TILE, PAGE_SIZE], gl.float32, layout=of_products)
    found = hopper.warpgroup_mma_init(gl.zeros([TILE, HEAD_DIM], gl.float32, layout=of_found))

    mbarrier.wait(k_bars.index(0), 0)
    keys = k_places.index(0).permute((1, 0))
    following = hopper.warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    products = hopper.warpgroup_mma_wait(0, deps=[following])
    _barrier()
    for_k = gl.load(lists + gl.minimum(STAGES, num - 1))  # entries whose keys, and values, are copied next
    for_v = gl.load(lists + gl.minimum(STAGES - 1, num - 1))
    _copy(k, k_row + for_k * PAGE_SIZE, k_places, k_bars, STAGES, num > STAGES, STAGES)
    then = for_k
    for_k = gl.load(lists + gl.minimum(STAGES + 1, num - 1))
    for at in range(num - 1):
        mbarrier.wait(k_bars.index((at + 1) % STAGES), ((at + 1) // STAGES) & 1)
        keys = k_places.index((at + 1) % STAGES).permute((1, 0))
        following = hopper.warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
        weights = gl.exp2(products * scale_log2 - top[:, None])
        weight += gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(dtype), of_weights)
        mbarrier.wait(v_bars.index(at % STAGES), (at // STAGES) & 1)
        found = hopper.warpgroup_mma(weights, v_places.index(at % STAGES), found, is_async=True)
        # All but the last are complete: the next scores, and the values of the page before this one.
        products = hopper.warpgroup_mma_wait(1, deps=[following])
        _barrier()
        next_k, next_v = at + 1 + STAGES, at - 1 + STAGES
        _copy(k, k_row + for_k * PAGE_SIZE, k_places, k_bars, next_k, next_k < num, STAGES)
        _copy(v, v_row + for_v * PAGE_SIZE, v_places, v_bars, next_v, (at > 0) & (next_v < num), STAGES)
        for_v, then = then, for_k
        for_k = gl.load(lists + gl.minimum(next_k + 1, num - 1))
    last = num - 1
    weights = gl.exp2(products * scale_log2 - top[:, None])
    weight += gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(dtype), of_weights)
    mbarrier.wait(v_bars.index(last % STAGES), (last // STAGES) & 1)
    found = hopper.warpgroup_mma(weights, v_places.index(last % STAGES), found, is_async=True)
    found = hopper.warpgroup_mma_wait(0, deps=[found])

    if gl.min((there & (weight < LIMIT)).to(gl.int32), 0) == 0:  # so with NaN
        gl.store(undone + count_at, gl.full([], 1, gl.int8))
    else:
        found_lse = top + gl.log2(weight)
        highest = gl.maximum(before, found_lse)
        both = gl.exp2(before - highest) + gl.exp2(found_lse - highest)
        gl.store(lse_at, (highest + gl.log2(both)) * 0.6931471805599453, mask=row < num_tokens)
        of_new = gl.convert_layout(gl.exp2(top - highest) / both, gl.SliceLayout(1, of_found))
        of_old = gl.convert_layout(gl.exp2(before - highest) / both, gl.SliceLayout(1, of_found))
        to_row = gl.program_id(0) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, of_found))
        to_token = gl.minimum(to_row, num_tokens - 1).to(gl.int64) * total_token_stride
        to_column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, of_found))
        total_at = (
            total + head * total_head_stride + member * total_group_stride + to_token[:, None] + to_column[None, :]
        )
        merged = found * of_new[:, None] + gl.load(total_at) * of_old[:, None]
        gl.store(total_at, merged, mask=(to_row < num_tokens)[:, None])


def attend_tiles_overlapped(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, first_page: int, total: Tensor, lse: Tensor,
    undone: Tensor, softmax_scale: float, page_size: int, limit: float, num_warps: int, num_stages: int,
) -> None:  # fmt: skip
    """`tile_attend.attend_tiles_` for bfloat16 and shapes that it has checked, but for some tiles.

    Args:
        undone: int8, shape of `counts` and contiguous as those are, zeros: set to 1 where a tile is left to be done,
            because weights relative to what was found before reach `limit`, or nothing was found before.
        num_warps: 4 or 8; num_stages: pages of keys, and of values, that are copied ahead, at least 2.
    """
    heads, group, tokens, dim = q.shape
    assert counts.is_contiguous() and undone.is_contiguous() and undone.shape == counts.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    of_k, of_v = (
        TensorDescriptor(x, [rows_of_heads(x), dim], [dim, 1], [page_size, dim], layout) for x in (k, v)
    )  # fmt: skip
    attend_tiles_kernel[(counts.shape[2], group, heads)](
        q, of_k, of_v, lists, counts, total, lse, undone,
        *q.stride()[:3], k.stride(0) // dim, v.stride(0) // dim, *lists.stride()[:3], *counts.stride(),
        *total.stride()[:3], *lse.stride(), tokens, first_page, k.shape[1] // page_size,
        softmax_scale * math.log2(math.e),
        HEAD_DIM=dim, PAGE_SIZE=page_size, TILE=TILE, LIMIT=limit, SEARCHED=_SEARCHED, STAGES=num_stages,
        num_warps=num_warps,
    )  # fmt: skip
