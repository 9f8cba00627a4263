"""From one number a token to the passages that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SHARE = 0.05  # of a passage
_EDGE = 0.02  # of a passage's own, left out at either end
_BEFORE = 4  # tokens before what is left: those of an answer's first word were looked at before there was an answer


@dataclass(frozen=True)
class Passage:
    """Neighbouring tokens that an answer looked at.

    Attributes:
        first, stop: positions [first, stop) in the session.
        share: of all that was looked at before the question, from 0 to 1.
    """

    first: int
    stop: int
    share: float


def passages(sums: Tensor, page_size: int, first: int, most: int) -> list[Passage]:
    """The pages with the most, neighbours joined, without the ends that hold next to nothing; the largest share
    first.

    Args:
        sums: float32 [n], what each token got.
        first: tokens below this position, the sinks, do not count: heads rest on them whatever they look for.
        most: at most so many passages.
    """
    if len(sums) <= first:
        return []
    sums = sums.double()
    sums[:first] = 0
    total = float(sums.sum())
    if total == 0:
        return []
    padded = torch.zeros(-(-len(sums) // page_size) * page_size, dtype=sums.dtype)
    padded[: len(sums)] = sums
    shares = padded.view(-1, page_size).sum(dim=1) / total
    found: list[Passage] = []
    pages = (shares >= _LEAST_SHARE).nonzero().flatten().tolist()
    begin = 0
    for at, page in enumerate(pages):
        if at + 1 < len(pages) and pages[at + 1] == page + 1:
            continue
        found.append(_trimmed(sums, pages[begin] * page_size, (page + 1) * page_size, first, total))
        begin = at + 1
    return sorted(found, key=lambda passage: -passage.share)[:most]


def _trimmed(sums: Tensor, first: int, stop: int, sinks: int, total: float) -> Passage:
    own = sums[first:stop]
    share, running = float(own.sum()), own.cumsum(dim=0)
    begin = int(torch.searchsorted(running, _EDGE * share, right=True))
    end = int(torch.searchsorted(running, (1 - _EDGE) * share)) + 1
    return Passage(max(sinks, first + begin - _BEFORE), first + min(end, len(own)), share / total)
