"""The chat as a person starts it: on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_chat import ENVIRONMENT, NEEDLES, ask, command, spaced

READY = re.escape("\x1b[?2004h")
"""What a terminal is told when it may paste in one piece: the chat waits for a message."""


class Terminal:
    """A chat on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.leader, follower = pty.openpty()
        self.before = termios.tcgetattr(self.leader)
        self.process = subprocess.Popen(
            command(*arguments), stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"}, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> None:
        """Wait until the pattern was shown, and forget what was shown until then."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-2000:]!r}"
            if select.select([self.leader], [], [], 0.2)[0]:
                self.seen += os.read(self.leader, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]

    def close(self) -> None:
        self.process.kill()
        os.close(self.leader)


@pytest.fixture
def start() -> Iterator[type[Terminal]]:
    """Starts a chat."""
    started: list[Terminal] = []

    def begin(*arguments: str | Path) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.close()


def test_on_a_terminal(planted, text_file, start):
    """Progress bar, streaming, Ctrl-C during an answer, pasted text, Ctrl-D."""
    chat = start(
        planted.path, "--ctx", "8K", "--max-new-tokens", "3000", "--chunk-size", "256", "--file", text_file,
        "--prompt", ask(0), "--interactive",
    )  # fmt: skip
    chat.expect("Ctrl-D leaves")
    chat.expect(r"of [\d,]+ tokens")
    chat.expect(spaced(NEEDLES[0].key))
    chat.type("\x03")
    chat.expect("ended by interrupted")
    chat.type("/stats\n")
    chat.expect("documents:")
    chat.expect("ms/token")
    chat.expect(READY)
    chat.type(f"{ask(1)}\r")
    chat.expect(spaced(NEEDLES[1].key))
    chat.type("\x03")
    chat.expect("ended by interrupted")
    chat.expect(READY)
    chat.type(f"\x1b[200~/exit\r/reset\r{ask(0)}\x1b[201~\r")
    chat.expect("what is pasted is a message, never a command")
    chat.expect(spaced(NEEDLES[0].key))
    chat.type("\x03")
    chat.expect("ended by interrupted")
    chat.expect(READY)
    chat.type("\x04")
    assert chat.process.wait(timeout=60) == 0


def test_sigterm_while_a_message_is_typed_leaves_the_terminal_as_it_was(planted, start, tmp_path):
    chat = start(planted.path, "--ctx", "500", "--max-new-tokens", "2", "--session", tmp_path / "kept")
    chat.expect(READY)
    chat.type("The magic number of\r")
    chat.expect("ended by")
    chat.expect(READY)
    chat.type("half a mess")
    chat.expect("mess")
    chat.process.send_signal(signal.SIGTERM)
    chat.expect("terminated")
    assert chat.process.wait(timeout=60) == 143
    assert termios.tcgetattr(chat.leader) == chat.before
    assert (tmp_path / "kept" / "manifest.json").is_file()


def _take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C typed there becomes SIGINT."""
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
