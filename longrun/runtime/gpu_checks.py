"""What must hold before a plan is made or a weight is read: each failure is one sentence that says what to do."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings

import torch

from longrun.errors import InputError, PlanError
from longrun.plan.budget import Budget
from longrun.units import format_bytes

_OLDEST_CAPABILITY = (8, 0)  # bfloat16 tensor cores and asynchronous copies to shared memory

# Shipped budgets for a GPU by the memory it needs to have, largest first.
_GPU_BUDGETS = ((80 * 10**9, "h100-80g"), (24 * 10**9, "rtx4090-24g"))


def check_gpu() -> None:
    """torch, driver, GPU and Triton can run on cuda.

    Raises:
        InputError: torch has no CUDA support, there is no GPU or its driver or the GPU itself is too old, or Triton
            is missing.
    """
    if torch.version.cuda is None:
        raise InputError(
            f"device cuda was asked for, but torch {torch.__version__} has no CUDA support: install torch's CUDA "
            f"build, or use device cpu"
        )
    if not torch.cuda.is_available():
        why = _why_no_gpu()
        if "too old" in why:
            raise InputError(
                f"device cuda was asked for, but the NVIDIA driver is too old for torch's CUDA {torch.version.cuda}: "
                f"update the driver, or install torch for an older CUDA, or use device cpu"
            )
        raise InputError(f"device cuda was asked for, but torch finds no GPU here{why}: use device cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    if (found.major, found.minor) < _OLDEST_CAPABILITY:
        raise InputError(
            f"GPU {found.name} is sm_{found.major}{found.minor}, and the kernels need sm_80 (A100, RTX 30) or newer: "
            f"use device cpu"
        )
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            "device cuda needs Triton, which is not installed: install triton>=3.6 (on Linux it comes with torch's "
            "CUDA build), or use device cpu"
        )


def _why_no_gpu() -> str:
    """What torch says when CUDA is started, as " (...)"; empty where it says nothing."""
    with warnings.catch_warnings(), contextlib.suppress(AssertionError):
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except RuntimeError as error:
            return f" ({' '.join(str(error).split()).split('. ')[0].rstrip('.')})"
    return ""


def default_budget(device_type: str) -> str:
    """Name of the shipped budget for `device_type`: the largest that the GPU's memory holds.

    Raises:
        InputError: the GPU is smaller than every shipped budget.
    """
    if device_type == "cpu":
        return "cpu"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    for needed, name in _GPU_BUDGETS:
        if found.total_memory >= needed:
            return name
    raise InputError(
        f"no shipped budget fits the {format_bytes(found.total_memory)} of GPU {found.name}: write a budget file with "
        f"its [memory] gpu and give it as budget"
    )


def check_budget(budget: Budget) -> None:
    """The GPU has the memory that `budget` lets a run use on it.

    Raises:
        PlanError: it has less.
    """
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    if budget.device_bytes > found.total_memory:
        most = found.total_memory // 10**8 / 10
        raise PlanError(
            f"{budget.source} lets a run use {format_bytes(budget.device_bytes)} of GPU memory and {found.name} has "
            f'{format_bytes(found.total_memory)}: set gpu = "{most:.1f} GB" or less in the budget\'s [memory] section'
        )
