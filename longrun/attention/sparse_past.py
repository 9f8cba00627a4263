"""The past's pages as a long document's chunk reads them: every tile of its queries chooses its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longrun.attention.tile_levels import TileLevels
from longrun.kernels.dense_attention import merge_partial
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.prefill_spec import TILE
from longrun.specs.tile_batches import TileBatches

DENSE_EVERY = 4  # tiles; the middle query of one of so many attends to everything, of every one where that corrects it

Pieces = Callable[[slice, bool], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class TileKernels:
    """What choosing and reading are made of: `score_tiles`, `choose_tiles` and `attend_tiles_` as in
    `longrun.kernels.tile_attention`, `dense_attention` as in `longrun.kernels.dense_attention`."""

    score_tiles: Callable[..., None]
    choose_tiles: Callable[..., None]
    attend_tiles_: Callable[..., None]
    dense_attention: Callable[..., tuple[Tensor, Tensor]]


class SparsePast:
    """Attention of a chunk to pages of the past (docs/sparse-prefill.md).

    A *tile* is 128 consecutive queries of one query head. Means of its queries stand for it: pages are scored by their
    keys against these, and the tile reads as few pages as leave a given share of its attention to others. The pages
    pass by twice, once for the scores and once to be read. Everything is allocated here; nothing waits for the device.

    Args:
        spec: with `prefill` set.
        page_size: tokens of a page.

    Attributes:
        prefill: which pages are read.
        levels: the shares of attention that may be left, and counts.
    """

    def __init__(self, spec: AttentionSpec, page_size: int, device: torch.device, kernels: TileKernels) -> None:
        assert spec.prefill is not None and spec.max_retrieval_heads
        self.prefill, self._kernels = spec.prefill, kernels
        self._page_size, self._softmax_scale = page_size, spec.head_dim**-0.5
        self.levels = TileLevels(spec.prefill.mass, spec.num_layers, spec.num_qo_heads, device)
        size = spec.sparse_bytes() - self.levels.nbytes
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device).fill_(0)

    @property
    def nbytes(self) -> int:
        return self._workspace.nbytes + self.levels.nbytes

    def attend_(
        self, layer_idx: int, first_head: int, q: Tensor, total: Tensor, lse: Tensor, pages: int, pieces: Pieces
    ) -> None:
        """Continue a chunk's softmax with the pages that its tiles choose.

        Args:
            layer_idx: layer; first_head: of its query heads, the first of `q`.
            q: [num_kv_heads, group, n, head_dim], any strides with contiguous channels.
            total: float32, shape of q, likewise; lse: float32 [num_kv_heads, group, n]: attention to everything but the
                pages, normalised, and its log-sum-exp, finite. Both are overwritten.
            pages: of the past, at least 1, each of them for all heads.
            pieces: keys and values of a slice of the KV heads, [heads, tokens, head_dim], whole pages, the newest last,
                or with True behind the slice keys and anything; each call begins anew, and a piece is used up before
                the next is asked for.
        """
        num_heads, group = q.shape[:2]
        batches = TileBatches(self.prefill, num_heads, group, q.shape[2], pages)
        heads_at_once, tiles_at_once = batches.sizes(self._workspace.numel())
        read = torch.zeros(num_heads, group, dtype=torch.int64, device=q.device)
        caught, rows = lse.new_zeros(num_heads, group), 0
        stride = TILE if self.prefill.correct else DENSE_EVERY * TILE
        left = self.levels.left[layer_idx, first_head : first_head + num_heads * group].view(num_heads, group)
        for head in range(0, num_heads, heads_at_once):
            part = slice(head, min(head + heads_at_once, num_heads))
            rows = 0
            for tile in range(0, batches.tiles, tiles_at_once):
                queries = slice(tile * TILE, (tile + tiles_at_once) * TILE)
                at = part, slice(None), queries
                lists, counts = self._choose(q[at], lse[at], left[part], pages, pieces(part, True))
                asked = slice((TILE // 2 - queries.start) % stride, None, stride)
                shares = self._read(q[at], total[at], lse[at], lists, counts, asked, pieces(part, False))
                read[part] += counts.sum(dim=2)
                caught[part] += shares.sum(dim=2)
                rows += shares.shape[2]
        heads = slice(first_head, first_head + num_heads * group)
        self.levels.add(layer_idx, heads, read.flatten(), batches.tiles * pages, caught.flatten(), rows)

    def _choose(
        self, q: Tensor, lse: Tensor, left: Tensor, pages: int, pieces: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Entries that each tile reads of the pages in the order of `pieces`: int32 [num_kv_heads, group, tiles, n],
        and their number, int32 [num_kv_heads, group, tiles]."""
        spec, (num_heads, group, tokens) = self.prefill, q.shape[:3]
        batch = TileBatches(spec, num_heads, group, tokens, pages)
        shape = (num_heads, group, batch.tiles)
        scores, lists = self._cut(batch)
        rows = tile_means(q, spec.rows).flatten(1, 3)
        own_lse = tile_means(lse[..., None], spec.rows).view(-1, spec.rows)
        at = 0
        for k, _ in pieces:
            self._kernels.score_tiles(rows, k, scores, at, self._softmax_scale, page_size=self._page_size)
            at += k.shape[1] // self._page_size
        assert at == pages, (at, pages)
        counts = torch.empty(shape, dtype=torch.int32, device=q.device)
        missed = lse.new_empty(counts.numel())
        self._kernels.choose_tiles(
            scores.view(len(missed), spec.rows, -1), own_lse, left[..., None].expand(shape).flatten(),
            spec.least_pages(pages), spec.most_pages(pages), min(spec.newest, pages), lists.view(len(missed), -1),
            counts.view(-1), missed,
        )  # fmt: skip
        return lists, counts

    def _cut(self, batch: TileBatches) -> tuple[Tensor, Tensor]:
        """The workspace as float16 scores [num_kv_heads, group * tiles * rows, pages] and int32 lists [num_kv_heads,
        group, tiles, n]."""
        tiles = batch.num_heads * batch.group * batch.tiles
        of_scores = 2 * tiles * batch.spec.rows * batch.row_pages
        of_lists = 4 * tiles * batch.list_pages
        scores = self._workspace[:of_scores].view(torch.float16).view(batch.num_heads, -1, batch.row_pages)
        lists = self._workspace[of_scores : of_scores + of_lists].view(torch.int32)
        return scores[..., : batch.pages], lists.view(batch.num_heads, batch.group, batch.tiles, -1)

    def _read(
        self, q: Tensor, total: Tensor, lse: Tensor, lists: Tensor, counts: Tensor, asked: slice,
        pieces: Iterator[tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        """Attend to the listed pages; of the queries `asked`, attend to all, and give the share of their attention that
        was caught: float32 [num_kv_heads, group, rows]. Their results correct their tiles where the spec wants it."""
        of_dense = q[:, :, asked]
        packed, dense_lse = of_dense.flatten(1, 2).contiguous(), lse[:, :, asked].clone()
        dense = total[:, :, asked].clone() if self.prefill.correct else None
        at = 0
        for k, v in pieces:
            self._kernels.attend_tiles_(
                q, k, v, lists, counts, at, total, lse, self._softmax_scale, page_size=self._page_size
            )
            if packed.shape[1]:
                found, found_lse = self._kernels.dense_attention(packed, k, v, False, self._softmax_scale)
                found_lse = found_lse.view(dense_lse.shape)
                if dense is None:
                    dense_lse = torch.logaddexp(dense_lse, found_lse)
                else:
                    dense, dense_lse = merge_partial(dense, dense_lse, found.view(dense.shape).float(), found_lse)
            at += k.shape[1] // self._page_size
        if dense is not None:
            correct_tiles_(total, dense)
        return (lse[:, :, asked] - dense_lse).clamp_(max=0).exp_()


def correct_tiles_(total: Tensor, dense: Tensor) -> None:
    """Add to every tile what its middle row differs by from attention to everything (arXiv 2505.11254).

    Args:
        total: float32 [num_kv_heads, group, n, head_dim], of tiles from the first query on, overwritten. A last tile
            without a middle row stays as it is.
        dense: float32 [num_kv_heads, group, rows, head_dim], of the middle rows.
    """
    errors = dense - total[:, :, TILE // 2 :: TILE]
    whole = total.shape[2] // TILE
    total[:, :, : whole * TILE].unflatten(2, (whole, TILE)).add_(errors[:, :, :whole, None])
    if errors.shape[2] > whole:
        total[:, :, whole * TILE :].add_(errors[:, :, whole:])


def tile_means(x: Tensor, count: int) -> Tensor:
    """Means of `count` equal parts of every tile.

    Args:
        x: [..., n, width]. The last tile may be shorter: its parts are about equal, and of less than `count` tokens
            some stand in several parts.

    Returns:
        [..., tiles, count, width], dtype of x.
    """
    whole = x.shape[-2] // TILE * TILE
    found = x[..., :whole, :].unflatten(-2, (-1, count, TILE // count)).mean(-2)
    rest = x[..., whole:, :]
    tokens = rest.shape[-2]
    if not tokens:
        return found
    begins = [tokens * i // count for i in range(count + 1)]
    parts = [rest[..., a : max(b, a + 1), :].mean(-2) for a, b in pairwise(begins)]
    return torch.cat((found, torch.stack(parts, dim=-2)[..., None, :, :]), dim=-3)
