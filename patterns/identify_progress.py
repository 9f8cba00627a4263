"""Progress of an identification: one line written over on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from longrun.cli import redraws
from longrun.patterns.identify_settings import IdentifyProgress

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Shows the `on_progress` calls of `identify`; the time left counts this run's steps alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressLine:
        if redraws(self._console):
            self._live = Live(Text("loading model and text"), console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: IdentifyProgress) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = (progress.step, now)
        line = describe(progress, *self._first, now)
        if self._live is not None:
            self._live.update(Text(line), refresh=True)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or progress.step == progress.num_steps:
            self._last_line = now
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(progress: IdentifyProgress, first_step: int, first_time: float, now: float) -> str:
    """The line: step, loss, heads below 0.5, tokens of the text, and time left from the second step of a run on."""
    parts = [f"step {progress.step:,} of {progress.num_steps:,}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.num_low is not None:
        parts.append(f"{progress.num_low} of {progress.num_heads} heads below 0.5")
    if progress.tokens is not None:
        parts.append(f"{progress.tokens:,} tokens")
    if progress.step > first_step:
        left = (now - first_time) / (progress.step - first_step) * (progress.num_steps - progress.step)
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    return ", ".join(parts)
