"""The compiled CPU kernels of `cpu_pages.cpp`: built once per machine with the C++ compiler found there, called through
ctypes on tensors' memory. Signatures are those of the torch references in `page_view`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.kernels.page_view import ExactTokens, PageView, check_view
from longrun.kernels.prepared_call import PreparedCall, addresses


class _View(ctypes.Structure):
    """`View` of cpu_pages.cpp."""

    _fields_ = (
        ("storage", ctypes.c_void_p), ("other", ctypes.c_void_p),
        ("other_slot", ctypes.c_int64), ("payload_bytes", ctypes.c_int64),
        ("table", ctypes.c_void_p), ("table_stride", ctypes.c_int64),
        ("index", ctypes.c_void_p), ("index_stride", ctypes.c_int64),
        ("pages", ctypes.c_void_p), ("pages_stride", ctypes.c_int64),
        ("begins", ctypes.c_void_p), ("counts", ctypes.c_void_p), ("first", ctypes.c_void_p),
        ("skip", ctypes.c_int64), ("limit", ctypes.c_int64), ("sink_size", ctypes.c_int64), ("origin", ctypes.c_int64),
    )  # fmt: skip


def _view(view: PageView) -> _View:
    check_view(view)
    fmt = view.fmt
    assert fmt.quantized and fmt.key_bits in (4, 5) and view.index is not None
    other = None if view.other is None else view.other.data_ptr()
    return _View(
        view.storage.data_ptr(), other, view.other_slot, fmt.payload_bytes, view.table.data_ptr(), view.table.stride(0),
        view.index.data_ptr(), view.index.stride(0), view.pages.data_ptr(), view.pages.stride(0),
        view.begins.data_ptr(), view.counts.data_ptr(), view.first.data_ptr(),
        view.skip, view.limit, view.sink_size, fmt.sink_pages * fmt.page_size,
    )  # fmt: skip


class _Decode(ctypes.Structure):
    """`Decode` of cpu_pages.cpp."""

    _fields_ = (
        ("view", _View),
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "out", "lse", "sink_k", "sink_v", "tail_k", "tail_v", "lengths")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "sink_stride", "tail_stride", "heads", "group", "head_dim", "page_size", "key_bits", "itemsize",
                "q_bf16", "threads",
            )
        ),
        ("softmax_scale", ctypes.c_double),
    )  # fmt: skip


class CpuPageKernels(CpuKernel):
    """Decode attention and dequantization of int4 and k5v3 pages on the CPU, as fast as their bits can be unpacked."""

    source = "cpu_pages"

    def __init__(self, cache_dir: Path | None) -> None:
        super().__init__(cache_dir)
        self._decode = self._function("longrun_decode", ctypes.POINTER(_Decode))
        self._dequantize = self._function(
            "longrun_dequantize", *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 7, ctypes.POINTER(_View), ctypes.c_int64,
            returns=ctypes.c_int64,
        )  # fmt: skip

    def decode_attention(
        self, q: Tensor, view: PageView | None, exact: ExactTokens | None, *, softmax_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See `page_view.decode_attention`; q contiguous, and everything on the CPU."""
        out, lse = torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)
        self.prepare_decode(q, view, exact, softmax_scale=softmax_scale, out=out, lse=lse)()
        return out, lse

    def prepare_decode(
        self, q: Tensor, view: PageView | None, exact: ExactTokens | None, *, softmax_scale: float = 1.0,
        out: Tensor, lse: Tensor,
    ) -> PreparedCall:  # fmt: skip
        """`decode_attention` to be run again and again, with as many threads as now."""
        heads, group, dim = q.shape
        for result, shape in ((out, q.shape), (lse, q.shape[:2])):
            assert result.shape == shape and result.dtype == torch.float32 and result.is_contiguous()
        assert q.dtype in (torch.float32, torch.bfloat16) and q.is_contiguous()
        nothing = torch.zeros(max(heads, 3), dtype=torch.int32)
        lengths, page_size, key_bits, itemsize = nothing, 64, 4, 4
        spans: tuple[Tensor, ...] = (nothing, nothing, nothing)
        pages = _View(**dict(zip(("begins", "counts", "first"), addresses(spans), strict=True)))
        if view is not None:
            assert heads == view.num_heads and dim == view.fmt.head_dim
            pages, page_size, key_bits = _view(view), view.fmt.page_size, view.fmt.key_bits
            spans = (view.begins, view.counts, view.first, view.storage, view.table, view.pages)
        runs: tuple[Tensor | None, ...] = (None, None, None, None)
        strides = (0, 0)
        if exact is not None:
            runs, itemsize = (exact.sink_k, exact.sink_v, exact.tail_k, exact.tail_v), exact.tail_k.element_size()
            lengths, strides = exact.lengths, (exact.sink_k.stride(0), exact.tail_k.stride(0))
            assert lengths.dtype == torch.int32 and lengths.shape == (3,) and lengths.is_contiguous()
            for k, v in ((exact.sink_k, exact.sink_v), (exact.tail_k, exact.tail_v)):
                assert k.stride() == v.stride() and k.stride(2) == 1 and k.stride(1) == dim
                assert k.dtype == v.dtype == exact.tail_k.dtype and k.dtype in (torch.bfloat16, torch.float32)
        tensors = (q, out, lse, *runs, lengths)
        call = _Decode(
            pages, *addresses(tensors), *strides, heads, group, dim, page_size, key_bits, itemsize,
            q.dtype == torch.bfloat16, torch.get_num_threads(), softmax_scale,
        )  # fmt: skip
        more = () if view is None else (view.index, view.other)
        return PreparedCall(self._decode, call, tensors=(*tensors, *spans, *more))

    def dequantize_pages(self, view: PageView, k_out: Tensor, v_out: Tensor) -> None:
        """See `page_view.dequantize_pages`; outputs float32 or bfloat16, each head's rows contiguous."""
        fmt = view.fmt
        assert k_out.shape == v_out.shape and k_out.shape[0] == view.num_heads and k_out.shape[2] == fmt.head_dim
        assert k_out.stride() == v_out.stride() and k_out.stride(2) == 1 and k_out.stride(1) == fmt.head_dim
        assert k_out.dtype == v_out.dtype and k_out.dtype in (torch.float32, torch.bfloat16)
        room = k_out.shape[1] // fmt.page_size
        longest = self._dequantize(
            k_out.data_ptr(), v_out.data_ptr(), k_out.stride(0), k_out.element_size(), room, view.num_heads,
            fmt.head_dim, fmt.page_size, fmt.key_bits, _view(view), torch.get_num_threads(),
        )  # fmt: skip
        assert longest <= room, f"a list of {longest} pages, and room for {room}"
