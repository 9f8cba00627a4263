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
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers.models.llama.modeling_llama")
SECONDS = 120  # of a program, which SIGALRM ends


class WarmPython:
    """Starts programs by the arguments that Python would get: `-m` and a module, or a script, with its arguments."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """The program's status, stdout and stderr, once it has ended; its folder is the repository's root."""
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("out", "err")]
            self._process.stdin.write(json.dumps([arguments, *map(str, streams)]) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in streams))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def become(arguments: list[str], out: str, err: str) -> NoReturn:
    """Run the program in this process, which ends with it: at once, for tearing down what is shared copies it."""
    signal.alarm(SECONDS)
    flags = os.O_WRONLY | os.O_CREAT
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, flags), (2, err, flags)):
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
        status = left.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status or 0)


def serve() -> None:
    """Fork for every line of stdin; write the statuses to stdout."""
    for name in PACKAGES:
        import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
