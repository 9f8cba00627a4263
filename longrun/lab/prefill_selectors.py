"""Estimates of how much attention a tile of queries gives to pages of the past while a document is read.

A *tile* is 128 consecutive queries of one query head; it stands in a chunk, and the past is what was read before that
chunk, in pages of 64 tokens. A selector puts a few vectors for the tile's queries against vectors for the past's
tokens. A page's score for one vector is the log-sum-exp over its tokens or groups, a group counting as often as it has
tokens; its *value* is the estimated share of the tile's attention,

    log mean_r exp(score[r, page] - total[r]),

total: the log-sum-exp over all pages, and for shares of all attention also over the tile's exact attention to its own
chunk, which is computed before the past's.

| selector | of the tile | of the past |
|---|---|---|
| means, means 4, means 1 | means of 32 queries | means of 16 keys, of 4 keys, keys |
| mean 1, halves 1 | the mean of the tile, means of 64 queries | keys |
| digest, digest 8 | the same, and means of their magnitudes | means and lam x half-ranges of 16 (8) keys, 4 bits |
| bands | the mean of the tile | means of a page; fast and slow rotary pairs apart (Prism, arXiv 2602.08426) |
| bands 16 | means of 32 queries | means of 16 keys, bands apart |
| outliers | means of 32 queries and the 4 queries least like the tile's mean (QUOKA) | means of 16 keys |
| sampled 16, sampled 4, sampled | every 16th query | as means; the last one is SampleAttention's, arXiv 2406.15486 |
| digest, means 1 | of the 30% of all heads' pages that get most by *digest*, again by *means 1* | |
| all 16, all digest | every query | as means, digest |
| diagonals S | S consecutive queries in reverse order, joined | S keys joined (XAttention, arXiv 2503.16428) |
| perfect | every query | keys |

The digest is that of selected decode (docs/selection.md). Bands follow Prism's code: of 128 channels 64 and 96, each
scaled back to the energy that it has before the split; the larger of a page's two values counts, which is their union.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.lab.selection import LayerKeys
from longrun.lab.selection_rules import PAGE, Index

TILE = 128
PERFECT = "perfect"
_ROWS = {"mean": 1, "halves": 2, "means": 4, "outliers": 4 + 4, "sampled": 8, "all": TILE}
_OUTLIERS = 4
_COARSE = 0.3  # of the pages, of a first stage
_BANDS = (0.5, 0.75)  # of the channels, fast and slow
_SCORE_BYTES = {"cpu": 2**27, "cuda": 6 * 2**30}


@dataclass(frozen=True)
class Selector:
    """What stands for a tile and for the past.

    Attributes:
        rows: "mean", "halves", "means", "outliers", "sampled", "all" or "joined".
        tokens: of the past that one vector stands for.
        kind: "mean", "digest" or "bands".
        coarse: selector of a first stage.
    """

    rows: str
    tokens: int
    kind: str = "mean"
    coarse: str = ""

    @property
    def num_rows(self) -> int:
        return TILE // self.tokens if self.rows == "joined" else _ROWS[self.rows]

    @property
    def cost(self) -> float:
        """Multiply-adds of the scores, of those of dense attention's."""
        if self.coarse:
            return SELECTORS[self.coarse].cost + _COARSE * self.num_rows / TILE
        rows = TILE if self.rows == "joined" else self.num_rows
        return {"mean": 1.0, "digest": 2.0, "bands": sum(_BANDS)}[self.kind] * rows / TILE / self.tokens


SELECTORS = {
    "means": Selector("means", 16), "means 4": Selector("means", 4), "means 1": Selector("means", 1),
    "halves 1": Selector("halves", 1), "mean 1": Selector("mean", 1), "digest": Selector("means", 16, "digest"),
    "digest 8": Selector("means", 8, "digest"), "digest, means 1": Selector("means", 1, coarse="digest"),
    "bands": Selector("mean", PAGE, "bands"), "bands 16": Selector("means", 16, "bands"),
    "outliers": Selector("outliers", 16), "sampled 16": Selector("sampled", 16), "sampled 4": Selector("sampled", 4),
    "sampled": Selector("sampled", 1), "all 16": Selector("all", 16), "all digest": Selector("all", 16, "digest"),
    "diagonals 8": Selector("joined", 8), "diagonals 16": Selector("joined", 16),
    PERFECT: Selector("all", 1),
}  # fmt: skip


def tiles_of(q: Tensor, num_kv_heads: int) -> Tensor:
    """float32 [num_kv_heads, group, tiles, TILE, head_dim] of [num_qo_heads, T, head_dim], T a multiple of TILE."""
    return q.float().unflatten(1, (-1, TILE)).unflatten(0, (num_kv_heads, -1))


