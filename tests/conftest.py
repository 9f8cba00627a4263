"""Fixtures that several test files need."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Tests run beside other work: waiting threads must not spin. Read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True, scope="session")
def _hear_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, and their children inherit that; tests send the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Checkpoint folder of the demo model, from the user's cache or made there once."""
    from longrun.model.demo import demo_model_dir

    return demo_model_dir()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out (deselected, and counted as such) where torch finds no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
