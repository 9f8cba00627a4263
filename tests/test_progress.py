"""Progress on terminals of any width, and on those that cannot write a line over."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from longrun.chat import progress
from longrun.chat.progress import PinProgress, PrefillProgress
from longrun.patterns.identify_progress import ProgressLine
from longrun.patterns.identify_settings import IdentifyProgress


def terminal(width: int, term: str = "xterm") -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, color_system=None, _environ={"TERM": term}), out


def rows(text: str) -> list[str]:
    """What stood in one row of the terminal at a time."""
    return [row for row in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)) if row.strip()]


@pytest.mark.parametrize("width", [12, 20, 35, 60, 85, 120])
def test_a_row_fits_and_says_how_far_it_is(width):
    console, out = terminal(width)
    with PrefillProgress(console) as bar:
        bar.start(3_300_000)
        bar(1_650_000, 3_300_000)
    for row in rows(out.getvalue()):
        assert len(row) <= width and "…" not in row
    assert "50%" in rows(out.getvalue())[-1] or "1,650,000 of 3,300,000 tokens" in rows(out.getvalue())[-1]
    console, out = terminal(width)
    pin = PinProgress(console)
    pin(2**30, 100 * 2**30)
    pin(100 * 2**30, 100 * 2**30)
    assert "\n" not in out.getvalue() and all(len(row) < width for row in out.getvalue().split("\r"))


def test_a_dumb_terminal_gets_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    console, out = terminal(80, "dumb")
    with PrefillProgress(console) as bar:
        bar.start(1000)
        bar(500, 1000)
    PinProgress(console)(2**30, 2**31)
    with ProgressLine(console) as line:
        line(IdentifyProgress(1, 1))
    said = out.getvalue()
    assert said.startswith("read 500 of 1,000 tokens") and "Pinning host memory 1.0 / 2.0 GiB\n" in said
    assert "step 1 of 1\n" in said and "\r" not in said and "\x1b" not in said
