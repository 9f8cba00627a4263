"""Finish a step before a signal takes effect: SIGINT and SIGTERM never leave a session half changed, and while
libraries load they end the process at once."""

from __future__ import annotations

import _signal  # what `signal` wraps: without its conversions to enums, which would cost 100 microseconds a token
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class HeldSignals:
    """Takes signals in place of their handlers from `hold` to `release`, and hands them on then.

    Handlers may raise at any moment before and after that. Where one does while they are exchanged, this object may
    stay installed: it hands signals on at once, and the next one that holds them puts the handlers back.
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        handlers = {number: _handler_of(number) for number in numbers}
        # None: a handler that Python did not install and could not put back.
        self._before = {number: handler for number, handler in handlers.items() if handler is not None}
        self._caught: dict[int, FrameType | None] = {}
        self._holding = False

    @property
    def waiting(self) -> bool:
        """Whether a signal has come and waits for the block to end."""
        return bool(self._caught)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._caught.setdefault(number, frame)
        else:
            self._deliver(number, frame)

    def hold(self) -> None:
        for number in self._before:
            _signal.signal(number, self)
        self._holding = True

    def release(self) -> None:
        """Put the handlers back and let each have its signal, SIGTERM last: what it raises is what is seen."""
        self._holding = False
        try:
            for number, handler in self._before.items():
                _signal.signal(number, handler)
        finally:
            self._deliver_all([number for number in self._before if number in self._caught])

    def handler_of(self, number: signal.Signals) -> Any:
        """This object while it holds, afterwards the handler in whose place it stood."""
        return self if self._holding else self._before[number]

    def _deliver_all(self, numbers: list[signal.Signals]) -> None:
        if numbers:
            try:
                self._deliver(numbers[0], self._caught[numbers[0]])
            finally:
                self._deliver_all(numbers[1:])

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _handler_of(number: signal.Signals) -> Any:
    handler = _signal.getsignal(number)
    while isinstance(handler, HeldSignals) and handler.handler_of(number) is not handler:
        handler = handler.handler_of(number)
    return handler


@contextmanager
def deferred_signals() -> Iterator[HeldSignals]:
    """Hold SIGINT and SIGTERM back until the block ends, then let the handlers that were installed have them.

    Blocks may be nested: the outermost one lets go. Outside the main thread Python delivers no signals, and this does
    nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    outer = _signal.getsignal(_SIGNALS[0]) if in_main else None
    if isinstance(outer, HeldSignals) and outer.handler_of(_SIGNALS[0]) is outer:
        yield outer
        return
    held = HeldSignals(_SIGNALS if in_main else ())
    try:
        held.hold()
        yield held
    finally:
        held.release()


def leave_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with one line and status 130 or 143: while libraries are imported
    there is nothing to save, and what an exception meets in the middle of an import may print or swallow it.

    Only the handlers that Python starts with are replaced; outside the main thread nothing is.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in _DEFAULTS.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, _leave)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """`leave_at_once` until the block ends."""
    leave_at_once()
    try:
        yield
    finally:
        hear_again()


def hear_again() -> None:
    """Put Python's own handlers back where `leave_at_once` replaced them."""
    for number, handler in _DEFAULTS.items():
        if signal.getsignal(number) is _leave:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
