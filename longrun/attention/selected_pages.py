"""The pages that one token reads of a layer's retrieval heads, chosen by its queries from all that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longrun.cache.pages import PagedHeads
from longrun.kernels.page_choose import Budget, chosen_shares
from longrun.kernels.page_view import PageView
from longrun.kernels.prepared_call import PreparedCall
from longrun.specs.attention_spec import AttentionSpec

if TYPE_CHECKING:
    from longrun.kernels.cpu_select import CpuSelect
    from longrun.kernels.page_select_cuda import ChoiceWorkspace


class PageSelector:
    """Scores a layer's pages and lists the best, in buffers that all layers share: each is read before the next one is
    scored. Nothing depends on host values, so that a CUDA graph captures it.

    Args:
        spec: which selection, and how large the buffers are, which are allocated here.
        score_pages, choose_pages: see `kernels.page_score` and `kernels.page_choose`.
        workspace: for choosing among the pages of the most heads, where `choose_pages` takes one.
    """

    def __init__(
        self, spec: AttentionSpec, device: torch.device, score_pages: Callable[..., Tensor],
        choose_pages: Callable[..., None], workspace: ChoiceWorkspace | None = None,
    ) -> None:  # fmt: skip
        assert spec.selects and spec.selection is not None
        self._selection = spec.selection
        self._score_pages, self._choose_pages, self._workspace = score_pages, choose_pages, workspace
        self._softmax_scale = spec.head_dim**-0.5
        self._budget = Budget(spec.selection.pages_per_head, spec.selection.share_steps)
        heads, most = spec.max_retrieval_heads, spec.most_read_pages
        self._scores = torch.zeros(heads, spec.group, spec.listed_pages, device=device)
        self._pages = torch.zeros(heads, most, dtype=torch.int32, device=device)
        self._watched: list[list[float]] | None = None
        self._begins, self._counts = torch.zeros(2, heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        scratch = () if self._workspace is None else vars(self._workspace).values()
        return sum(x.nbytes for x in (self._scores, self._pages, self._begins, self._counts, *scratch))

    def chosen(self, view: PageView) -> PageView:
        """`view` with the lists that `choose` writes in place of its own."""
        heads = view.num_heads
        lists = {"pages": self._pages[:heads], "begins": self._begins[:heads], "counts": self._counts[:heads]}
        return replace(view, **lists)

    def choose(self, q: Tensor, view: PageView, pages: PagedHeads) -> None:
        """Choose among the pages of `view` for these queries.

        Args:
            q: bfloat16 or float32 [num_heads, group, head_dim], rotated as the pages' keys are.
            pages: of the layer, for their digests.
        """
        heads, selection = view.num_heads, self._selection
        scratch = {} if self._workspace is None else {"workspace": self._workspace.part(heads)}
        scores = self._score_pages(
            q, view, pages.digest, lam=selection.lam, softmax_scale=self._softmax_scale, out=self._scores[:heads]
        )
        self._choose_pages(
            scores, view, budget=self._budget, newest=selection.newest, pages_out=self._pages[:heads],
            counts_out=self._counts[:heads], **scratch,
        )  # fmt: skip
        if self._watched is not None:
            self._watch(view)

    @contextmanager
    def watched(self) -> Iterator[list[list[float]]]:
        """While this is open, every layer that chooses leaves the shares of `chosen_shares` by head in the list: steps
        that are run, or prepared and run, but not captured ones."""
        self._watched = found = []
        try:
            yield found
        finally:
            self._watched = None

    def _watch(self, view: PageView) -> None:
        assert self._watched is not None
        heads = view.num_heads
        shares = chosen_shares(self._scores[:heads], view, self._pages[:heads], self._counts[:heads])
        self._watched.append(shares.tolist())

    def prepare(self, select: CpuSelect, q: Tensor, view: PageView, pages: PagedHeads) -> list[PreparedCall]:
        """`choose` by the CPU's compiled kernels, as calls to be run for every token."""
        heads, selection, scores = view.num_heads, self._selection, self._scores[: view.num_heads]
        watch = [] if self._watched is None else [PreparedCall(self._watch, view)]
        return [
            select.prepare_score(
                q, view, pages.digest, lam=selection.lam, softmax_scale=self._softmax_scale, out=scores
            ),
            select.prepare_choose(
                scores, view, budget=self._budget, newest=selection.newest, pages_out=self._pages[:heads],
                counts_out=self._counts[:heads],
            ),
            *watch,
        ]  # fmt: skip


class Selects(Protocol):
    """Attention whose decode steps may select pages.

    Attributes:
        selector: chooses them; None where no step selects.
    """

    selector: PageSelector | None
