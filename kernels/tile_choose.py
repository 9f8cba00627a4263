"""Which pages each tile reads, in Triton: a threshold by bisection, no sort, and no more memory than the scores.

A program serves a tile. It passes over the tile's scores for their maximum, for their sum, for every step of the
bisection and to write the list; a million tokens are 31 KB of scores for each row, which stay in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.tile_attention import HIGHEST, LOWEST, STEPS, check_choose_tiles

_SCORES_AT_ONCE = 2048


@triton.jit
def _powers(scores, row_stride, first, stop, R: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [R, BLOCK]: scores of entries first ... as logarithms to base 2, -inf from `stop` on."""
    entry = first + tl.arange(0, BLOCK)[None, :]
    at = scores + tl.arange(0, R)[:, None].to(tl.int64) * row_stride + entry
    return tl.load(at, mask=entry < stop, other=float("-inf")).to(tl.float32) * 1.4426950408889634


@triton.jit
def _shares(scores, row_stride, total, first, stop, R: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK]: shares of entries first ..., 0 from `stop` on."""
    return tl.sum(tl.exp2(_powers(scores, row_stride, first, stop, R, BLOCK) - total[:, None]), 0) * (1.0 / R)


@triton.jit
def _above(scores, row_stride, total, threshold, stop, R: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr):
    """How many of entries [0, stop) reach the threshold, and the sum of the others' shares."""
    count, missing = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, stop, BLOCK):
        share = _shares(scores, row_stride, total, first, stop, R, BLOCK)
        above = (tl.maximum(share, SMALLEST) >= threshold) & (first + tl.arange(0, BLOCK) < stop)
        count += above.to(tl.int32)
        missing += tl.where(above, 0.0, share)
    return tl.sum(count), tl.sum(missing)


# one compilation for all chunks of a sequence
@triton.jit(do_not_specialize=["entries", "held", "floor", "cap", "score_row_stride", "score_tile_stride"])
def choose_tiles_kernel(
    scores, own_lse, left, lists, counts, missed, score_tile_stride, score_row_stride, list_stride,
    entries, held, floor, cap,
    R: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program: a tile. held: newest entries that are chosen whatever they are worth; floor and cap: beside them."""
    SMALLEST: tl.constexpr = 2.0**LOWEST
    tile = tl.program_id(0).to(tl.int64)
    scores += tile * score_tile_stride
    lists += tile * list_stride
    own = tl.load(own_lse + tile * R + tl.arange(0, R)) * 1.4426950408889634
    allowed = tl.load(left + tile)
    others = entries - held

    top = tl.full([R, BLOCK], float("-inf"), tl.float32)
    for first in range(0, entries, BLOCK):
        top = tl.maximum(top, _powers(scores, score_row_stride, first, entries, R, BLOCK))
    highest = tl.maximum(tl.max(top, 1), own)
    total = tl.zeros([R, BLOCK], tl.float32)
    for first in range(0, entries, BLOCK):
        total += tl.exp2(_powers(scores, score_row_stride, first, entries, R, BLOCK) - highest[:, None])
    total = highest + tl.log2(tl.sum(total, 1) + tl.exp2(own - highest))

    low = tl.full([], LOWEST, tl.float32)
    width = tl.full([], HIGHEST - LOWEST, tl.float32)
    for _ in range(STEPS):
        width *= 0.5
        count, missing = _above(
            scores, score_row_stride, total, tl.exp2(low + width), others, R, BLOCK, SMALLEST
        )  # fmt: skip
        low = tl.where((count >= cap) | ((missing < allowed) & (count >= floor)), low + width, low)
    low_share, high_share = tl.exp2(low), tl.exp2(low + width)
    count, missing = _above(scores, score_row_stride, total, high_share, others, R, BLOCK, SMALLEST)
    reaching, _ = _above(scores, score_row_stride, total, low_share, others, R, BLOCK, SMALLEST)
    cut = reaching - tl.where(missing < allowed, tl.maximum(floor, 0), cap)  # ties, from the front

    written, ties = 0, 0
    missing = tl.zeros([BLOCK], tl.float32)
    for first in range(0, entries, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        share = _shares(scores, score_row_stride, total, first, others, R, BLOCK)
        reached = tl.maximum(share, SMALLEST)
        above = (reached >= high_share) & (entry < others)
        tied = (reached >= low_share) & (entry < others) & (reached < high_share)
        rank = ties + tl.cumsum(tied.to(tl.int32), 0)
        chosen = above | (tied & (rank > cut)) | ((entry >= others) & (entry < entries))
        place = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(lists + place, entry, mask=chosen)
        missing += tl.where(chosen, 0.0, share)
        written += tl.sum(chosen.to(tl.int32))
        ties += tl.sum(tied.to(tl.int32))
    tl.store(counts + tile, written)
    tl.store(missed + tile, tl.sum(missing))


def choose_tiles(
    scores: Tensor, own_lse: Tensor, left: Tensor, floor: int, cap: int, newest: int, lists: Tensor, counts: Tensor,
    missed: Tensor, num_warps: int = 4,
) -> None:  # fmt: skip
    """`tile_attention.choose_tiles_reference`: same arguments, same choice but where rounding makes or breaks a tie.

    Args:
        scores: R, rows of a tile, is a power of two up to 8.
        num_warps: warps that share a tile.
    """
    check_choose_tiles(scores, own_lse, left, floor, cap, newest, lists, counts, missed)
    tiles, rows, entries = scores.shape
    assert rows in (1, 2, 4, 8), rows
    if tiles == 0:
        return
    held = min(newest, entries)
    choose_tiles_kernel[(tiles,)](
        scores, own_lse, left, lists, counts, missed, *scores.stride()[:2], lists.stride(0),
        entries, held, min(floor, entries) - held, min(cap, entries) - held,
        R=rows, BLOCK=_SCORES_AT_ONCE // rows, LOWEST=LOWEST, HIGHEST=HIGHEST, STEPS=STEPS, num_warps=num_warps,
    )  # fmt: skip
