"""Deterministic algorithms: on within the block, strict, as before afterwards, with errors that say what to do."""

from __future__ import annotations

import os

import pytest
import torch

from longrun.errors import ConfigError, InputError
from longrun.patterns.gates import CUBLAS_SETTING, _try_cublas, deterministic_algorithms, set_cublas

CPU = torch.device("cpu")


def state() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("before", [(False, False, True), (True, True, False), (True, False, True)])
def test_it_is_strict_within_and_as_before_afterwards(before: tuple[bool, bool, bool]) -> None:
    first = state()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
        with deterministic_algorithms(CPU):
            assert state() == (True, False, False)
        assert state() == before
        with pytest.raises(ZeroDivisionError), deterministic_algorithms(CPU):
            raise ZeroDivisionError
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(first[0], warn_only=first[1])
        torch.utils.deterministic.fill_uninitialized_memory = first[2]


def test_an_operation_without_a_deterministic_kernel_is_told() -> None:
    first = state()
    told = pytest.raises(ConfigError, match=r"put_ does not have a deterministic .*--method reconstruction")
    with told, deterministic_algorithms(CPU):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([2.0, 3.0]), accumulate=False)
    assert state() == first


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, deterministic_algorithms(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, ConfigError)


def test_cublas_is_set_where_nothing_is_and_refused_where_it_is_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_SETTING, ":0:0")
    with pytest.raises(InputError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*:4096:8 or :16:8 only: unset it"):
        set_cublas()
    monkeypatch.setenv(CUBLAS_SETTING, ":16:8")
    set_cublas()
    monkeypatch.delenv(CUBLAS_SETTING)
    set_cublas()
    assert os.environ[CUBLAS_SETTING] == ":4096:8"


def test_a_process_that_used_cublas_before_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(f"not deterministic because it uses CuBLAS: set {CUBLAS_SETTING}=:4096:8")

    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(InputError, match=r"used in this process before .*in a process of its own"):
        _try_cublas(CPU)
