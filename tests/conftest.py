"""Fixtures that several test files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run beside other work: waiting threads must not spin. Read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Checkpoint folder of the demo model, from the user's cache or made there once."""
    from longrun.model.demo import demo_model_dir

    return demo_model_dir()
