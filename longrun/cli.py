"""What every command-line program of longrun shares: its options, and how it leaves the process.

Exit status: 0; 1 for a defect of ours, with its traceback; 2 for bad input, and where stdout cannot be written (a full
disk, say); 130 after Ctrl-C; 141, silently, where the reader of stdout left (`| head`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from longrun.allocation import allocation_sentence, is_failed_allocation
from longrun.arguments import check_platform
from longrun.errors import InputError, LongrunError
from longrun.interrupts import hear_again

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
EXIT_STATUS = (
    "Exit status: 0; 1 for a defect of longrun; 2 for bad input, or where stdout cannot be written; 130 after Ctrl-C; "
    "141 where the reader of stdout left."
)


class StdoutLost(BaseException):
    """stdout takes nothing any more: save what can be saved and leave, as after a signal.

    Attributes:
        reason: what the system said; None where the reader left.
    """

    def __init__(self, error: OSError | ValueError) -> None:
        super().__init__(str(error))
        gone = isinstance(error, BrokenPipeError)
        self.reason = None if gone else getattr(error, "strerror", None) or str(error)


# By which a run is made smaller; see `longrun.plan.search`.
PLAN_OPTIONS = frozenset(
    {
        "--ctx",
        "--retrieval-ratio",
        "--kv-bytes",
        "--weights",
        "--kv",
        "--chunk-size",
        "--select",
        "--hot-pool",
        "--prefill",
    }
)


def run(main: Callable[[], int | None], options: Collection[str] = ()) -> NoReturn:
    """Run `main` and leave the process with its return value as status, or as this module says.

    Args:
        options: of `main` that an error's advice may name.
    """
    hear_again()
    with _streams() as stdout:
        try:
            try:
                check_platform()
                if stdout is None:
                    raise InputError("stdout is closed: send it somewhere, to /dev/null for example")
                status = main() or 0
            except LongrunError as error:
                _say(f"error: {error.told_by(options)}")
                status = BAD_INPUT
            except (MemoryError, RuntimeError, OSError, ImportError) as error:
                if not is_failed_allocation(error):
                    raise
                _say(f"error: {allocation_sentence(error, 'on the way')}")
                status = BAD_INPUT
            except KeyboardInterrupt:
                _say("interrupted")
                status = INTERRUPTED
            finally:  # also on the way out of argparse's --help
                if stdout is not None:
                    stdout.flush()
        except StdoutLost as lost:
            _discard(1, stdout)
            if lost.reason is not None:
                _say(f"error: stdout cannot be written ({lost.reason}): send it somewhere else")
            status = BROKEN_PIPE if lost.reason is None else BAD_INPUT
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse's parser whose refusals are one sentence, as every other mistake of a user."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's own message."""
        raise InputError(f"{message} (see {self.prog} --help)")


def redraws(console: Any) -> bool:
    """Whether rich's `console` is a terminal on which a line can be written over again; TERM=dumb is none."""
    return console.is_terminal and not console.is_dumb_terminal


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _streams() -> Iterator[_Stdout | None]:
    """Standard streams that fail in one known way; gives the one for stdout, or None where it is closed.

    A number below 3 that is closed is opened on the null device, so that no file of ours gets it. A character that
    the encoding of stdout lacks becomes a question mark.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    stdout = None if before[1] is None else _Stdout(before[1])
    if isinstance(before[1], io.TextIOWrapper):
        before[1].reconfigure(errors="replace")
    sys.stdin = before[0] or open(os.devnull, encoding="utf-8")  # noqa: SIM115  open as long as the process
    sys.stdout = stdout or io.StringIO()
    sys.stderr = _Stderr(before[2] or io.StringIO())
    try:
        yield stdout
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


class _Stream:
    """A text stream, with another way to fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        raise NotImplementedError


class _Stdout(_Stream):
    """stdout: a failure is no OSError that could be any file's, and no `except Exception` takes it."""

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, ValueError) as error:
            raise StdoutLost(error) from None


class _Stderr(_Stream):
    """stderr: the work continues where nothing can be written there."""

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, ValueError):
            _discard(2, self)
            return 0


def _discard(number: int, stream: Any) -> None:
    """Send what is still buffered, and all that follows, to the null device: the interpreter flushes at its end."""
    with contextlib.suppress(OSError, ValueError):
        if stream.fileno() == number:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
