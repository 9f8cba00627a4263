"""Token counts and byte counts as people write them: `3.3M` tokens, `80 GB`, `100 GiB`."""

from __future__ import annotations

import re
from decimal import Decimal

from longrun.errors import InputError

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
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in units:
        raise InputError(f"{what} {text!r} is not a number with a known unit: write it like {example}")
    value = Decimal(match.group(1)) * units[match.group(2).upper()]
    if value != int(value):
        raise InputError(f"{what} {text!r} is {value} and not a whole number: write it like {example}")
    return int(value)


def parse_tokens(text: str | int, what: str = "token count") -> int:
    """Token count from `8192`, `128K` (1K = 1,000) or `3.3M`; at least 1.

    Raises:
        InputError: not a number, an unknown unit, or less than one token.
    """
    count = text if isinstance(text, int) else _parse(text, _TOKEN_UNITS, what, "8192, 128K or 3.3M")
    if count < 1:
        raise InputError(f"{what} {text!r} must be at least 1: write it like 8192, 128K or 3.3M")
    return count


def parse_bytes(text: str | int, what: str = "memory size") -> int:
    """Bytes from `80 GB` (10**9), `100 GiB` (2**30) or a plain number; zero is allowed.

    Raises:
        InputError: not a number, an unknown unit, or negative.
    """
    if isinstance(text, int):
        if text < 0:
            raise InputError(f"{what} {text} is negative: write it like 80 GB or 100 GiB")
        return text
    return _parse(text, _BYTE_UNITS, what, "80 GB or 100 GiB")


def format_tokens(count: int) -> str:
    """`3300000` -> `3.3M`, `131072` -> `131,072`: the short form only where it is exact."""
    for unit, size in (("M", 10**6), ("K", 10**3)):
        if count >= size and count * 10 % size == 0:
            return f"{count / size:g}{unit}"
    return f"{count:,}"


def format_bytes(count: int) -> str:
    """Three significant digits in decimal units: `59136000000` -> `59.1 GB`."""
    sign, value = ("-" if count < 0 else ""), abs(count)
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value >= size:
            scaled = value / size
            digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{sign}{scaled:.{digits}f} {unit}"
    return f"{sign}{value} B"
