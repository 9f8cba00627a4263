"""Training that repeats to the bit: torch's deterministic algorithms and, on a GPU, what cuBLAS must be told for them.

The mode has to be strict: asked to warn only, torch's FlashAttention takes the backward pass that adds its gradients in
whatever order they come (aten/src/ATen/native/transformers/cuda/attention_backward.cu). Strictly, it adds them into a
buffer for each group of blocks and sums those in order, at about (number of multiprocessors / query heads) times the
memory of the queries' gradient in float32; gradients of key heads shared by several query heads are summed in order in
either case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longrun.errors import ConfigError, InputError

CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUES = (":4096:8", ":16:8")
"""The values with which torch takes cuBLAS to repeat (aten/src/ATen/Context.cpp)."""


@contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Within the block torch takes deterministic kernels and refuses what has none; afterwards all is as before, but
    for the environment variable that cuBLAS reads once a process.

    Args:
        device: where the block computes.

    Raises:
        InputError: on a GPU, where cuBLAS is set otherwise, or was used before it could be set.
        ConfigError: the block came to an operation that has no deterministic kernel.
    """
    if device.type == "cuda":
        set_cublas()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        if device.type == "cuda":
            _try_cublas(device)
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"this model's training does not repeat to the bit ({' '.join(str(error).split())[:300]}): measure it with "
            f"--method reconstruction, or on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def set_cublas() -> None:
    """Ask for cuBLAS's repeatable workspaces, in this process's environment: read when cuBLAS is first used.

    Raises:
        InputError: the environment says another value.
    """
    value = os.environ.setdefault(CUBLAS_SETTING, CUBLAS_VALUES[0])
    if value not in CUBLAS_VALUES:
        raise InputError(
            f"{CUBLAS_SETTING} is {value!r}, and gates repeat to the bit with {' or '.join(CUBLAS_VALUES)} only: "
            f"unset it"
        )


def _try_cublas(device: torch.device) -> None:
    """One product, which torch refuses where cuBLAS was first used without the setting."""
    ones = torch.ones(8, 8, device=device)
    try:
        torch.mm(ones, ones)
    except RuntimeError as error:
        if CUBLAS_SETTING not in str(error):
            raise
        raise InputError(
            f"cuBLAS was used in this process before {CUBLAS_SETTING} was set, so that gates would not repeat to the "
            f"bit: measure the map in a process of its own, or start this one with {CUBLAS_SETTING}={CUBLAS_VALUES[0]}"
        ) from error