def page_values(
    name: str, q: Tensor, own_lse: Tensor, keys: LayerKeys, pages: int, softmax_scale: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimated attention of tiles to the past's pages.

    Args:
        name: of one of `SELECTORS`.
        q: float32 [num_kv_heads, group, tiles, TILE, head_dim] after RoPE.
        own_lse: float32 [num_kv_heads, group, tiles, TILE], log-sum-exp over the queries' own chunk.
        pages: of the past, the first of `keys`.
        lam: weight of a digest's half-ranges.

    Returns:
        Two float32 [num_kv_heads, group, tiles, pages]: logs of shares of the attention to the past, and of all.
    """
    selector = SELECTORS[name]
    bytes_of_tile = 4 * q.shape[0] * q.shape[1] * selector.num_rows * pages * PAGE // selector.tokens
    size = max(1, _SCORE_BYTES[q.device.type] // bytes_of_tile)
    found = [
        _values(selector, some, lse, keys, pages, softmax_scale, lam)
        for some, lse in zip(q.split(size, 2), own_lse.split(size, 2), strict=True)
    ]
    past, whole = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return past, whole


def _values(
    selector: Selector, q: Tensor, own_lse: Tensor, keys: LayerKeys, pages: int, softmax_scale: float, lam: float
) -> tuple[Tensor, Tensor]:
    hidden = None
    if selector.coarse:
        coarse = _values(SELECTORS[selector.coarse], q, own_lse, keys, pages, softmax_scale, lam)[1]
        hidden = coarse < coarse.flatten().topk(math.ceil(_COARSE * coarse.numel())).values[-1]
    of_rows, found = _of_rows(selector, own_lse, q)[..., None], []
    for rows, vectors in _vectors(selector, q, keys, pages, lam):
        dots = (rows.flatten(1, 3) @ vectors.mT).mul_(softmax_scale)
        scores = dots.unflatten(-1, (pages, -1)).logsumexp(-1).unflatten(1, rows.shape[1:4])
        scores += math.log(selector.tokens)
        if hidden is not None:
            scores.masked_fill_(hidden[:, :, :, None], -torch.inf)
        total = scores.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # none of a head's pages
        each = (scores - some for some in (total, torch.logaddexp(total, of_rows)))
        found.append([one.logsumexp(3) - math.log(selector.num_rows) for one in each])
    past, whole = (torch.stack(parts).amax(0) for parts in zip(*found, strict=True))
    return past, whole


def _of_rows(selector: Selector, x: Tensor, q: Tensor) -> Tensor:
    """What stands for the tile: [..., TILE] or [..., TILE, n] as [..., rows] or [..., rows, n].

    Args:
        q: as of `page_values`; says which queries are outliers.
    """
    count = selector.num_rows
    if selector.rows == "sampled":
        return x.unflatten(3, (count, -1))[:, :, :, :, TILE // count // 2]
    if selector.rows != "outliers":
        return x.unflatten(3, (count, -1)).mean(4)
    like = torch.cosine_similarity(q, q.mean(3, keepdim=True), dim=-1)
    least = like.topk(_OUTLIERS, -1, largest=False).indices
    chosen = x.gather(3, least if x.dim() == 4 else least[..., None].expand(*least.shape, x.shape[-1]))
    return torch.cat((x.unflatten(3, (count - _OUTLIERS, -1)).mean(4), chosen), 3)


def _vectors(selector: Selector, q: Tensor, keys: LayerKeys, pages: int, lam: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the tiles [num_kv_heads, group, tiles, rows, n] and of the past [num_kv_heads, groups, n]; of bands twice."""
    of_one, groups = selector.tokens, pages * PAGE // selector.tokens
    if selector.rows == "joined":
        rows = q.unflatten(3, (-1, of_one)).flip(4).flatten(4, 5)
        yield rows / of_one, keys.keys[:, : pages * PAGE].unflatten(1, (-1, of_one)).flatten(2, 3)
        return
    rows = _of_rows(selector, q, q)
    if selector.kind == "digest":
        rows = torch.cat((rows, lam * _of_rows(selector, q.abs(), q)), -1)
        yield rows, torch.cat([x[:, :groups] for x in keys.vectors(Index(of_one, lam, bits=4))], -1)
        return
    vectors = (keys.keys if of_one == 1 else keys.vectors(Index(of_one))[0])[:, :groups]
    if selector.kind == "mean":
        yield rows, vectors
        return
    half = rows.shape[-1] // 2
    for share, fast in zip(_BANDS, (True, False), strict=True):
        width = int(half * share)
        own = torch.arange(width, device=q.device) + (0 if fast else half - width)
        own = torch.cat((own, own + half))
        gains = [_energy(x) / _energy(x[..., own]) for x in (rows.flatten(2, 3), vectors)]
        yield rows[..., own] * gains[0][:, :, None] / share, vectors[..., own] * gains[1]


def _energy(x: Tensor) -> Tensor:
    """Root mean square over vectors and channels, the last two dimensions, which are kept."""
    return x.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-6)
