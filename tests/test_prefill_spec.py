"""Sparse prefill as a setting: what its values may be, and how many pages a tile reads."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from longrun.errors import InputError
from longrun.specs.prefill_spec import PrefillSpec


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mass": 0}, "mass 0 is outside the range: give a number above 0 and below 1"),
        ({"mass": 1}, "mass 1 is outside the range: give a number above 0 and below 1"),
        ({"mass": 1.0}, "mass 1.0 is outside the range"),
        ({"mass": 1.5}, "mass 1.5 is outside the range"),
        ({"mass": -0.1}, "mass -0.1 is outside the range"),
        ({"mass": math.nan}, "mass nan is not a finite number"),
        ({"mass": "0.9"}, "mass '0.9' is not a finite number"),
        ({"mass": True}, "mass True is not a finite number"),
        ({"dense_tokens": -1}, "dense_tokens -1 is too small: it must be at least 0"),
        ({"dense_tokens": 1.5}, "dense_tokens 1.5 is not an integer"),
        ({"dense_end": 0}, "dense_end 0 is too small: it must be at least 1"),
        ({"newest": 0}, "newest 0 is too small: it must be at least 1"),
        ({"floor": 3}, "floor 3 is too small: it must be at least 4"),
        ({"cap": 0}, "cap 0 is outside the range: give a number above 0 and at most 1"),
        ({"least": -0.01}, "least -0.01 is outside the range"),
        ({"least": 1.2}, "least 1.2 is outside the range: give a number from 0 to 1"),
        ({"cap": 1.1}, "cap 1.1 is outside the range"),
        ({"rows": 3}, "rows '3' is unknown: use 1 or 2 or 4 or 8"),
        ({"correct": 1}, "correct 1 is neither True nor False"),
        ({"rows": 16}, "rows '16' is unknown: use 1 or 2 or 4 or 8"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        PrefillSpec(**values)


def test_values_at_the_edge() -> None:
    PrefillSpec(mass=1e-6, dense_tokens=0, dense_end=1, newest=1, floor=1, least=0, cap=1, rows=8)
    PrefillSpec(mass=1 - 1e-9)


def test_pages_that_a_tile_reads_at_least_and_at_most() -> None:
    spec = PrefillSpec(mass=0.9, floor=16, least=0.05, cap=0.25)
    assert [spec.most_pages(pages) for pages in (0, 5, 16, 17, 64, 67, 68, 4096)] == [0, 5, 16, 16, 16, 16, 17, 1024]
    assert [spec.least_pages(pages) for pages in (0, 5, 16, 17, 320, 339, 340, 4096)] == [0, 5, 16, 16, 16, 16, 17, 204]
    assert PrefillSpec(cap=1).most_pages(777) == 777


@pytest.mark.parametrize("pages", [0, 1, 15, 16, 17, 99, 100, 1001, 160_000])
def test_the_same_share_for_every_tile(pages: int) -> None:
    """Without a mass, and where the least that it may ask for is more than the most."""
    for spec in (PrefillSpec(cap=0.08), PrefillSpec(mass=0.9, least=0.2, cap=0.08)):
        assert spec.least_pages(pages) == spec.most_pages(pages)
