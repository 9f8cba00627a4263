"""Which pages of the past a tile of queries reads while a document is read: selectors, and how many pages they choose.

A *tile* is 128 consecutive queries of one query head; it stands in a chunk, and the past is what was read before that
chunk, in pages of 64 tokens. A selector puts a few vectors for the tile's queries against vectors for the past's
tokens. A page's score for one vector is the log-sum-exp over its tokens or groups, a group counting as often as it has
tokens; its *value* is the estimated share of the tile's attention,

    log mean_r exp(score[r, page] - total[r]),

total: the log-sum-exp over all pages, and with *outside* also over the tile's exact attention to its own chunk, which
is computed first anyway.

| selector | of the tile | of the past |
|---|---|---|
| means | means of 32 queries | means of 16 keys |
| digest | the same, and means of their magnitudes | selected decode's: means and lam x half-ranges, 4 bits |
| bands | the mean of the tile | means of a page; fast and slow rotary pairs apart (Prism, arXiv 2602.08426) |
| bands 16 | means of 32 queries | means of 16 keys, bands apart |
| outliers | means of 32 queries and the 4 queries least like the tile's mean (QUOKA) | means of 16 keys |
| sampled means | every 16th query | means of 16 keys |
| means, sampled | the 30% of the pages that *means* takes, again by *sampled* | |
| sampled | every 16th query | keys (SampleAttention, arXiv 2406.15486) |
| diagonals S | S consecutive queries in reverse order, joined | S keys joined (XAttention, arXiv 2503.16428) |
| perfect | every query | keys |

Bands follow Prism's code: of 128 channels 64 and 96, each scaled back to the energy that it has before the split; the
larger of a page's two values counts, which is their union at an equal share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.errors import InputError
from longrun.lab.selection import LayerKeys, best
from longrun.lab.selection_rules import PAGE, Index

TILE = 128
PERFECT, TWO_STAGES = "perfect", "means, sampled"
SELECTORS = (
    "means", "digest", "bands", "bands 16", "outliers", "sampled means", TWO_STAGES, "sampled", "diagonals 8",
    "diagonals 16", PERFECT,
)  # fmt: skip
_MEANS, _OUTLIERS, _SAMPLED = 4, 4, 8  # vectors of a tile
_COARSE = 0.3  # of the pages, of the first stage
_BANDS = (0.5, 0.75)  # of the channels, fast and slow
_LADDER = 1.12  # from one size of a choice to the next
_SCORE_BYTES = {"cpu": 2**27, "cuda": 6 * 2**30}


@dataclass(frozen=True)
class Limits:
    """What every choice reads, in pages.

    Attributes:
        newest: pages before the chunk that are always read, as the first page is; floor: a choice is no smaller.
        lam: weight of the digest's half-ranges.
    """

    newest: int = 4
    floor: int = 16
    lam: float = 0.25

    @property
    def always(self) -> int:
        return 1 + self.newest

    def smallest(self, pages: int) -> int:
        return min(pages, max(self.floor, self.always))

    def chosen(self, share: float, pages: int) -> int:
        """Pages that a share of the past is."""
        return max(self.smallest(pages), min(pages, round(share * pages)))


def tiles_of(q: Tensor, num_kv_heads: int) -> Tensor:
    """float32 [num_kv_heads, group, tiles, TILE, head_dim] of [num_qo_heads, T, head_dim], T a multiple of TILE."""
    return q.float().unflatten(1, (-1, TILE)).unflatten(0, (num_kv_heads, -1))


def page_values(
    selector: str, q: Tensor, own_lse: Tensor, keys: LayerKeys, pages: int, softmax_scale: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimated attention of tiles to the past's pages.

    Args:
        selector: one of `SELECTORS`.
        q: float32 [num_kv_heads, group, tiles, TILE, head_dim] after RoPE.
        own_lse: float32 [num_kv_heads, group, tiles, TILE], log-sum-exp over the queries' own chunk.
        pages: of the past, the first of `keys`.

    Returns:
        Two float32 [num_kv_heads, group, tiles, pages]: logs of shares of the attention to the past, and of all.
    """
    bytes_of_tile = 4 * q.shape[0] * q.shape[1] * _rows_of(selector) * pages * PAGE // _tokens_of(selector)
    size = max(1, _SCORE_BYTES[q.device.type] // bytes_of_tile)
    found = [
        _values(selector, some, lse, keys, pages, softmax_scale, lam)
        for some, lse in zip(q.split(size, 2), own_lse.split(size, 2), strict=True)
    ]
    past, whole = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return past, whole


def _values(
    selector: str, q: Tensor, own_lse: Tensor, keys: LayerKeys, pages: int, softmax_scale: float, lam: float
) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    hidden = None
    if selector == TWO_STAGES:
        coarse = _values("means", q, own_lse, keys, pages, softmax_scale, lam)[0]
        hidden = ~best(coarse, math.ceil(_COARSE * pages))[:, :, :, None]
    for rows, vectors in _bands(selector, q, keys, pages, lam):
        dots = (rows.flatten(1, 3) @ vectors.mT).mul_(softmax_scale)
        scores = dots.unflatten(-1, (pages, -1)).logsumexp(-1).unflatten(1, rows.shape[1:4])
        scores += math.log(_tokens_of(selector))
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        total = scores.logsumexp(-1, keepdim=True)
        whole = torch.logaddexp(total, _of_rows(selector, own_lse, q)[..., None])
        found.append(tuple((scores - some).logsumexp(3) - math.log(scores.shape[3]) for some in (total, whole)))
    past, of_all = (torch.stack(parts).amax(0) for parts in zip(*found, strict=True))
    return past, of_all


def _rows_of(selector: str) -> int:
    if selector.startswith("diagonals"):
        return TILE // _stride(selector)
    if "sampled" in selector:
        return _SAMPLED
    return {"bands": 1, "outliers": _MEANS + _OUTLIERS, PERFECT: TILE}.get(selector, _MEANS)


def _tokens_of(selector: str) -> int:
    """Of the past, for one score."""
    if selector.startswith("diagonals"):
        return _stride(selector)
    return {"bands": PAGE, "sampled": 1, TWO_STAGES: 1, PERFECT: 1}.get(selector, 16)


def cost(selector: str) -> float:
    """Multiply-adds of the scores, of those of dense attention's."""
    if selector == TWO_STAGES:
        return cost("means") + _COARSE * cost("sampled")
    rows = TILE if selector.startswith("diagonals") else _rows_of(selector)
    width = {"digest": 2.0, "bands": sum(_BANDS), "bands 16": sum(_BANDS)}.get(selector, 1.0)
    return width * rows / TILE / _tokens_of(selector)


def _stride(selector: str) -> int:
    return int(selector.split()[1])


def _of_rows(selector: str, x: Tensor, q: Tensor) -> Tensor:
    """What stands for the tile: [..., TILE] or [..., TILE, n] as [..., rows] or [..., rows, n].

    Args:
        q: as of `page_values`; says which queries are outliers.
    """
    if "sampled" in selector:
        return x.unflatten(3, (_SAMPLED, -1))[:, :, :, :, TILE // _SAMPLED // 2]
    if selector == PERFECT:
        return x
    if selector != "outliers":
        return x.unflatten(3, (_rows_of(selector), -1)).mean(4)
    like = torch.cosine_similarity(q, q.mean(3, keepdim=True), dim=-1)
    least = like.topk(_OUTLIERS, -1, largest=False).indices
    chosen = x.gather(3, least if x.dim() == 4 else least[..., None].expand(*least.shape, x.shape[-1]))
    return torch.cat((x.unflatten(3, (_MEANS, -1)).mean(4), chosen), 3)


def _bands(selector: str, q: Tensor, keys: LayerKeys, pages: int, lam: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors of the tiles [num_kv_heads, group, tiles, rows, n] and of the past [num_kv_heads, groups, n]; of some
    selectors twice."""
    tokens = pages * PAGE
    if selector.startswith("diagonals"):
        stride = _stride(selector)
        rows = q.unflatten(3, (-1, stride)).flip(4).flatten(4, 5)
        yield rows / stride, keys.keys[:, :tokens].unflatten(1, (-1, stride)).flatten(2, 3)
        return
    rows, of_one = _of_rows(selector, q, q), _tokens_of(selector)
    if selector == "digest":
        rows = torch.cat((rows, lam * _of_rows(selector, q.abs(), q)), -1)
        vectors = torch.cat(keys.vectors(Index(16, lam, bits=4)), -1)
    else:
        vectors = keys.keys if of_one == 1 else keys.vectors(Index(of_one))[0]
    vectors = vectors[:, : tokens // of_one]
    if not selector.startswith("bands"):
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


@dataclass(frozen=True)
class Choice:
    """How many pages a tile reads, the best by a selector's values.

    Attributes:
        rule: one of `RULES`. "share": of the past; "weighed": the same, ranked by shares of all attention instead of
            the past's; "relative": pages that get at least `level` times what the best one gets that is not always
            read (FlashPrefill); "absolute": pages that get at least the share `level` of all the tile's attention.
        share: wanted; with the last two rules `level` was fitted to it.
    """

    selector: str
    share: float
    rule: str = "share"
    level: float | None = None

    def ranking(self, past: Tensor, whole: Tensor, limits: Limits) -> Tensor:
        """Of `page_values`, with what is always read above all."""
        return forced(whole if by_whole(self.selector, self.rule) else past, limits)

    def counts(self, ranking: Tensor, limits: Limits) -> Tensor:
        """int64 [num_kv_heads, group, tiles], pages read.

        Raises:
            InputError: the rule needs a level.
        """
        pages = ranking.shape[-1]
        if self.rule in ("share", "weighed"):
            return torch.full(ranking.shape[:-1], limits.chosen(self.share, pages), device=ranking.device)
        if self.level is None:
            raise InputError(f"the rule {self.rule} needs a level: let the mass of the same length be measured first")
        sizes = torch.tensor(ladder(limits, pages), device=ranking.device)
        found = counts_at(ranking, self.rule, torch.tensor([self.level], device=ranking.device), limits)
        return sizes[torch.bucketize(found[..., 0], sizes)]


RULES = ("share", "weighed", "relative", "absolute")


def by_whole(selector: str, rule: str) -> bool:
    """Whether pages are ranked by shares of all attention."""
    return selector == PERFECT or rule in ("weighed", "absolute")


def forced(values: Tensor, limits: Limits) -> Tensor:
    """`values` [..., pages] with what is always read above all."""
    values = values.clone()
    values[..., 0] = torch.inf
    values[..., max(0, values.shape[-1] - limits.newest) :] = torch.inf
    return values


def counts_at(ranking: Tensor, rule: str, levels: Tensor, limits: Limits) -> Tensor:
    """int64 [..., n], pages that tiles read at each of float32 [n] levels of the rule "relative" or "absolute".

    Args:
        ranking: of `Choice.ranking`, [..., pages].
    """
    least = levels.log().expand(*ranking.shape[:-1], -1)
    if rule == "relative":
        least = least + ranking.masked_fill(ranking == torch.inf, -torch.inf).amax(-1, keepdim=True)
    pages = ranking.shape[-1]
    return (ranking[..., None, :] >= least[..., None]).sum(-1).clamp(limits.smallest(pages), pages)


def ladder(limits: Limits, pages: int) -> list[int]:
    """Sizes that a choice is rounded up to, so that few of them occur."""
    sizes = [limits.smallest(pages)]
    while sizes[-1] < pages:
        sizes.append(min(pages, max(sizes[-1] + 1, round(sizes[-1] * _LADDER))))
    return sizes
