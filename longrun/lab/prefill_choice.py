"""How many pages of the past a tile of queries reads, by its estimates of `longrun.lab.prefill_selectors`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.errors import InputError
from longrun.lab.prefill_selectors import PERFECT

_LADDER = 1.12  # from one size of a choice to the next


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


@dataclass(frozen=True)
class Choice:
    """How many pages a tile reads, the best by a selector's values.

    Attributes:
        rule: one of `RULES`. "share": of the past; "weighed": the same, ranked by shares of all attention instead of
            the past's; "relative": pages that get at least `level` times what the best one gets that is not always
            read (FlashPrefill); "absolute": pages that get at least the share `level` of all the tile's attention;
            "left": as few pages as leave at most the share `level` of all the tile's attention to others.
        share: wanted; with the last three rules `level` was fitted to it.
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


RULES = ("share", "weighed", "relative", "absolute", "left")
LEVELLED = RULES[2:]


def by_whole(selector: str, rule: str) -> bool:
    """Whether pages are ranked by shares of all attention."""
    return selector == PERFECT or rule in ("weighed", "absolute", "left")


def forced(values: Tensor, limits: Limits) -> Tensor:
    """`values` [..., pages] with what is always read above all."""
    values = values.clone()
    values[..., 0] = torch.inf
    values[..., max(0, values.shape[-1] - limits.newest) :] = torch.inf
    return values


def counts_at(ranking: Tensor, rule: str, levels: Tensor, limits: Limits) -> Tensor:
    """int64 [..., n], pages that tiles read at each of float32 [n] levels of a rule of `LEVELLED`.

    Args:
        ranking: of `Choice.ranking`, [..., pages].
    """
    pages, always = ranking.shape[-1], ranking == torch.inf
    free = ranking.masked_fill(always, -torch.inf)
    if rule == "left":
        rest = free.exp().sort(-1).values.cumsum(-1)
        found = (rest[..., None, :] > levels[:, None]).sum(-1) + always.sum(-1, keepdim=True)
    else:
        least = levels.log().expand(*ranking.shape[:-1], -1)
        if rule == "relative":
            least = least + free.amax(-1, keepdim=True).clamp_min(torch.finfo(free.dtype).min / 2)
        found = (ranking[..., None, :] >= least[..., None]).sum(-1)
    return found.clamp(limits.smallest(pages), pages)


def ladder(limits: Limits, pages: int) -> list[int]:
    """Sizes that a choice is rounded up to, so that few of them occur."""
    sizes = [limits.smallest(pages)]
    while sizes[-1] < pages:
        sizes.append(min(pages, max(sizes[-1] + 1, round(sizes[-1] * _LADDER))))
    return sizes
