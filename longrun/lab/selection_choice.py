"""How many of the best units a row reads, and whose scores choose them; `longrun.lab.selection` ranks them.

By itself a KV head of every layer and row reads the N best units by its own scores. Other ways, which combine:

- `Mass`: no more of them than get a wanted share of the attention by the index's own estimate, N at most (top-p, as
  Twilight, arXiv 2502.02770).
- `PreviousToken`: a row reads what the row before it would choose (as FreeKV, arXiv 2505.13109). So a choice can be
  made, and its pages fetched, one step ahead.
- `FilterLayers`: few layers choose, for those up to the next one, too (as OmniKV).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.lab.selection import LayerQueries, best
from longrun.lab.selection_rules import PAGE, Rule


@dataclass(frozen=True)
class Best:
    """The units of highest value."""

    def picked(self, values: Tensor, shares: Tensor, cap: int, of_page: int) -> Tensor:
        """bool [n, R, units].

        Args:
            values: [n, R, units] of `LayerQueries.ranking`; shares: of `LayerQueries.shares`.
            cap: units at most; of_page: units of a page.
        """
        return best(values, cap)


@dataclass(frozen=True)
class Mass:
    """The fewest of the units of highest value whose shares add up to `share`, the cap at most.

    Attributes:
        share: of the estimated attention to all candidates; 1: as many as the cap.
        least: pages that are chosen in any case, as far as the cap goes.
    """

    share: float
    least: int = 1

    def picked(self, values: Tensor, shares: Tensor, cap: int, of_page: int) -> Tensor:
        """See `Best.picked`."""
        order = values.argsort(-1, descending=True)
        # A unit is needed while it and all behind it have more than what may be left. Added up from the smallest on
        # and in logs, so that the share 1 leaves none out by rounding.
        behind = shares.gather(-1, order).flip(-1).logcumsumexp(-1).flip(-1)
        needed = behind > (math.log(1 - self.share) if self.share < 1 else -math.inf)
        needed[..., : self.least * of_page] = True
        needed[..., cap:] = False
        return torch.zeros_like(needed).scatter_(-1, order, needed) & (values > -math.inf)


@dataclass(frozen=True)
class PreviousToken:
    """Every row reads what the one before it would choose. Of a page that the row before read as one of the newest,
    and this one no longer does, nothing is read: one row of 64."""

    def taken(self, chosen: Tensor, before: Tensor | None) -> Tensor:
        """bool [n, R, units], for consecutive rows.

        Args:
            chosen: bool [n, R, units], by the rows' own scores.
            before: bool [n, 1, units], chosen by the row before the first; None: there is none, the first reads its
                own choice.
        """
        return torch.cat((chosen[:, :1] if before is None else before, chosen[:, :-1]), 1)


@dataclass(frozen=True)
class FilterLayers:
    """Layers 0, k, 2k, ... choose, each KV head for itself; all heads of the layers between read one choice, that of
    the last of these by its heads' pooled scores: of a unit the highest value, and the mean share."""

    every: int

    def source(self, layer_idx: int) -> int:
        """The layer that chooses for this one."""
        return layer_idx - layer_idx % self.every


@dataclass(frozen=True)
class Way:
    """How a ranking becomes a choice."""

    pick: Best | Mass = Best()
    previous: PreviousToken | None = None
    layers: FilterLayers = FilterLayers(1)


OWN_BEST = Way()


class Choosing:
    """The choices of one forward pass over consecutive rows of one sequence.

    Questions that stand one behind another, as in `AnsweredText`, are such a sequence: the row before a question's
    first is the last of the answer before it, and that before an answer's first the last one of its question, whether
    it was read in full or not.

    Args:
        count: pages at most.
        selects: bool [T], by position: the rows that read their choice; others read everything.
        questions: position of the first row that counts as the questions'.

    Attributes:
        read: float64 [2, 3], of the text's rows and of the questions', selecting ones: sums over layers and rows of the
            pages chosen by a KV head, of the share of all units up to its own that it reads, and the number of these
            rows.
    """

    def __init__(self, rule: Rule, way: Way, count: int, selects: Tensor, questions: int) -> None:
        self._rule, self._way, self._count, self._selects, self._questions = rule, way, count, selects, questions
        self._shared: list[Tensor] = []
        self.read = torch.zeros(2, 3, dtype=torch.float64, device=selects.device)

    def narrowed(self, layer_idx: int, parts: Iterable[LayerQueries]) -> Iterator[LayerQueries]:
        """Each of a layer's pieces with -inf as the score of all tokens that are not read.

        Args:
            layer_idx: in order, from 0 on; parts: of all rows, in order, cut alike in all layers.
        """
        unit, chooses = self._rule.chosen_unit, self._way.layers.source(layer_idx) == layer_idx
        taken = self._chosen(parts, chooses)
        for part, own in taken:
            selects = self._selects[part.rows]
            hidden = part.candidates(unit) & ~own & selects[:, None]
            self._count_read(part.rows, own, hidden, selects)
            part.scores.unflatten(-1, (-1, unit)).masked_fill_(hidden[:, :, None, :, None], -math.inf)
            yield part

    def _chosen(self, parts: Iterable[LayerQueries], chooses: bool) -> Iterator[tuple[LayerQueries, Tensor]]:
        """Each piece with the units that it would read, bool [num_kv_heads or 1, R, units]."""
        if not chooses:
            yield from zip(parts, self._shared, strict=True)
            return
        of_page, before = PAGE // self._rule.chosen_unit, None
        self._shared = []
        for part in parts:
            values, shares = part.ranking(self._rule), part.shares(self._rule)
            if self._way.layers.every > 1:
                values = torch.cat((values, values.amax(0, keepdim=True)))
                shares = torch.cat((shares, shares.logsumexp(0, keepdim=True) - math.log(len(shares))))
            chosen = self._way.pick.picked(values, shares, self._count * of_page, of_page)
            taken = chosen if self._way.previous is None else self._way.previous.taken(chosen, before)
            before = chosen[:, -1:]
            if self._way.layers.every > 1:
                self._shared.append(taken[-1:])
                taken = taken[:-1]
            yield part, taken

    def _count_read(self, rows: Tensor, taken: Tensor, hidden: Tensor, selects: Tensor) -> None:
        unit = self._rule.chosen_unit
        pages = taken.sum(-1, dtype=torch.float64).mean(0) * unit / PAGE
        share = 1 - hidden.sum(-1, dtype=torch.float64).mean(0) / (rows // unit + 1)
        found = torch.stack((pages, share, torch.ones_like(share)), -1) * selects[:, None]
        self.read.index_add_(0, (rows >= self._questions).long(), found)


def read_row(read: Tensor) -> dict[str, float | None]:
    """JSON-able, of `Choosing.read`: mean pages chosen and mean share of all units read, of all selecting rows, of the
    text's and of the questions'; None where no row selects."""
    found: dict[str, float | None] = {}
    for kind, sums in (("", read.sum(0)), ("_text", read[0]), ("_questions", read[1])):
        pages, share, rows = sums.tolist()
        found |= {
            f"pages_chosen{kind}": pages / rows if rows else None,
            f"share_read{kind}": share / rows if rows else None,
        }
    return found
