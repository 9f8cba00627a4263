"""The compiled CPU kernels of `cpu_pages.cpp`: built once per machine with the C++ compiler found there, called through
ctypes on tensors' memory. Signatures are those of the torch references in `page_view`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import load_cpu_library
from longrun.kernels.page_view import ExactRun, PageRun


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _check_run(run: PageRun) -> None:
    assert run.fmt.quantized and run.fmt.key_bits in (4, 5) and run.index is not None
    assert run.storage.dtype == torch.uint8 and run.storage.is_contiguous()
    assert run.table.dtype == torch.int32 and run.table.stride(1) == 1
    assert run.index.dtype == torch.float16 and run.index[0].is_contiguous()


class CpuPageKernels:
    """Decode attention and dequantization of int4 and k5v3 pages on the CPU, as fast as their bits can be unpacked.

    Args:
        cache_dir: keeps the compiled library; None, or one that cannot: it is compiled for this process alone.

    Attributes:
        notices: what was wrong with a kept library or its folder.

    Raises:
        KernelUnavailable: no compiler, or the build failed.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._lib, self.notices = load_cpu_library("cpu_pages", cache_dir)

    def decode_attention(self, q: Tensor, pages: PageRun | None, exact: tuple[ExactRun, ...]) -> tuple[Tensor, Tensor]:
        """See `page_view.decode_attention`; q float32, contiguous."""
        heads, group, dim = q.shape
        assert q.dtype == torch.float32 and q.is_contiguous() and len(exact) <= 2
        out, lse = torch.empty_like(q), q.new_empty(heads, group)
        if pages is not None and pages.count:
            _check_run(pages)
            table, index, storage = pages.table[:, pages.first :], pages.index[:, pages.first :], pages.storage
            page_size, key_bits, payload = pages.fmt.page_size, pages.fmt.key_bits, pages.fmt.payload_bytes
            pool = ctypes.c_void_p(storage.data_ptr() - pages.slot_offset * payload)
            page_args = (
                pool, _int(payload), _address(table), _int(table.stride(0)),
                _address(index), _int(index.stride(0)), _int(pages.count),
            )  # fmt: skip
        else:
            page_size, key_bits = 64, 4
            page_args = (None, _int(0), None, _int(0), None, _int(0), _int(0))
        exact_args: list[ctypes.c_void_p | ctypes.c_int64 | None] = []
        itemsize = 4
        for run in (*exact, None, None)[:2]:
            if run is None:
                exact_args += [None, None, _int(0), _int(0)]
                continue
            assert run.k.stride() == run.v.stride() and run.k.stride(2) == 1 and run.k.stride(1) == dim
            itemsize = run.k.element_size()
            assert run.k.dtype in (torch.bfloat16, torch.float32)
            exact_args += [_address(run.k), _address(run.v), _int(run.k.stride(0)), _int(run.num_tokens)]
        self._lib.longrun_decode(
            _address(q), _address(out), _address(lse), _int(heads), _int(group), _int(dim), _int(page_size),
            _int(key_bits), *page_args, *exact_args, _int(itemsize), _int(torch.get_num_threads()),
        )  # fmt: skip
        return out, lse

    def dequantize_run(self, run: PageRun, k_out: Tensor, v_out: Tensor) -> None:
        """See `page_view.dequantize_run`; outputs float32 or bfloat16, each head's rows contiguous."""
        _check_run(run)
        assert k_out.stride() == v_out.stride() and k_out.stride(2) == 1 and k_out.stride(1) == run.fmt.head_dim
        assert k_out.dtype == v_out.dtype and k_out.dtype in (torch.float32, torch.bfloat16)
        assert k_out.shape == (run.table.shape[0], run.count * run.fmt.page_size, run.fmt.head_dim)
        self._lib.longrun_dequantize(
            _address(k_out), _address(v_out), _int(k_out.stride(0)), _int(k_out.element_size()),
            _int(k_out.shape[0]), _int(run.fmt.head_dim), _int(run.fmt.page_size), _int(run.fmt.key_bits),
            ctypes.c_void_p(run.storage.data_ptr() - run.slot_offset * run.fmt.payload_bytes),
            _int(run.fmt.payload_bytes), _address(run.table), _int(run.table.stride(0)),
            _address(run.index), _int(run.index.stride(0)), _int(run.first), _int(run.count),
            _int(torch.get_num_threads()),
        )  # fmt: skip
