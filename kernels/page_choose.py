"""The best pages of each head's list by their scores: the second half of selected decode, in torch.

Query heads of a group are made comparable by their own log-sum-exp over all candidates: a score becomes the logarithm
of the page's share of that query head's attention. A page's value to the KV head is the largest of them
(docs/selection.md). `page_select_cuda` is the GPU's kernel with this signature; this one serves any device and does not
wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.kernels.page_view import PageView

NORM_STEP = 1 / 16  # the log-sum-exp is rounded to it, so that the order of a sum decides no choice
SHARE_STEPS = 10_000  # a share is a whole number of hundredths of a percent, so that every kernel counts alike


@dataclass(frozen=True)
class Budget:
    """How many pages of its list a head reads: those of highest value, `pages` of them, or `share` of its entries where
    that is more.

    Attributes:
        pages: at least 1.
        share: of `SHARE_STEPS`; the number of pages is rounded up. The list's length is read when a kernel runs, so
            that a captured CUDA graph follows it.
    """

    pages: int
    share: int = 0

    def __post_init__(self) -> None:
        assert self.pages >= 1 and 0 <= self.share <= SHARE_STEPS, self

    def most(self, entries: int) -> int:
        """Pages that are read of a list of at most `entries`."""
        return min(entries, max(self.pages, -(-entries * self.share // SHARE_STEPS)))


def check_choose_shapes(
    scores: Tensor, view: PageView, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor
) -> None:
    """Assert what `choose_pages` asks of its arguments."""
    heads = view.num_heads
    assert scores.dtype == torch.float32 and scores.shape[0] == heads and scores.is_contiguous()
    assert 0 <= newest <= budget.pages, (newest, budget)
    most = max(budget.pages, budget.most(scores.shape[2]))
    assert most <= pages_out.shape[1], (budget, scores.shape, pages_out.shape)
    assert pages_out.dtype == torch.int32 and pages_out.shape[0] == heads and pages_out.stride(1) == 1
    assert counts_out.dtype == torch.int32 and counts_out.shape == (heads,) and counts_out.is_contiguous()


def choose_pages(
    scores: Tensor, view: PageView, *, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor
) -> None:
    """Write the pages that each head reads, in the order of its list, and their number.

    A list no longer than the budget is copied whole. Of equal values the lower entry wins.

    Args:
        scores: float32 [num_heads, group, max_entries], contiguous: see `score_pages`; of entries beyond a head's list
            nothing is read.
        view: the candidates that were scored.
        newest: entries at the end of every list that are chosen whatever their value.
        pages_out: int32 [num_heads, max_chosen], rows of contiguous items, max_chosen at least the budget of a list of
            max_entries. What stands beyond the chosen pages is left alone.
        counts_out: int32 [num_heads], contiguous.
    """
    check_choose_shapes(scores, view, budget, newest, pages_out, counts_out)
    entries = torch.arange(scores.shape[2], device=scores.device)
    counts = view.num_entries()[:, None].long().clamp(max=scores.shape[2])
    meant = entries < counts
    values = page_values(scores, meant).where(entries < counts - newest, torch.inf).where(meant, -torch.inf)
    most, chosen = budget.most(scores.shape[2]), meant
    if scores.shape[2] > most:
        wanted = (-(-counts * budget.share // SHARE_STEPS)).clamp(min=budget.pages)
        last = values.topk(most, dim=1).values.gather(1, wanted.clamp(max=most) - 1)
        above, tied = values > last, values == last
        room = wanted - above.sum(1, keepdim=True)
        chosen = meant & ((counts <= wanted) | above | (tied & (tied.cumsum(1) <= room)))
    pages = view.pages.gather(1, (view.begins[:, None] + view.skip + entries).clamp(max=view.pages.shape[1] - 1))
    # All entries are written somewhere: those that were not chosen behind a copy of the output, which is cut off.
    found = torch.cat((pages_out, pages), dim=1)
    behind = pages_out.shape[1] + entries
    pages_out.copy_(found.scatter(1, (chosen.cumsum(1) - 1).where(chosen, behind), pages)[:, : pages_out.shape[1]])
    counts_out.copy_(chosen.sum(1))


def page_values(scores: Tensor, meant: Tensor) -> Tensor:
    """float32 [num_heads, max_entries]: the largest share, as a logarithm, that a page has in a query head's attention.

    Args:
        scores: float32 [num_heads, group, max_entries].
        meant: bool [num_heads, max_entries], the entries of the lists; the others mean nothing, here and in the result.
    """
    totals = scores.where(meant[:, None], -torch.inf).logsumexp(dim=2, keepdim=True)
    return (scores - (totals / NORM_STEP).round() * NORM_STEP).amax(dim=1)


def chosen_shares(scores: Tensor, view: PageView, pages: Tensor, counts: Tensor) -> Tensor:
    """float32 [num_heads]: the share that the chosen pages have in the scored attention of each head, mean over its
    queries; 1 for a head without pages. For statistics: it waits for the device, head by head.

    Args:
        scores: float32 [num_heads, group, max_entries], see `score_pages`.
        view: the candidates that were scored.
        pages, counts: int32, what `choose_pages` wrote.
    """
    shares = torch.ones(view.num_heads, device=scores.device)
    begins, lengths, chosen = (numbers.tolist() for numbers in (view.begins, view.num_entries(), counts))
    for head, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        if length:
            listed = view.pages[head, begin + view.skip : begin + view.skip + length]
            read = torch.isin(listed, pages[head, : chosen[head]])
            shares[head] = (scores[head, :, :length].softmax(dim=1) * read).sum(dim=1).mean()
    return shares
