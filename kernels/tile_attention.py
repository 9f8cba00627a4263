"""Sparse prefill over pages, in torch: what every page is worth to a tile, which pages a tile reads, and reading them.

A *tile* is TILE consecutive queries of one query head. Some vectors stand for it, its *rows*: means of its queries,
which find a tile's pages about as well as a perfect choice does (docs/sparse-prefill.md). The past's pages are counted
in the order in which they are read: *entries* 0, 1, ..., the same for every head. They pass by twice, in pieces: once
to be scored, then each tile reads the entries on its list and continues its softmax.

The GPU's kernels with these signatures are `tile_score`, `tile_choose` and `tile_attend`; these serve any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrun.quant.kv_format import GPU_PAGE_SIZE

TILE = 128
LOWEST, HIGHEST, STEPS = -31.0, 1.0, 14
"""Thresholds of a choice: logarithms to base 2 of a page's share of all attention, from LOWEST to HIGHEST, which no
share reaches, found by STEPS halvings. Shares closer than 2^-9 there (0.14%) are ties; so are all below 2^LOWEST."""
_SCORES_AT_ONCE = 2**24  # bounds the products and shares that the references hold


def check_score_tiles(rows: Tensor, k: Tensor, scores: Tensor, first_page: int, page_size: int) -> int:
    """Assert what `score_tiles` asks of its arguments; pages of the piece."""
    heads, num_rows, dim = rows.shape
    assert rows.dtype in (torch.bfloat16, torch.float16, torch.float32) and rows.stride(2) == k.stride(2) == 1
    assert k.shape[::2] == (heads, dim) and k.shape[1] % page_size == 0, (k.shape, rows.shape, page_size)
    pages = k.shape[1] // page_size
    assert scores.dtype == torch.float16 and scores.shape[:2] == (heads, num_rows) and scores.stride(2) == 1
    assert first_page >= 0 and first_page + pages <= scores.shape[2], (first_page, pages, scores.shape)
    return pages


def score_tiles_reference(
    rows: Tensor, k: Tensor, scores: Tensor, first_page: int, softmax_scale: float, page_size: int = GPU_PAGE_SIZE
) -> None:
    """Write what each page of a piece is worth to each row: the natural log-sum-exp of row . key * softmax_scale over
    the page's tokens, clamped to float16's range.

    Args:
        rows: bfloat16, float16 or float32 [num_kv_heads, n, head_dim], any strides with contiguous channels: the rows
            of all tiles and query heads of a KV head, in any order. Means of queries.
        k: [num_kv_heads, pages * page_size, head_dim], any strides with contiguous channels: entries first_page ...
        scores: float16 [num_kv_heads, n, P], contiguous along P; entries [first_page, first_page + pages) of every row
            are written.
        page_size: tokens of a page.
    """
    pages = check_score_tiles(rows, k, scores, first_page, page_size)
    limit = torch.finfo(torch.float16).max
    at_once = max(1, _SCORES_AT_ONCE // max(1, rows.shape[1] * page_size))
    for head in range(rows.shape[0]):
        scaled = rows[head].float() * softmax_scale
        for first in range(0, pages, at_once):
            stop = min(first + at_once, pages)
            products = scaled @ k[head, first * page_size : stop * page_size].float().T
            found = products.unflatten(1, (-1, page_size)).logsumexp(dim=2)
            scores[head, :, first_page + first : first_page + stop] = found.clamp(-limit, limit).half()


def check_choose_tiles(
    scores: Tensor, own_lse: Tensor, left: Tensor, floor: int, cap: int, newest: int, lists: Tensor, counts: Tensor,
    missed: Tensor,
) -> None:  # fmt: skip
    """Assert what `choose_tiles` asks of its arguments."""
    tiles, num_rows, entries = scores.shape
    assert scores.dtype == torch.float16 and scores.stride(2) == 1 and entries < 2**31
    assert own_lse.dtype == torch.float32 and own_lse.shape == (tiles, num_rows) and own_lse.is_contiguous()
    for x in (left, missed):
        assert x.dtype == torch.float32 and x.shape == (tiles,) and x.is_contiguous()
    assert counts.dtype == torch.int32 and counts.shape == (tiles,) and counts.is_contiguous()
    assert lists.dtype == torch.int32 and lists.shape[0] == tiles and lists.stride(1) == 1
    assert min(newest, entries) >= 0 and max(newest, floor) <= cap <= lists.shape[1], (newest, floor, cap, lists.shape)


def choose_tiles_reference(
    scores: Tensor, own_lse: Tensor, left: Tensor, floor: int, cap: int, newest: int, lists: Tensor, counts: Tensor,
    missed: Tensor,
) -> None:  # fmt: skip
    """Write the entries that each tile reads, ascending, and their number.

    An entry's *share* is the part of a tile's attention that falls on its page, by the mean over the tile's rows r:
    mean of exp(scores[t, r, p] - total[t, r]), with total[t, r] the log-sum-exp of own_lse[t, r] and of all scores of
    that row. The last `newest` entries are always chosen. Of the others, those of the largest shares: as few as leave
    less than left[t] to the others, but `floor` entries in all at least, and `cap` at most. With left[t] 0 that is
    every entry, up to the cap.

    The threshold comes from a bisection with a fixed number of steps (LOWEST, STEPS). Entries that it cannot tell
    apart are chosen together; where the cap has no room for all of them, or only the floor asks for any, the earliest
    are cut. The newest never are.

    Args:
        scores: float16 [T, R, P], contiguous along P. May be overwritten.
        own_lse: float32 [T, R], contiguous: the rows' log-sum-exp over everything but these entries, finite.
        left: float32 [T], contiguous, a share of all attention.
        floor, cap, newest: entries, max(newest, floor) <= cap; beyond P they mean P.
        lists: int32 [T, n], n at least `cap`, rows of contiguous items; what stands behind a tile's entries is left
            alone.
        counts: int32 [T], contiguous.
        missed: float32 [T], contiguous: sum of the shares of the entries that were not chosen.
    """
    check_choose_tiles(scores, own_lse, left, floor, cap, newest, lists, counts, missed)
    at_once = max(1, _SCORES_AT_ONCE // max(1, scores.shape[1] * scores.shape[2]))
    if len(scores) > at_once:
        for part in (slice(first, first + at_once) for first in range(0, len(scores), at_once)):
            choose_tiles_reference(
                scores[part], own_lse[part], left[part], floor, cap, newest, lists[part], counts[part], missed[part]
            )
        return
    entries, device = scores.shape[2], scores.device
    if entries == 0:
        counts.zero_()
        missed.zero_()
        return
    held = min(newest, entries)
    floor, cap = min(floor, entries) - held, min(cap, entries) - held
    total = torch.logaddexp(own_lse, scores.float().logsumexp(dim=2))
    shares = torch.exp2((scores.float() - total[..., None]) * math.log2(math.e)).mean(dim=1)
    others = shares[:, : entries - held]
    levelled = others.clamp(min=2.0**LOWEST)
    low, width = torch.full_like(left, LOWEST), HIGHEST - LOWEST
    for _ in range(STEPS):
        width /= 2
        above = levelled >= torch.exp2(low + width)[:, None]
        count, missing = above.sum(dim=1), others.where(~above, 0.0).sum(dim=1)
        low += width * ((count >= cap) | ((missing < left) & (count >= floor)))
    above = levelled >= torch.exp2(low + width)[:, None]
    tied = (levelled >= torch.exp2(low)[:, None]) & ~above
    wanted = torch.where(others.where(~above, 0.0).sum(dim=1) < left, max(floor, 0), cap)
    cut = (above.sum(dim=1) + tied.sum(dim=1) - wanted).clamp(min=0)
    chosen = torch.ones_like(shares, dtype=torch.bool)
    chosen[:, : entries - held] = above | (tied & (tied.cumsum(dim=1) > cut[:, None]))
    _write_lists(chosen, lists, counts, torch.arange(entries, dtype=torch.int32, device=device))
    missed.copy_(shares.where(~chosen, 0.0).sum(dim=1))


def _write_lists(chosen: Tensor, lists: Tensor, counts: Tensor, entries: Tensor) -> None:
    """The chosen entries of every tile in front of its list, without waiting for the device."""
    room = torch.cat((lists, lists.new_empty(len(lists), len(entries))), dim=1)
    behind = lists.shape[1] + torch.arange(len(entries), device=lists.device)
    room.scatter_(1, (chosen.cumsum(dim=1) - 1).where(chosen, behind), entries.expand(chosen.shape))
    lists.copy_(room[:, : lists.shape[1]])
    counts.copy_(chosen.sum(dim=1))


def check_attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, first_page: int, total: Tensor, lse: Tensor,
    page_size: int,
) -> int:  # fmt: skip
    """Assert what `attend_tiles_` asks of its arguments; pages of the piece."""
    heads, group, tokens, dim = q.shape
    assert q.dtype == k.dtype == v.dtype and q.stride(3) == k.stride(2) == v.stride(2) == 1
    assert k.shape == v.shape and k.shape[::2] == (heads, dim) and k.shape[1] % page_size == 0, (k.shape, v.shape)
    tiles = -(-tokens // TILE)
    assert lists.dtype == torch.int32 and lists.shape[:3] == (heads, group, tiles) and lists.stride(3) == 1
    assert counts.dtype == torch.int32 and counts.shape == (heads, group, tiles)
    assert total.dtype == lse.dtype == torch.float32 and total.shape == q.shape and lse.shape == q.shape[:3]
    assert total.stride(3) == 1 and first_page >= 0
    return k.shape[1] // page_size


def attend_tiles_reference(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, first_page: int, total: Tensor, lse: Tensor,
    softmax_scale: float, page_size: int = GPU_PAGE_SIZE,
) -> None:  # fmt: skip
    """Attend to the pages of a piece that stand on the tiles' lists, and merge the result into `total` and `lse`.

    Args:
        q: bfloat16, float16 or float32 [num_kv_heads, group, n_tokens, head_dim], any strides with contiguous
            channels. Queries [i * TILE, (i + 1) * TILE) of a head are its tile i; the last one may be shorter.
        k, v: [num_kv_heads, pages * page_size, head_dim], dtype of q, any strides with contiguous channels: entries
            [first_page, first_page + pages).
        lists: int32 [num_kv_heads, group, tiles, n], contiguous items: ascending entries. Those of other pieces are
            passed over.
        counts: int32 [num_kv_heads, group, tiles]: how many of a list are meant.
        total: float32, shape of q, any strides with contiguous channels; lse: float32 [num_kv_heads, group, n_tokens]:
            attention to other tokens, normalised, and its natural log-sum-exp (-inf or NaN: to none yet). Both are
            overwritten; a tile without an entry in the piece keeps its own.
        softmax_scale: scores are q . k * softmax_scale.
        page_size: tokens of a page.
    """
    pages = check_attend_tiles(q, k, v, lists, counts, first_page, total, lse, page_size)
    exact = torch.promote_types(q.dtype, torch.float32)
    for head, group, tile in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        entries = lists[head, group, tile, : counts[head, group, tile]].long() - first_page
        entries = entries[(entries >= 0) & (entries < pages)]
        if len(entries) == 0:
            continue
        keys, values = (x[head].unflatten(0, (-1, page_size))[entries].flatten(0, 1).to(exact) for x in (k, v))
        part = slice(tile * TILE, (tile + 1) * TILE)
        products = q[head, group, part].to(exact) @ keys.T * softmax_scale
        found_lse = products.logsumexp(dim=1)
        found = torch.exp(products - found_lse[:, None]) @ values
        merge_found_(total[head, group, part], lse[head, group, part], found.float(), found_lse.float())


def merge_found_(total: Tensor, lse: Tensor, found: Tensor, found_lse: Tensor) -> None:
    """`merge_partial.merge_partial_` into a side that may be empty; that file needs Triton."""
    seen = lse > float("-inf")  # NaN is empty as well
    before = lse.where(seen, float("-inf"))
    lse.copy_(torch.logaddexp(before, found_lse))
    total.copy_(total.mul(torch.exp(before - lse)[..., None]).where(seen[..., None], 0.0))
    total.add_(found.mul_(torch.exp(found_lse - lse)[..., None]))
