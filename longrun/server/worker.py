"""The one thread that owns model and session, and the queue of jobs before it: first come, first served."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from typing import TYPE_CHECKING

from longrun.errors import LongrunError
from longrun.server.jobs import Cancelled, Failed, GaveWay, Job, StoppedError
from longrun.server.pace import Pace

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.server.answerer import Answerer
    from longrun.specs.hot_counts import HotCounts

_LEAVING = "the server is shutting down: ask again when it is back"


class QueueFullError(LongrunError):
    """As many requests wait as may."""


class Worker:
    """Answers jobs in the order in which they came, one at a time.

    Args:
        runtime: a model with a tokenizer; from `start` on only this worker's thread runs it.
        most_waiting: jobs that may wait.

    Attributes:
        pace: how fast it read, wrote and loaded last.
        hot: what the session's decode steps chose of host pages, up to the last answer; None before it or without a
            hot pool.
    """

    def __init__(self, runtime: Runtime, most_waiting: int) -> None:
        self._runtime, self.most_waiting = runtime, most_waiting
        self.pace = Pace()
        self.hot: HotCounts | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._answerer: Answerer | None = None
        self._failed: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longrun-worker", daemon=True)

    def start(self) -> None:
        """Start the thread, which makes the session; returns when it has.

        Raises:
            LongrunError: there is no memory for it.
        """
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def submit(self, job: Job) -> None:
        """Put the job at the queue's end.

        Raises:
            QueueFullError: too many wait.
            StoppedError: the worker was closed.
        """
        with self._changed:
            if self._closed:
                raise StoppedError(_LEAVING)
            self._waiting = deque(other for other in self._waiting if not other.is_cancelled)
            if len(self._waiting) >= self.most_waiting:
                raise QueueFullError(
                    f"{len(self._waiting):,} requests wait already, which is the most that may: ask again later, or "
                    f"start the server with a larger --queue"
                )
            self._waiting.append(job)
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue whose clients are still there."""
        with self._changed:
            return sum(not job.is_cancelled for job in self._waiting)

    @property
    def num_running(self) -> int:
        """1 while a job is being answered, else 0."""
        return 0 if self._running is None else 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the session holds."""
        return 0 if self._answerer is None else self._answerer.num_tokens

    @property
    def sparse_tokens(self) -> int:
        """Those of them that were read sparsely."""
        return 0 if self._answerer is None else self._answerer.sparse_tokens

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failed is None

    def close(self) -> None:
        """Take no more jobs and end all others with an error, between two steps; does not wait, and may be called from
        a signal's handler."""
        self._closed = True
        for job in (*list(self._waiting), self._running):
            if job is not None:
                job.stop(_LEAVING)
        threading.Thread(target=self._wake, daemon=True).start()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        from longrun.server.answerer import Answerer

        try:
            self._answerer = Answerer(self._runtime, self._others_wait)
        except BaseException as error:
            self._failed = error
            return
        finally:
            self._ready.set()
        while (job := self._next()) is not None:
            self._serve(job)
            self._running = None
            del job  # its prompt must not stay in memory until the next one comes

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            if self._running is not None and self._closed:
                self._running.stop(_LEAVING)
            return self._running

    def _others_wait(self) -> bool:
        with self._changed:
            return any(not job.ask.saves and not job.is_cancelled for job in self._waiting)

    def _serve(self, job: Job) -> None:
        """Answer one job; whatever happens to it, the next one finds a whole session."""
        assert self._answerer is not None
        emit, job.emit = job.emit, self.pace.watched(job.emit)
        try:
            job.check()
            self._answerer.answer(job)
            self.hot = self._answerer.hot_counts
        except Cancelled:
            pass
        except GaveWay:
            job.emit = emit
            with self._changed:
                self._waiting.append(job)
        except StoppedError as error:
            job.emit(Failed(error))
        except Exception as error:
            if not isinstance(error, LongrunError):
                traceback.print_exc()
            try:
                self._answerer.forget()
            finally:
                job.emit(Failed(error))
