"""Attention of tiles to listed pages on the CPU: a tile's pages are gathered, then torch's fused kernel reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.kernels.dense_attention import attention_with_lse
from longrun.kernels.tile_attention import TILE, check_attend_tiles, merge_found_
from longrun.quant.kv_format import GPU_PAGE_SIZE


def attend_tiles_(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, first_page: int, total: Tensor, lse: Tensor,
    softmax_scale: float, page_size: int = GPU_PAGE_SIZE,
) -> None:  # fmt: skip
    """`tile_attention.attend_tiles_reference`: same arguments, same result up to rounding (what a tile finds in a piece
    is rounded to q's dtype). Lists are read by the host."""
    pages = check_attend_tiles(q, k, v, lists, counts, first_page, total, lse, page_size)
    piece = torch.tensor((first_page, first_page + pages), dtype=torch.int32)
    for head in range(q.shape[0]):
        by_page = [x[head].unflatten(0, (-1, page_size)) for x in (k, v)]
        for member, of_tiles in enumerate(counts[head].tolist()):
            for tile, count in enumerate(of_tiles):
                entries = lists[head, member, tile, :count]
                begin, stop = torch.searchsorted(entries, piece).tolist()
                if begin == stop:
                    continue
                chosen = entries[begin:stop] - first_page
                keys, values = (x.index_select(0, chosen).flatten(0, 1)[None] for x in by_page)
                part = slice(tile * TILE, (tile + 1) * TILE)
                found, found_lse = attention_with_lse(q[head, member, part][None], keys, values, False, softmax_scale)
                merge_found_(total[head, member, part], lse[head, member, part], found[0].float(), found_lse[0])
