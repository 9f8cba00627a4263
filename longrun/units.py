"""Token counts and byte counts as people write them: `3.3M` tokens, `80 GB`, `100 GiB`."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from longrun.arguments import integer, read_by
from longrun.errors import InputError, quoted

MAX_TOKENS = 10**9
"""Of a context. What is addressed by token stays within 64 bits by far, and float64 angles exact enough."""

MAX_MEMORY = 10**15
"""Of a memory size in bytes: a petabyte."""

ALL_TOKENS = 2**31 - 1
"""The reach of a head that keeps every token."""

_TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match.group(2).upper() not in units:
        raise InputError(f"{what} {quoted(text)} is not a number with a known unit: write it like {example}")
    value = Decimal(match.group(1)) * units[match.group(2).upper()]
    if value > MAX_MEMORY:
        return MAX_MEMORY + 1  # too large for any use; an int of so many digits cannot be written out
    if value != int(value):
        raise InputError(f"{what} {quoted(text)} is {value:f} and not a whole number: write it like {example}")
    return int(value)


def parse_tokens(text: str | int, what: str = "token count", least: int = 1) -> int:
    """Token count from `8192`, `8,192` (as longrun prints it), `128K` (1K = 1,000) or `3.3M`; to `MAX_TOKENS`.

    Raises:
        InputError: neither a text nor an integer, an unknown unit, or a count out of range.
    """
    example = "8192, 128K or 3.3M"
    if isinstance(text, str) and re.fullmatch(r"\s*\d{1,3}(,\d{3})+\s*", text, re.ASCII):
        text = text.replace(",", "")
    count = _parse(text, _TOKEN_UNITS, what, example) if isinstance(text, str) else integer(text, what, least)
    if count < least:
        raise InputError(f"{what} {quoted(text)} must be at least {least}: write it like {example}")
    if count > MAX_TOKENS:
        raise InputError(f"{what} {quoted(text)} must be at most {MAX_TOKENS:,} tokens: write it like {example}")
    return count


TOKENS = read_by(parse_tokens)
"""The `type` of a command-line option: as `--ctx`."""


def parse_bytes(text: str | int, what: str = "memory size") -> int:
    """Bytes from `80 GB` (10**9), `100 GiB` (2**30) or a plain number; from 0 to `MAX_MEMORY`.

    Raises:
        InputError: neither a text nor an integer, an unknown unit, negative, or more than any machine has.
    """
    example = "80 GB or 100 GiB"
    if isinstance(text, str):
        size = _parse(text, _BYTE_UNITS, what, example)
    else:
        size = integer(text, what, -MAX_MEMORY, 2 * MAX_MEMORY)
    if size < 0:
        raise InputError(f"{what} {quoted(text)} is negative: write it like {example}")
    if size > MAX_MEMORY:
        raise InputError(f"{what} {quoted(text)} is more than a petabyte: write it like {example}")
    return size


def format_tokens(count: int) -> str:
    """`3300000` -> `3.3M`, `131072` -> `131,072`: the short form only where it is exact and short."""
    for unit, size in (("M", 10**6), ("K", 10**3)):
        if size <= count < 1000 * size and count * 10 % size == 0:
            return f"{count / size:g}{unit}"
    return f"{count:,}"


def format_seconds(seconds: float) -> str:
    """Two or three significant digits: `3.5 ms`, `22 ms`, `7.2 s`, `45 s`, `4 min`, `1 h 6 min`."""
    if seconds < 1:
        return f"{1e3 * seconds:.{1 if seconds < 0.00995 else 0}f} ms"
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_bytes(count: int) -> str:
    """Three significant digits in decimal units: `59136000000` -> `59.1 GB`."""
    sign, value = ("-" if count < 0 else ""), abs(count)
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value >= size:
            scaled = value / size
            digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{sign}{scaled:.{digits}f} {unit}"
    return f"{sign}{value} B"


def share_of(text: object, what: str = "kv_bytes") -> float | None:
    """0.25 for "25%": what a share of full attention's bytes, or of a head's pages, is written like; None for anything
    else.

    Raises:
        InputError: a share that is not above 0% and at most 100%.
    """
    if not isinstance(text, str) or not text.strip().endswith("%"):
        return None
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(f"{what} {quoted(text)} is no share above 0% and up to 100%: write it like 25%")
    return share
