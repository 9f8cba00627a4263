"""Slots for host pages that were chosen lately, on a GPU (`hot_pages.cu`), compiled at run time."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from longrun.kernels.cuda_module import CudaModule
from longrun.kernels.hot_pages import HotPages, check_hot_shapes
from longrun.kernels.page_view import PageView

SOURCE = Path(__file__).with_name("hot_pages.cu")
LOOKUP_THREADS = 512
FETCH_THREADS = 128
FETCH_BLOCKS = 64  # each with a page in flight: the link is full with few
_BIT_BYTES = 32 * 1024  # of shared memory that a lookup's block has for a bit a slot
MOST_SLOTS = 8 * _BIT_BYTES


def defines_of(payload_bytes: int, lookup_threads: int = LOOKUP_THREADS) -> dict[str, int]:
    """What the compiler of `hot_pages.cu` has to know."""
    assert payload_bytes % 16 == 0, payload_bytes
    return {"PAYLOAD": payload_bytes, "THREADS": lookup_threads, "FETCH_THREADS": FETCH_THREADS}


class CudaHotPages:
    """The compiled kernels for pages of one size on the current device; make one and keep it.

    Args:
        payload_bytes: of a page, a multiple of 16.
        fetch_blocks: thread blocks that fetch, each with a page on its way.

    Raises:
        CudaUnavailable: no NVRTC, or the compilation failed.
    """

    def __init__(self, payload_bytes: int, *, fetch_blocks: int = FETCH_BLOCKS) -> None:
        module = CudaModule(SOURCE.read_text(), defines_of(payload_bytes))
        self.payload_bytes, self.fetch_blocks, self.lookup_threads = payload_bytes, fetch_blocks, LOOKUP_THREADS
        self._lookup, self._fetch = module.kernel("hot_pages_lookup", _BIT_BYTES), module.kernel("hot_pages_fetch")

    def hot_lookup(self, view: PageView, hot: HotPages) -> None:
        """See `hot_pages.hot_lookup`; nothing waits, and a captured graph reads the lists when it runs."""
        check_hot_shapes(view, hot)
        assert view.fmt.payload_bytes == self.payload_bytes and hot.slots <= MOST_SLOTS
        heads = view.num_heads
        args = (
            _address(view.table), c_int64(view.table.stride(0)), _address(view.pages), c_int64(view.pages.stride(0)),
            _address(view.begins), _address(view.counts), c_int(view.skip), c_int(view.limit), c_int(view.other_slot),
            _address(hot.table), c_int64(hot.table.stride(0)), _address(hot.order), _address(hot.owner),
            c_int(hot.hot_heads), c_int(hot.slots), _address(hot.missed), c_int(hot.missed.shape[1]),
            _address(hot.counts),
        )  # fmt: skip
        self._lookup.launch(heads, (self.lookup_threads, 1), args)

    def hot_fetch(self, view: PageView, hot: HotPages) -> None:
        """See `hot_pages.hot_fetch`; nothing waits."""
        check_hot_shapes(view, hot)
        assert view.other is not None and view.other.data_ptr() % 16 == hot.memory.data_ptr() % 16 == 0
        blocks = self.fetch_blocks
        args = (
            _address(view.other), _address(hot.memory), _address(hot.missed), c_int(hot.missed.shape[1]),
            _address(hot.counts), c_int(view.num_heads), c_int(blocks),
        )  # fmt: skip
        self._fetch.launch(blocks, (FETCH_THREADS, 1), args)


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
