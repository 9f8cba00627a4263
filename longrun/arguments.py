"""Checks of what a caller passes in: the numbers, names and callbacks of every public function and option.

Each check returns the value in the plain type that the code behind it wants, or raises an InputError with the value,
the limit and what to do. Paths are in `longrun.paths`.
"""

from __future__ import annotations

import argparse
import math
import numbers
import operator
import sys
from collections.abc import Callable, Collection
from typing import Any

from longrun.errors import InputError, LongrunError, quoted

MAX_SEED = 2**63 - 1
MAX_INTEGER = 10**15
"""Of a count or a size in general: far above what any machine holds, far below where arithmetic becomes inexact."""
MAX_YARN = 1000


def integer(
    value: Any, what: str, low: int = 0, high: int = MAX_INTEGER, error: type[LongrunError] = InputError
) -> int:
    """A whole number from `low` to `high`, of any integer type (numpy's too); never a bool, a float or a text.

    Raises:
        error: another type, or outside the range.
    """
    try:
        number = None if isinstance(value, bool) or _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise error(f"{what} {quoted(value)} is not an integer: give one of at least {low:,}")
    if number < low:
        raise error(f"{what} {quoted(number)} is too small: it must be at least {low:,}")
    if number > high:
        raise error(f"{what} {quoted(number)} is too large: it must be at most {_limit(high)}")
    return number


def number(
    value: Any,
    what: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    error: type[LongrunError] = InputError,
) -> float:
    """A finite real number from `low` to `high` (with `above`: above `low`, with `below`: below `high`); never a bool
    or a text.

    Raises:
        error: another type, NaN, infinity, or outside the range.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise error(f"{what} {quoted(value)} is not a finite number: give {_range(low, high, above, below)}")
    if found > high or found < low or (above and found == low) or (below and found == high):
        raise error(f"{what} {quoted(value)} is outside the range: give {_range(low, high, above, below)}")
    return found


def choice(value: Any, what: str, names: Collection[str], error: type[LongrunError] = InputError) -> str:
    """One of `names`.

    Raises:
        error: anything else.
    """
    if not isinstance(value, str) or value not in names:
        raise error(f"{what} {quoted(value)} is unknown: use {' or '.join(names)}")
    return value


def flag(value: Any, what: str) -> bool:
    """True or False. Raises InputError for anything else, such as a text that only looks like one."""
    if not isinstance(value, bool):
        raise InputError(f"{what} {quoted(value)} is neither True nor False")
    return value


def callback(value: Any, what: str) -> Any:
    """None or something that can be called. Raises InputError for anything else."""
    if value is not None and not callable(value):
        raise InputError(f"{what} {quoted(value)} cannot be called: give a function, or None")
    return value


def check_text(text: str, what: str) -> str:
    """Return `text`, which was typed or given as an argument.

    Raises:
        InputError: it holds bytes that are not UTF-8 (Python keeps such bytes as lone surrogates).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise InputError(
            f"{what} is not UTF-8 (byte 0x{byte:02x} after {error.start:,} characters): convert it, for example with "
            f"iconv"
        ) from None
    return text


def whole(low: int = 0, high: int = MAX_INTEGER) -> Callable[[str], int]:
    """The `type` of a command-line option that takes a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value: Any = int(text)
        except ValueError:  # no number, or one of more digits than Python reads
            value = text
        return _option(lambda: integer(value, "value", low, high))

    return read


def real(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """The `type` of a command-line option that takes a number as `number` does."""

    def read(text: str) -> float:
        try:
            value: Any = float(text)
        except ValueError:
            value = text
        return _option(lambda: number(value, "value", low, high, above=above, below=below))

    return read


def read_by(parse: Callable[[str, str], Any]) -> Callable[[str], Any]:
    """The `type` of a command-line option whose text `parse(text, what)` reads, with its sentence about a bad one."""
    return lambda text: _option(lambda: parse(text, "value"))


SHARE = real(0, 1)
SEED = whole(0, MAX_SEED)
COUNT = whole(1)
YARN = real(1, MAX_YARN, above=True)


def check_platform() -> None:
    """Raise LongrunError on a system that longrun does not run on."""
    if sys.platform == "win32":
        raise LongrunError("longrun does not run on native Windows: start it in WSL 2 (Windows Subsystem for Linux)")


def _option(check: Callable[[], Any]) -> Any:
    """Let argparse put the option's name before the sentence."""
    try:
        return check()
    except LongrunError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _is_bool(value: Any) -> bool:
    """A bool of numpy or torch, which `operator.index` may take."""
    return "bool" in str(getattr(value, "dtype", ""))


def _limit(high: int) -> str:
    return f"{high:,}" if high <= MAX_INTEGER else f"2**{high.bit_length()} - 1"


def _range(low: float, high: float, above: bool, below: bool) -> str:
    if not above and not below and -math.inf < low and high < math.inf:
        return f"a number from {low:g} to {high:g}"
    least = "" if low == -math.inf else f"above {low:g}" if above else f"at least {low:g}"
    most = "" if high == math.inf else f"below {high:g}" if below else f"at most {high:g}"
    return f"a number {' and '.join(filter(None, (least, most)))}".rstrip()
