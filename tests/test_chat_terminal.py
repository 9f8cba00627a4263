"""The chat as a person starts it: on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time

from planted_chat import ENVIRONMENT, NEEDLES, ask, command, spaced


def test_on_a_terminal(planted, text_file):
    """Progress bar, streaming, Ctrl-C during an answer, Ctrl-D."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(
            planted.path, "--ctx", "8K", "--max-new-tokens", "3000", "--chunk-size", "256", "--file", text_file,
            "--prompt", ask(0), "--interactive",
        ),
        stdin=follower, stdout=follower, stderr=follower, env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"},
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def expect(pattern: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end, f"no {pattern!r} in {seen[-2000:]!r}"
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536).decode(errors="replace")
        seen = seen[re.search(pattern, seen).end() :]

    try:
        expect("Ctrl-D leaves")
        expect(r"of [\d,]+ tokens")
        expect(spaced(NEEDLES[0].key))
        os.write(leader, b"\x03")
        expect("ended by interrupted")
        os.write(leader, b"/stats\n")
        expect("documents:")
        expect("ms/token")
        expect("> ")
        os.write(leader, f"{ask(1)}\n".encode())
        expect(spaced(NEEDLES[1].key))
        os.write(leader, b"\x03")
        expect("ended by interrupted")
        expect("> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)


def _take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C typed there becomes SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
