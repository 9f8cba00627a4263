"""The compiled CPU kernels of `cpu_pages.cpp`: built once per machine with the C++ compiler found there, called through
ctypes on tensors' memory. Signatures are those of the torch references in `page_view`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.kernels.page_view import ExactTokens, PageView, check_view


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


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


class CpuPageKernels(CpuKernel):
    """Decode attention and dequantization of int4 and k5v3 pages on the CPU, as fast as their bits can be unpacked."""

    source = "cpu_pages"

    def decode_attention(
        self, q: Tensor, view: PageView | None, exact: ExactTokens | None, *, softmax_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See `page_view.decode_attention`; q float32, contiguous, and everything on the CPU."""
        heads, group, dim = q.shape
        assert q.dtype == torch.float32 and q.is_contiguous()
        q = q if softmax_scale == 1.0 else q * softmax_scale
        out, lse = torch.empty_like(q), q.new_empty(heads, group)
        page_size, key_bits, itemsize = 64, 4, 4
        if view is None:
            nothing = torch.zeros(heads, dtype=torch.int32)
            pages = _View(begins=nothing.data_ptr(), counts=nothing.data_ptr(), first=nothing.data_ptr())
        else:
            assert heads == view.num_heads and dim == view.fmt.head_dim
            pages, page_size, key_bits = _view(view), view.fmt.page_size, view.fmt.key_bits
        exact_args: list[ctypes.c_void_p | ctypes.c_int64 | None] = [None, None, _int(0)] * 2
        if exact is None:
            lengths = torch.zeros(3, dtype=torch.int32)
        else:
            exact_args, itemsize, lengths = [], exact.tail_k.element_size(), exact.lengths
            assert lengths.dtype == torch.int32 and lengths.shape == (3,) and lengths.is_contiguous()
            for k, v in ((exact.sink_k, exact.sink_v), (exact.tail_k, exact.tail_v)):
                assert k.stride() == v.stride() and k.stride(2) == 1 and k.stride(1) == dim
                assert k.dtype == v.dtype == exact.tail_k.dtype and k.dtype in (torch.bfloat16, torch.float32)
                exact_args += [_address(k), _address(v), _int(k.stride(0))]
        self._lib.longrun_decode(
            _address(q), _address(out), _address(lse), _int(heads), _int(group), _int(dim), _int(page_size),
            _int(key_bits), ctypes.byref(pages), *exact_args, _address(lengths), _int(itemsize),
            _int(torch.get_num_threads()),
        )  # fmt: skip
        return out, lse

    def dequantize_pages(self, view: PageView, k_out: Tensor, v_out: Tensor) -> None:
        """See `page_view.dequantize_pages`; outputs float32 or bfloat16, each head's rows contiguous."""
        fmt = view.fmt
        assert k_out.shape == v_out.shape and k_out.shape[0] == view.num_heads and k_out.shape[2] == fmt.head_dim
        assert k_out.stride() == v_out.stride() and k_out.stride(2) == 1 and k_out.stride(1) == fmt.head_dim
        assert k_out.dtype == v_out.dtype and k_out.dtype in (torch.float32, torch.bfloat16)
        room = k_out.shape[1] // fmt.page_size
        longest = self._lib.longrun_dequantize(
            _address(k_out), _address(v_out), _int(k_out.stride(0)), _int(k_out.element_size()), _int(room),
            _int(view.num_heads), _int(fmt.head_dim), _int(fmt.page_size), _int(fmt.key_bits),
            ctypes.byref(_view(view)), _int(torch.get_num_threads()),
        )  # fmt: skip
        assert longest <= room, f"a list of {longest} pages, and room for {room}"
