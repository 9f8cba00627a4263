"""Scoring and choosing pages in CUDA C++ (`page_select.cu`), compiled at run time: `page_score.score_pages` and
`page_choose.choose_pages` for NVIDIA GPUs from sm_80 on.

Nothing waits for the host: grids depend on shapes only, lists and lengths are read when the kernels run, so one
captured CUDA graph serves all of them. Scoring reads the digests of the listed pages once for all query heads of a KV
head; choosing reads every score twice.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.cuda_module import CudaModule, CudaUnavailable
from longrun.kernels.overlap import overlaps
from longrun.kernels.page_choose import NORM_STEP, SHARE_STEPS, Budget, check_choose_shapes
from longrun.kernels.page_score import check_score_shapes
from longrun.kernels.page_view import PageView, check_view
from longrun.quant.digest_format import DIGEST_HEAD_DIMS, DigestFormat
from longrun.quant.kv_format import GPU_MAX_GROUP, GPU_PAGE_SIZE

SOURCE = Path(__file__).with_name("page_select.cu")
CHOOSING = ("totals", "values", "mark", "write")  # the kernels of a choice, in order
MAX_PARTS = 128  # blocks of a head in a choice
_THREADS, _FINAL_THREADS, _BINS = 256, 1024, 2048  # as page_select.cu has them
_TILE = 4  # pages that a warp takes at a time
_RESERVED = 1024  # bytes of shared memory that every block costs besides its own


def num_parts(max_entries: int) -> int:
    """Blocks of a head in a choice: by the room for scores only, so fixed in a captured graph."""
    return max(1, min(MAX_PARTS, -(-max_entries // _THREADS)))


@dataclass(frozen=True)
class ChoiceWorkspace:
    """Scratch of `CudaPageSelect.choose_pages`. Calls that run one after the other may share it.

    Attributes:
        stats: float32 [num_heads, parts, group, 2]; values: float32 [num_heads, max_entries]; candidates: int32, the
            same; bins: int32 [num_heads, 2048]; chosen: int32 [num_heads, words of 32 entries]; tied, needed: int32
            [num_heads].
    """

    stats: Tensor
    values: Tensor
    candidates: Tensor
    bins: Tensor
    chosen: Tensor
    tied: Tensor
    needed: Tensor

    @classmethod
    def empty(cls, num_heads: int, group: int, max_entries: int, device: torch.device) -> ChoiceWorkspace:
        def integers(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        return cls(
            torch.empty(num_heads, num_parts(max_entries), group, 2, device=device),
            torch.empty(num_heads, max_entries, device=device),
            integers(num_heads, max_entries), integers(num_heads, _BINS), integers(num_heads, -(-max_entries // 32)),
            integers(num_heads), integers(num_heads),
        )  # fmt: skip

    def part(self, num_heads: int) -> ChoiceWorkspace:
        """The same scratch for the choices of fewer heads."""
        return ChoiceWorkspace(*(tensor[:num_heads] for tensor in vars(self).values()))

    @staticmethod
    def bytes_for(num_heads: int, group: int, max_entries: int) -> int:
        words = 2 * group * num_parts(max_entries) + 2 * max_entries + _BINS + -(-max_entries // 32) + 2
        return 4 * num_heads * words


def score_shared_bytes(fmt: DigestFormat, stages: int, warps: int) -> int:
    """Bytes of shared memory of a block that scores, besides the query's."""
    return warps * stages * _TILE * fmt.page_bytes


def score_defines(fmt: DigestFormat, stages: int, warps: int) -> dict[str, int]:
    """What `page_select.cu` is compiled with."""
    return {
        "HEAD_DIM": fmt.head_dim, "CENTRE_BITS": fmt.centre_bits, "STAGES": stages, "WARPS": warps,
        "NORM_STEPS": round(1 / NORM_STEP), "SHARE_STEPS": SHARE_STEPS,
    }  # fmt: skip


