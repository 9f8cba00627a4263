"""How fast the worker read, wrote and loaded a session last."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from longrun.server.jobs import Event, Finished, Loaded, Piece, Progress


@dataclass(frozen=True)
class Rate:
    """So many tokens within so many seconds."""

    tokens: int
    seconds: float


class Pace:
    """The last reading, whole answer and loading of a session, from the events of jobs; all on the worker's thread.

    Attributes:
        reading: tokens that were read and not held before; writing: tokens that were written; loading: tokens of a
            document's session that came from disk. None before the first.
    """

    def __init__(self) -> None:
        self.reading: Rate | None = None
        self.writing: Rate | None = None
        self.loading: Rate | None = None

    def watched(self, emit: Callable[[Event], None]) -> Callable[[Event], None]:
        """`emit` of one job, whose events are timed on their way."""
        begun = read = text = time.perf_counter()

        def emit_timed(event: Event) -> None:
            nonlocal begun, read, text
            if isinstance(event, Progress):
                read = text = time.perf_counter()
                if event.processed == event.cached:
                    begun = read
                else:
                    self.reading = Rate(event.processed - event.cached, read - begun)
            elif isinstance(event, Loaded):
                self.loading = Rate(event.tokens, event.seconds)
            elif isinstance(event, Piece):
                text = time.perf_counter()
            elif isinstance(event, Finished) and event.new_tokens > 1 and text > read:
                # The first token needs no step of its own: it comes from what was read.
                self.writing = Rate(event.new_tokens - 1, text - read)
            emit(event)

        return emit_timed
