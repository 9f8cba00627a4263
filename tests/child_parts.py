"""Parts of a benchmark for a process of their own, in a module that such a process imports quickly."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from longrun.errors import InputError


def two_things(first: int) -> Iterator[tuple[str, Any]]:
    yield "row", first
    yield "pid", os.getpid()


def refused() -> Iterator[tuple[str, Any]]:
    yield "row", 1
    raise InputError("give another")


def killed() -> Iterator[tuple[str, Any]]:
    yield "row", 1
    time.sleep(0.1)
    os._exit(7)
