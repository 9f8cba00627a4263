"""`make demo`: a long text, a question, and the chat that answers it.

The text is what Python itself says about its statements (`pydoc_data.topics`, PSF licence), about 6,000 tokens of it.
On a terminal the chat stays open after the answer. With --write the text is written, and its path printed.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydoc_data.topics import topics

from longrun.cli import run
from longrun.errors import InputError
from longrun.paths import cache_dir

TOPICS = (
    "assert", "del", "return", "raise", "try", "with", "global", "nonlocal", "yield", "if", "pass", "lambda", "while",
    "for", "break", "continue",
)  # fmt: skip
QUESTION = "What is a lambda expression?"


def write_text(folder: Path) -> Path:
    """Write the text into `folder`, created where it is missing; returns the file.

    Raises:
        InputError: this Python lacks a topic, or the folder cannot be written.
    """
    missing = [name for name in TOPICS if name not in topics]
    if missing:
        raise InputError(f"this Python's help has no topic {missing[0]!r}: use Python 3.11 to 3.13")
    path = folder / "python-statements.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(topics[name].strip() for name in TOPICS) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): set LONGRUN_CACHE to another folder") from error
    return path


def main() -> None:
    """Write the text and become the chat."""
    if sys.argv[1:] == ["--write"]:
        print(write_text(cache_dir() / "demo"))
        return
    command = ["-m", "longrun.chat", "--file", str(write_text(cache_dir() / "demo")), "--prompt", QUESTION]
    command += ["--max-new-tokens", "120", "--stop", "\n\n"]  # its first paragraph: a model of 135M repeats itself soon
    if sys.stdin.isatty():
        command.append("--interactive")
    else:  # the chat would read what is piped in
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    print("$ python", shlex.join(command).replace("'\n\n'", r"$'\n\n'"), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (sys.path[0], os.getenv("PYTHONPATH"))))}
    os.execve(sys.executable, [sys.executable, *command], environment)


if __name__ == "__main__":
    run(main)
