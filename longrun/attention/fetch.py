"""Host pages on their way to the GPU: two halves of the fetch buffer, one filling while the other is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class DoubleBuffer:
    """Runs fetches ahead of their readers on a stream of their own; CUDA graphs capture the whole pattern.

    Args:
        buffer: uint8 [fetch_pages, payload_bytes] on the compute device.
        on_gpu: False runs fetch and reader in turn, for devices without streams.

    Attributes:
        half_pages: pages of one half.
    """

    def __init__(self, buffer: Tensor, on_gpu: bool) -> None:
        self.half_pages = buffer.shape[0] // 2
        self._halves = (buffer[: self.half_pages], buffer[self.half_pages : 2 * self.half_pages])
        self._stream = torch.cuda.Stream() if on_gpu and self.half_pages else None

    def each(self, fetches: Iterable[Callable[[Tensor], None]]) -> Iterator[Tensor]:
        """Yield the half that holds each fetch's pages, in order; the next fetch runs meanwhile, and the first
        one from the call on.

        Args:
            fetches: called with the half to fill. The reader must have queued its reading of a half on the current
                stream by the time it asks for the next.
        """
        waiting = iter(fetches)
        return self._rounds(waiting, self._start(next(waiting, None), 0, None))

    def _rounds(self, waiting: Iterator[Callable[[Tensor], None]], ready: Any) -> Iterator[Tensor]:
        freed: list[Any] = [None, None]
        turn = 0
        while ready is not None:
            following = self._start(next(waiting, None), 1 - turn, freed[1 - turn])
            self._wait(ready)
            yield self._halves[turn]
            freed[turn] = self._mark()
            ready, turn = following, 1 - turn

    def _start(self, fetch: Callable[[Tensor], None] | None, half: int, freed: Any) -> Any:
        """Queue a fetch once its half is free; what to wait for, or None without a fetch."""
        if fetch is None:
            return None
        if self._stream is None:
            return lambda: fetch(self._halves[half])
        # Without an earlier reader in this pass, everything queued so far comes first: it may still read the half.
        self._stream.wait_event(freed or self._mark())
        with torch.cuda.stream(self._stream):
            fetch(self._halves[half])
            return self._mark(self._stream)

    def _wait(self, ready: Any) -> None:
        if self._stream is None:
            ready()
        else:
            torch.cuda.current_stream().wait_event(ready)

    def _mark(self, stream: Any = None) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(stream or torch.cuda.current_stream())
        return event
