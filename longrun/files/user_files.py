"""Files that a person or a download put somewhere, read with bounds: how long, how deep, how large a number.

Whatever is wrong with such a file becomes one sentence of the caller's error class here, at the border, and what comes
back is plain: text in UTF-8, or an object whose nesting and numbers no later code can stumble over.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from longrun.errors import LongrunError, quoted, short_path, shortened

MAX_BYTES = 16 * 2**20
"""Of a file of settings. The index of the largest checkpoint of these families has 0.1 MB, a header 0.2 MB."""

RESULTS_BYTES = 2**30
"""Of a file of results that longrun wrote itself and adds to."""

MAX_DEPTH = 64
"""Levels of objects and lists."""

MAX_DIGITS = 100
"""Of a whole number: any becomes a float without overflow, and a message can say which key holds it."""


class _Fault(ValueError):
    """What is wrong with the content, for the message."""


def read_bytes(path: str | Path, error: type[LongrunError], advice: str, limit: int = MAX_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        error: no such file, no regular file, one that cannot be read, or a longer one; the message ends with `advice`.
    """
    try:
        if not os.path.isfile(path):  # a pipe would never end
            raise _Fault("it is no file" if os.path.exists(path) else "there is no such file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1)
    except OSError as fault:
        _refuse(path, error, fault.strerror or str(fault), advice)
    except ValueError as fault:
        _refuse(path, error, str(fault), advice)
    if len(content) > limit:
        _refuse(path, error, f"{max(size, len(content)):,} bytes are more than the {limit:,} it may have", advice)
    return content


def read_text(path: str | Path, error: type[LongrunError], advice: str, limit: int = MAX_BYTES) -> str:
    """`read_bytes` as UTF-8 text; a byte order mark at its beginning is dropped."""
    content = read_bytes(path, error, advice, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        _refuse(path, error, f"it is not a text file in UTF-8, at byte {fault.start:,}", advice)


def read_object(path: str | Path, error: type[LongrunError], advice: str, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds. Raises as `read_bytes` and `parse_object`."""
    return parse_object(read_text(path, error, advice, limit), str(path), error, advice)


def parse_object(
    text: str | bytes, source: str, error: type[LongrunError], advice: str, unique_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in `text` (bytes: UTF-8).

    Args:
        source: what messages call it.
        unique_keys: refuse a key that stands twice in an object, rather than taking the last one.

    Raises:
        error: no JSON, no object, more than `MAX_DEPTH` levels, a whole number of more than `MAX_DIGITS` digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        data = json.loads(text, parse_int=_whole, object_pairs_hook=_unique if unique_keys else None)
        if not isinstance(data, dict):
            raise _Fault("it holds no JSON object")
        _check_depth(data)
    except RecursionError:
        _refuse(source, error, _too_deep(), advice)
    except json.JSONDecodeError as fault:
        _refuse(source, error, f"no valid JSON, line {fault.lineno}: {fault.msg}", advice)
    except ValueError as fault:
        _refuse(source, error, str(fault), advice)
    return data


def parse_toml(text: str, source: str, error: type[LongrunError]) -> dict[str, Any]:
    """The table in TOML `text`.

    Raises:
        error: broken TOML, more than `MAX_DEPTH` levels, a whole number of more digits than Python reads.
    """
    try:
        data = tomllib.loads(text)
        _check_depth(data)
    except RecursionError:
        raise error(f"{source} is not valid TOML: {_too_deep()}") from None
    except ValueError as fault:  # of TOML itself, or a number that Python finds too long
        message = str(fault).replace("at end of document", f"at line {len(text.splitlines())}, end of document")
        raise error(f"{source} is not valid TOML: {message}") from None
    return data


def _refuse(source: str | Path, error: type[LongrunError], why: str, advice: str) -> NoReturn:
    raise error(f"{short_path(source)} cannot be used ({shortened(why, 160)}): {advice}") from None


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Fault(f"a number of {len(digits):,} digits, beginning {digits[:20]}")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise _Fault(f"it has {quoted(name)} twice")
        data[name] = value
    return data


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} levels deep"


def _check_depth(data: object) -> None:
    level: list[object] = [data]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise _Fault(_too_deep())