class CudaPageSelect:
    """The compiled kernels for one format of digests on the current device; make one and keep it.

    Args:
        stages: tiles of four digests in shared memory a warp, the one in work counted in.
        blocks_per_sm: of the blocks that score; fewer where shared memory has no room for so many.
        overlap: a kernel begins while the one before it ends (sm_90 and newer; no effect on older GPUs).

    Raises:
        ConfigError: pages that the GPU's kernels do not serve.
        CudaUnavailable: GPU older than sm_80, no NVRTC, or the compilation failed.
    """

    def __init__(
        self, fmt: DigestFormat, *, stages: int = 3, warps: int = 4, blocks_per_sm: int = 5, overlap: bool = True
    ) -> None:
        check_digests(fmt)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if properties.major < 8:
            raise CudaUnavailable(
                f"{properties.name} is sm_{properties.major}{properties.minor}: sm_80 or newer is needed"
            )
        shared = score_shared_bytes(fmt, stages, warps)
        query_bytes = 4 * GPU_MAX_GROUP * (fmt.head_dim + 3)
        in_room = properties.shared_memory_per_multiprocessor // (shared + query_bytes + _RESERVED)
        if in_room < 1:
            raise CudaUnavailable(f"{properties.name} has no room for {stages} tiles of {warps} warps in shared memory")
        module = CudaModule(SOURCE.read_text(), score_defines(fmt, stages, warps))
        self.fmt, self.warps = fmt, warps
        self.overlap = overlap and overlaps(torch.device("cuda", torch.cuda.current_device()))
        self._blocks = properties.multi_processor_count * min(blocks_per_sm, in_room)
        self.kernels = {name: module.kernel(f"page_select_{name}") for name in CHOOSING}
        self.kernels["score"] = module.kernel("page_select_score", shared)

    def default_splits(self, num_heads: int) -> int:
        """Blocks a head that score, so that all of them run at once: fixed per machine and shape, never by length."""
        return max(1, self._blocks // num_heads)

    def score_pages(
        self, q: Tensor, view: PageView, digest: Tensor, *, lam: float, softmax_scale: float, out: Tensor
    ) -> Tensor:
        """See `page_score.score_pages`; of a list longer than max_entries only that many are scored. A query has 16
        bits a channel; with lam 0 no half is read.

        Raises:
            ConfigError: more query heads of a KV head than the kernels serve.
        """
        heads, group, _ = q.shape
        assert check_score_shapes(q, view, digest, out) == self.fmt, self.fmt
        check_group(group)
        check_view(view)
        assert digest.data_ptr() % 16 == 0 and digest.stride(0) % 16 == 0
        splits = self.default_splits(heads)
        args = (
            _address(q), c_int(q.dtype == torch.bfloat16), _address(digest), c_int64(digest.stride(0)),
            _address(view.pages), c_int64(view.pages.stride(0)), _address(view.begins), *_lengths(view),
            _address(out), c_int(out.shape[2]), c_int(group), c_int(splits), c_float(softmax_scale), c_float(lam),
        )  # fmt: skip
        self.kernels["score"].launch(heads * splits, (32 * self.warps, 1), args, self.overlap)
        return out

    def choose_pages(
        self, scores: Tensor, view: PageView, *, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor,
        workspace: ChoiceWorkspace | None = None,
    ) -> None:  # fmt: skip
        """See `page_choose.choose_pages`: the same pages, given the same scores.

        Raises:
            ConfigError: more query heads of a KV head than the kernels serve.
        """
        check_choose_shapes(scores, view, budget, newest, pages_out, counts_out)
        check_view(view)
        heads, group, room = scores.shape
        check_group(group)
        space = workspace or ChoiceWorkspace.empty(heads, group, room, scores.device)
        parts, words = num_parts(room), -(-room // 32)
        assert space.stats.shape == (heads, parts, group, 2) and space.values.shape == (heads, room)
        lengths, width, grid = _lengths(view), c_int(room), heads * parts
        values, chosen, tied, needed, bins, candidates = map(
            _address, (space.values, space.chosen, space.tied, space.needed, space.bins, space.candidates)
        )
        common = _address(scores), width, c_int(group), *lengths, _address(space.stats)
        self._launch("totals", grid, *common, bins, tied, c_int(parts))
        self._launch("values", grid, *common, values, bins, c_int(newest), c_int(parts))
        self._launch(
            "mark", grid, values, width, *lengths, bins, chosen, c_int(words), candidates, tied, needed,
            c_int(budget.pages), c_int(budget.share), c_int(parts),
        )  # fmt: skip
        self._launch(
            "write", heads, values, width, _address(view.pages), c_int64(view.pages.stride(0)), _address(view.begins),
            *lengths, chosen, c_int(words), candidates, tied, needed, _address(pages_out),
            c_int64(pages_out.stride(0)), _address(counts_out),
        )  # fmt: skip

    def _launch(self, name: str, grid: int, *args: c_float | c_int | c_int64 | c_void_p) -> None:
        threads = _FINAL_THREADS if name == "write" else _THREADS
        self.kernels[name].launch(grid, (threads, 1), args, self.overlap)


def check_digests(fmt: DigestFormat) -> None:
    """Raise ConfigError where the kernels do not serve the pages of these digests."""
    if fmt.page_size != GPU_PAGE_SIZE or fmt.group_size != 16 or fmt.head_dim not in DIGEST_HEAD_DIMS:
        raise ConfigError(
            f"page_size {fmt.page_size} in groups of {fmt.group_size} has no kernels that select: use {GPU_PAGE_SIZE} "
            f"and 16, or turn selection off"
        )


def check_group(group: int) -> None:
    """Raise ConfigError where the kernels do not serve so many query heads of a KV head."""
    if not 1 <= group <= GPU_MAX_GROUP:
        raise ConfigError(f"{group} query heads a KV head have no kernels that select: the limit is {GPU_MAX_GROUP}")


def _lengths(view: PageView) -> tuple[c_void_p, c_int, c_int]:
    return _address(view.counts), c_int(view.skip), c_int(view.limit)


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
