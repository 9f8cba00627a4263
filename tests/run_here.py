"""Commands in this process, as their programs run them, without the seconds of starting Python anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest

from longrun.cli import run


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


def run_here(main: Callable[[], int | None], capsys: pytest.CaptureFixture, options: Collection[str] = ()) -> Done:
    """Run `main` as `longrun.cli.run` does; what was printed before is dropped."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(main, options)
    captured = capsys.readouterr()
    return Done(left.value.code, captured.out, captured.err)
