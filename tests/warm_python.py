"""Programs in processes of their own that start without the seconds of importing torch: forks of one that holds it.

Run as a program, this file is that one. It imports none of our modules, so that each program still imports all of them.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers.models.llama.modeling_llama")


class WarmPython:
    """Starts programs by the arguments that Python would get: `-m` and a module, or a script, with its arguments.

    Args:
        folder: for what the programs print.
        packages: what the interpreter has imported.
        environment: added to this process's, before anything is imported.
    """

    def __init__(self, folder: Path, packages: Sequence[str] = PACKAGES, **environment: str) -> None:
        self._folder, self._started = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "110", **environment}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *packages], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def asked(self, *question: Any) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: str | Path) -> WarmProgram:
        """The program, running in the repository's root."""
        self._started += 1
        out, err = (self._folder / f"{self._started}-{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()
        return WarmProgram(self, self.asked("start", list(map(str, arguments)), str(out), str(err)), out, err)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Status, stdout and stderr of the program, once it has ended."""
        program = self.start(*arguments)
        status = program.wait()
        return subprocess.CompletedProcess(arguments, status, program.out.read_text(), program.err.read_text())

    def close(self) -> None:
        """It is told to end: stdin has no end as long as any process forked from this one holds it."""
        self._process.stdin.write(json.dumps(["end"]) + "\n")
        self._process.stdin.close()
        assert self._process.wait(60) == 0


@dataclass(frozen=True)
class WarmProgram:
    """A running program, and the files that take what it prints."""

    python: WarmPython
    pid: int
    out: Path
    err: Path

    def poll(self) -> int | None:
        """Its status, if it has ended."""
        return self.python.asked("poll", self.pid)

    def wait(self, seconds: float = 200) -> int:
        until = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it runs on after {seconds} seconds: {self.err.read_text()}")
            time.sleep(0.005)
        return status


def become(arguments: list[str], out: str, err: str) -> NoReturn:
    """Run the program in this process, which ends with it: at once, for tearing down what is shared copies it."""
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, mode), number)
    sys.stdin = open(0)  # noqa: SIM115
    status = 0
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = str(ROOT), arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    """Answer every line of stdin: fork for a program, tell how one has ended; at the end, kill those that run on."""
    for name in sys.argv[1:]:
        import_module(name)
    gc.freeze()
    statuses: dict[int, int | None] = {}
    for line in sys.stdin:
        what, *given = json.loads(line)
        if what == "start":
            answer = os.fork()
            if answer == 0:
                become(*given)
            statuses[answer] = None
        elif what == "end":
            break
        else:
            (pid,) = given
            if statuses[pid] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
            answer = statuses[pid]
        print(json.dumps(answer), flush=True)
    for pid in (pid for pid, status in statuses.items() if status is None):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
