"""Progress of what takes long: in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from longrun.cli import redraws

if TYPE_CHECKING:
    from longrun.runtime.auto_head_map import AutoHeadMap

_SECONDS_BETWEEN_LINES = 5.0


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


def _columns(width: int) -> list[ProgressColumn]:
    """As much of the row as a terminal of `width` columns has room for."""
    left = [TextColumn("left"), TimeRemainingColumn()]
    count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens")
    if width >= 85:
        return [TextColumn("reading"), BarColumn(), count, _TokensPerSecond(), *left]
    if width >= 60:
        return [TextColumn("reading"), count, *left]
    share = TextColumn("{task.percentage:.0f}%")
    return [TextColumn("reading"), share, *left] if width >= 30 else [share, TimeRemainingColumn()]


class PrefillProgress:
    """Shows `progress(done, total)` calls of `Session.prefill`.

    Args:
        console: where to; a bar only on a terminal that can write a line over.
        before: tokens of the same message that were read earlier.
    """

    def __init__(self, console: Console, before: int = 0) -> None:
        self._console, self._before = console, before
        self._bar: Progress | None = None
        self._started = self._last_line = time.perf_counter()

    def __enter__(self) -> PrefillProgress:
        if redraws(self._console):
            self._bar = Progress(*_columns(self._console.width), console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        """Show an empty bar, for `total` tokens still to be read."""
        if self._bar is not None:
            self._bar.add_task("prefill", total=self._before + total, completed=self._before)

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            task_id = self._bar.task_ids[0]
            self._bar.update(task_id, completed=self._before + done, total=self._before + total)
            return
        now = time.perf_counter()
        if now - self._last_line < _SECONDS_BETWEEN_LINES or done == total:
            return
        self._last_line = now
        rate = done / (now - self._started)
        self._console.print(
            f"read {self._before + done:,} of {self._before + total:,} tokens, {rate:,.0f} tokens/s, "
            f"{(total - done) / rate:,.0f} s left",
            highlight=False,
        )


def _write_over(console: Console, text: str, short: str, finished: bool) -> None:
    """Write over the line that was written before: `text`, or `short` where the terminal is too narrow for it."""
    line = text if len(text) < console.width else short[: max(1, console.width - 1)]
    console.print(" " * len(line) if finished else line, end="\r", highlight=False)


class PinProgress:
    """Shows `on_pin(done, total)` calls of `longrun.load` and `Runtime.new_session`, in bytes.

    On a terminal one line is written over again and taken away at the end; should pinning fail, the error message is
    written over it. Nothing has to be closed, so that one object serves every session of a runtime.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        text = f"Pinning host memory {done / 2**30:.1f} / {total / 2**30:.1f} GiB"
        if redraws(self._console):
            _write_over(self._console, text, f"Pinning {done / total:.0%}", done == total)
            return
        now = time.perf_counter()
        if now - self._last_line < _SECONDS_BETWEEN_LINES or done == total:
            return
        self._last_line = now
        self._console.print(text, highlight=False)


class HeadMapProgress:
    """Says in one line where the map of `--head-map auto` is kept or being made, and how far that is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = time.perf_counter()

    def __call__(self, head_map: AutoHeadMap) -> None:
        folder, done, total = head_map.folder, head_map.done, head_map.total
        if head_map.kept:
            self._say(f"head map auto: using the one kept in {folder}")
        elif not done:
            self._say(f"head map auto: measuring this model's heads, once; the map will be kept in {folder}")
        elif redraws(self._console):
            _write_over(self._console, f"Measuring heads {done / total:4.0%}", f"{done / total:.0%}", done == total)
        elif time.perf_counter() - self._last_line >= _SECONDS_BETWEEN_LINES and done < total:
            self._say(f"measured {done} of {total} steps")

    def _say(self, text: str) -> None:
        self._last_line = time.perf_counter()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
