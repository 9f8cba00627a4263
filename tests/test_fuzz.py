"""A short form of scripts/fuzz.py, and that it tells its endings apart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from longrun.errors import LongrunError
from scripts import fuzz


def test_damaged_files_are_refused_or_understood():
    endings = fuzz.fuzz(count=60, seed=17, limit=20)
    assert [ending for ending in endings if ending.how in fuzz.FAILURES] == []
    assert {ending.kind for ending in endings} == set(fuzz.TURNS)
    assert {"refused", "unchanged", "other"} <= {ending.how for ending in endings}


class _Bench:
    sound = {"kind": 1}  # noqa: RUF012


def _kind(use, expected=lambda folder: 1):
    return fuzz.Kind("kind", "folder", (), use, expected, lambda ours, right: ours == right)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (_kind(lambda folder: 1), "unchanged"),
        (_kind(lambda folder: 2, lambda folder: 2), "other"),
        (_kind(lambda folder: 2), "wrong"),
        (_kind(lambda folder: 1, lambda folder: _raise(ValueError())), "unchanged"),
        (_kind(lambda folder: 2, lambda folder: _raise(ValueError())), "wrong"),
        (_kind(lambda folder: _raise(ValueError())), "traceback"),
        (_kind(lambda folder: _raise(LongrunError("a sentence that says what is wrong"))), "refused"),
        (_kind(lambda folder: _raise(LongrunError("x"))), "traceback"),
    ],
)
def test_endings(kind, how):
    assert fuzz._outcome(_Bench, kind, Path())[0] == how


def test_a_hang_is_cut_off():
    with pytest.raises(fuzz.Hang), fuzz._bounded(0.05):
        time.sleep(60)
