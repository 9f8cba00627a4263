"""The chat's command with a planted model: in this process or another, and what a text hides for it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from run_here import Done, run_here

from longrun.chat.command import chat_command
from longrun.needles.needles import generate_sentences, make_needles

ROOT = Path(__file__).resolve().parents[1]
NEEDLES = make_needles(2, 0)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def spaced(key: str) -> str:
    return " ".join(key)


def ask(number: int) -> str:
    return NEEDLES[number].answer_prefix


def save_text(path: Path) -> None:
    """About 1,900 tokens with two needles."""
    sentences = list(islice(generate_sentences(3), 100))
    sentences.insert(10, NEEDLES[0].sentence)
    sentences.insert(90, NEEDLES[1].sentence)
    path.write_text(" ".join(sentences) + "\n")


def command(model: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "longrun.chat", "--model", str(model), *map(str, arguments)]


def chat_here(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Done]]:
    """The fixture `chat`: a call that runs the command in this process."""
    # one that a test sends is answered once: after it both are ignored
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: str | Path, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return run_here(lambda: chat_command(["--model", str(model), *map(str, arguments)]), capsys)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def saved_tokens(folder: Path) -> int:
    try:
        return json.loads((folder / "manifest.json").read_bytes())["num_tokens"]
    except FileNotFoundError:
        return 0
