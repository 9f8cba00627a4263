"""Host pages on their way to the GPU: two halves of the fetch buffer, one filling while the other is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longrun.kernels.page_view import PageView


class PageFetcher:
    """Fetches the host pages of views ahead of their readers, on a stream of its own; CUDA graphs capture it all.

    Args:
        buffer: uint8 [fetch_pages, payload_bytes] on the compute device.
        max_heads, max_pages: shape of the largest page table; two tables of this size say where fetched pages stand.
        fetch_pages: `kernels.page_copy.fetch_pages` or its reference.
        on_gpu: False runs fetch and reader in turn, for devices without streams.
    """

    def __init__(
        self, buffer: Tensor, max_heads: int, max_pages: int, fetch_pages: Callable[..., None], on_gpu: bool
    ) -> None:
        half = buffer.shape[0] // 2
        self._halves = (buffer[:half], buffer[half : 2 * half])
        shape = (2, max_heads if half else 0, max_pages)
        self._tables = torch.zeros(shape, dtype=torch.int32, device=buffer.device)
        self._fetch_pages = fetch_pages
        self._stream = torch.cuda.Stream() if on_gpu and half else None

    @property
    def nbytes(self) -> int:
        """Bytes of the two tables."""
        return self._tables.nbytes

    def per_round(self, num_heads: int) -> int:
        """Pages of each of `num_heads` heads that one half holds."""
        return len(self._halves[0]) // num_heads

    def readable(self, views: Iterable[PageView]) -> Iterator[PageView]:
        """The views in turn, each with its host pages in a half of the buffer; the next one is fetched meanwhile, and
        the first from the call on.

        Args:
            views: of at most `per_round` pages a head. The reader must have queued its reading of a view on the
                current stream by the time it asks for the next.
        """
        waiting = iter(views)
        return self._rounds(waiting, self._start(next(waiting, None), 0, None))

    def _rounds(self, waiting: Iterator[PageView], ready: Any) -> Iterator[PageView]:
        freed: list[Any] = [None, None]
        turn = 0
        while ready is not None:
            following = self._start(next(waiting, None), 1 - turn, freed[1 - turn])
            view, wait = ready
            wait()
            yield view
            freed[turn] = self._mark()
            ready, turn = following, 1 - turn

    def _start(self, view: PageView | None, half: int, freed: Any) -> tuple[PageView, Callable[[], None]] | None:
        """Queue a fetch once its half is free: the readable view and how to wait for it, or None without a view."""
        if view is None:
            return None
        buffer, table = self._halves[half], self._tables[half, : view.num_heads]
        per_round = self.per_round(view.num_heads)
        assert view.limit <= per_round, (view.limit, per_round)
        fetch = partial(self._fetch_pages, view, buffer, table, per_round)
        if self._stream is None:
            return view.fetched(buffer, table), fetch
        # Without an earlier reader in this pass, everything queued so far comes first: it may still read the half.
        self._stream.wait_event(freed or self._mark())
        with torch.cuda.stream(self._stream):
            fetch()
            done = self._mark(self._stream)
        return view.fetched(buffer, table), lambda: torch.cuda.current_stream().wait_event(done)

    def _mark(self, stream: Any = None) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(stream or torch.cuda.current_stream())
        return event
