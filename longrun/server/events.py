"""The events of a job, from the worker's thread to asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from longrun.server.jobs import Ask, Event, Failed, Finished, Job, Loaded, Piece
from longrun.server.metrics import Metrics
from longrun.server.worker import Worker


class Events:
    """The events of one job, for asyncio. Made within the event loop; the job is in the queue then.

    Raises:
        QueueFullError, StoppedError: it was not taken.
    """

    def __init__(self, worker: Worker, ask: Ask, seconds: float, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.ask, self._metrics = ask, metrics
        self._job = Job(ask, self._emit, seconds)
        worker.submit(self._job)

    def _emit(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop has ended, and so has everybody who waited
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._job.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events up to `Finished`; where the caller leaves before, the job is cancelled.

        Raises:
            Exception: what the job failed with.
        """
        began, finished, silent = time.perf_counter(), None, True
        try:
            while finished is None:
                event = await self._queue.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Loaded):
                    self._metrics.loaded(event.seconds)
                    event.report()
                if isinstance(event, Piece) and silent:
                    silent = False
                    self._metrics.first_text(time.perf_counter() - began)
                finished = event if isinstance(event, Finished) else None
                yield event
        finally:
            self.cancel()
            self._metrics.ended(finished)
