"""Decode attention straight from quantized pages in CUDA C++ (`page_decode.cu`), compiled at run time: the fast kernel.

Same meaning as `page_decode.decode_attention` (Triton), for NVIDIA GPUs from sm_80 on. Why it exists next to Triton's:
the unpacked registers are the tensor core's operand here, nothing unpacked crosses shared memory, and every warp has
pages in flight of its own.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cuda_module import CudaModule, CudaUnavailable
from longrun.kernels.page_decode import _LOG2E, PAGE_SIZE, Workspace, check_shapes
from longrun.kernels.page_view import ExactTokens, PageView
from longrun.quant.kv_format import PageFormat

SOURCE = Path(__file__).with_name("page_decode.cu")
WARPS = 4
MAX_SPLITS = 1024
_RESERVED = 1024  # bytes of shared memory that every block costs besides its own


def stage_bytes(head_dim: int) -> int:
    """Bytes of one page in shared memory, as `page_decode.cu` lays it out: page and index with 384 bytes of padding."""
    return 64 * head_dim + 4 * 32 + 8 * 32 + 4 * head_dim + 4 * 64


class CudaPageDecode:
    """The compiled kernels for one head_dim and page format on the current device; make one and keep it.

    Args:
        kv_format: the pages', "int4" or "k5v3".
        stages: pages in shared memory a warp, the one in work counted in.
        blocks_per_sm: fewer where a multiprocessor's shared memory has no room for so many.

    Raises:
        CudaUnavailable: GPU older than sm_80, no NVRTC, or the compilation failed.
    """

    def __init__(
        self, head_dim: int, *, kv_format: str = "int4", stages: int = 2, warps: int = WARPS, blocks_per_sm: int = 2
    ) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if properties.major < 8:
            raise CudaUnavailable(
                f"{properties.name} is sm_{properties.major}{properties.minor}: sm_80 or newer is needed"
            )
        block_bytes = warps * stages * stage_bytes(head_dim) + _RESERVED
        blocks_per_sm = min(blocks_per_sm, properties.shared_memory_per_multiprocessor // block_bytes)
        if blocks_per_sm < 1:
            raise CudaUnavailable(f"{properties.name} has no room for {stages} pages of {warps} warps in shared memory")
        shared = max(warps * stages * stage_bytes(head_dim), warps * 8 * (head_dim + 2) * 4)
        defines = {"HEAD_DIM": head_dim, "STAGES": stages, "WARPS": warps, "KEY_BITS": _key_bits(kv_format, head_dim)}
        module = CudaModule(SOURCE.read_text(), defines)
        self.head_dim, self.kv_format, self.warps, self.stages = head_dim, kv_format, warps, stages
        self._blocks = properties.multi_processor_count * blocks_per_sm
        self._split = module.kernel("page_decode_split", shared)
        self._merge = module.kernel("page_decode_merge")

    def default_splits(self, num_heads: int) -> int:
        """Blocks a head, so that all of them run at once: fixed per machine and shape, never by length."""
        return min(MAX_SPLITS, max(1, self._blocks // num_heads))

    def decode_attention(
        self, q: Tensor, view: PageView, exact: ExactTokens | None, *, softmax_scale: float = 1.0,
        workspace: Workspace | None = None, out: Tensor | None = None, lse: Tensor | None = None,
        splits: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `page_decode.decode_attention`. q enters the tensor cores as float16 (exact for bfloat16 in range)."""
        check_shapes(q, view, exact)
        heads, group, dim = q.shape
        assert dim == self.head_dim and view.fmt.name == self.kv_format and view.index is not None
        if workspace is None:
            workspace = Workspace.empty(heads, splits or self.default_splits(heads), group, dim, q.device)
        splits = workspace.out.shape[1]
        assert splits <= MAX_SPLITS
        assert workspace.out.shape == (heads, splits, group, dim) and workspace.stats.shape == (heads, splits, group, 2)
        out = q.new_empty(q.shape, dtype=torch.float32) if out is None else out
        lse = q.new_empty(heads, group, dtype=torch.float32) if lse is None else lse
        none, zero = c_void_p(), c_int64()
        exact_args = none, none, zero, none, none, zero, none
        if exact is not None:
            exact_args = (
                _address(exact.sink_k), _address(exact.sink_v), c_int64(exact.sink_k.stride(0)),
                _address(exact.tail_k), _address(exact.tail_v), c_int64(exact.tail_k.stride(0)),
                _address(exact.lengths),
            )  # fmt: skip
        args = (
            _address(q), c_int(q.dtype == torch.bfloat16), _address(view.storage),
            none if view.other is None else _address(view.other), c_int(view.other_slot),
            _address(view.table), c_int64(view.table.stride(0)),
            _address(view.index), c_int64(view.index.stride(0) * 2),
            _address(view.pages), c_int64(view.pages.stride(0)),
            _address(view.begins), _address(view.counts), _address(view.first),
            c_int(view.skip), c_int(view.limit), c_int(view.sink_size), c_int(view.fmt.sink_pages * PAGE_SIZE),
            *exact_args, _address(workspace.out), _address(workspace.stats), c_int(group), c_int(splits),
            c_float(softmax_scale * _LOG2E),
        )  # fmt: skip
        self._split.launch(heads * splits, (32 * self.warps, 1), args)
        args = (
            _address(workspace.out),
            _address(workspace.stats),
            _address(out),
            _address(lse),
            c_int(group),
            c_int(splits),
        )
        self._merge.launch(heads * group, (dim, 4), args)
        return out, lse


def _key_bits(kv_format: str, head_dim: int) -> int:
    fmt = PageFormat(kv_format, PAGE_SIZE, head_dim)
    assert fmt.quantized, kv_format
    return fmt.key_bits


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
