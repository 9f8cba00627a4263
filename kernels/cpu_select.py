"""The compiled kernels of `cpu_select.cpp`: pages are scored by their digests and the best are chosen, some ten times
as fast as by the torch references, `page_score.score_pages` and `page_choose.choose_pages`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.kernels.page_choose import NORM_STEP, SHARE_STEPS, Budget, check_choose_shapes
from longrun.kernels.page_score import check_score_shapes
from longrun.kernels.page_view import PageView, check_view
from longrun.kernels.prepared_call import PreparedCall, addresses
from longrun.quant.rotation import rotation_scales

CPU_MAX_GROUP = 8  # MAX_GROUP of cpu_select.cpp


class _List(ctypes.Structure):
    """`List` in cpu_select.cpp."""

    _fields_ = (
        ("pages", ctypes.c_void_p), ("stride", ctypes.c_int64), ("begins", ctypes.c_void_p),
        ("counts", ctypes.c_void_p), ("skip", ctypes.c_int64), ("limit", ctypes.c_int64),
    )  # fmt: skip


class _Score(ctypes.Structure):
    """`Score` in cpu_select.cpp."""

    _fields_ = (
        ("list", _List),
        *((name, ctypes.c_void_p) for name in ("q", "digest", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "digest_stride", "heads", "group", "head_dim", "centre_bits", "groups", "room", "q_bf16", "threads",
            )
        ),
        ("softmax_scale", ctypes.c_double), ("lam", ctypes.c_double), ("unrotate", ctypes.c_double),
    )  # fmt: skip


class _Choose(ctypes.Structure):
    """`Choose` in cpu_select.cpp."""

    _fields_ = (
        ("list", _List),
        *((name, ctypes.c_void_p) for name in ("scores", "pages_out", "counts_out")),
        *((name, ctypes.c_int64) for name in ("out_stride", "heads", "group", "room", "least", "share", "newest")),
        ("norm_step", ctypes.c_double), ("share_steps", ctypes.c_int64),
    )  # fmt: skip


class CpuSelect(CpuKernel):
    """Scoring and choosing on the CPU; everything stands in host memory. A KV head has at most `CPU_MAX_GROUP` query
    heads."""

    source = "cpu_select"

    def __init__(self, cache_dir: Path | None) -> None:
        super().__init__(cache_dir)
        self._score = self._function("longrun_score_pages", ctypes.POINTER(_Score), returns=ctypes.c_int64)
        self._choose = self._function("longrun_choose_pages", ctypes.POINTER(_Choose))

    def score_pages(
        self, q: Tensor, view: PageView, digest: Tensor, *, lam: float, softmax_scale: float, out: Tensor
    ) -> Tensor:
        """See `page_score.score_pages`."""
        longest = self.prepare_score(q, view, digest, lam=lam, softmax_scale=softmax_scale, out=out)()
        assert longest <= out.shape[2], f"a list of {longest} pages, and room for {out.shape[2]} scores"
        return out

    def prepare_score(
        self, q: Tensor, view: PageView, digest: Tensor, *, lam: float, softmax_scale: float, out: Tensor
    ) -> PreparedCall:
        """`score_pages` to be run again and again, with as many threads as now; returns the longest list's length, and
        scores no more than there is room for."""
        fmt = check_score_shapes(q, view, digest, out)
        check_view(view)
        heads, group, dim = q.shape
        assert group <= CPU_MAX_GROUP and fmt.groups <= 16
        call = _Score(
            _list(view), *addresses((q, digest, out)), digest.stride(0), heads, group, dim, fmt.centre_bits, fmt.groups,
            out.shape[2], q.dtype == torch.bfloat16, torch.get_num_threads(), softmax_scale, lam,
            rotation_scales(dim)[1],
        )  # fmt: skip
        return PreparedCall(self._score, call, tensors=(q, digest, out, view.pages, view.begins, view.counts))

    def choose_pages(
        self, scores: Tensor, view: PageView, *, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor
    ) -> None:
        """See `page_choose.choose_pages`: the same pages."""
        self.prepare_choose(
            scores, view, budget=budget, newest=newest, pages_out=pages_out, counts_out=counts_out
        )()  # fmt: skip

    def prepare_choose(
        self, scores: Tensor, view: PageView, *, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor
    ) -> PreparedCall:
        """`choose_pages` to be run again and again."""
        check_choose_shapes(scores, view, budget, newest, pages_out, counts_out)
        check_view(view)
        tensors = scores, pages_out, counts_out
        call = _Choose(
            _list(view), *addresses(tensors), pages_out.stride(0), *scores.shape, budget.pages, budget.share, newest,
            NORM_STEP, SHARE_STEPS,
        )  # fmt: skip
        return PreparedCall(self._choose, call, tensors=(*tensors, view.pages, view.begins, view.counts))


def _list(view: PageView) -> _List:
    return _List(
        view.pages.data_ptr(), view.pages.stride(0), view.begins.data_ptr(), view.counts.data_ptr(), view.skip,
        view.limit,
    )  # fmt: skip
