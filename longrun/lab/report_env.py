"""What a result file must say about where it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMMIT_VARIABLE = "LONGRUN_COMMIT"
_PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Device name, library versions, commit and command of this process, as JSON types.

    Of absolute paths in the command only the last part is kept: folders mean nothing on another machine.

    Where the sources were copied without their git history, or into the history of another commit, the variable
    LONGRUN_COMMIT names theirs: `commit_given` is then true, since nothing has checked it.
    """
    import torch

    commit, given = _commit(), os.environ.get(COMMIT_VARIABLE, "").strip()
    found: dict[str, Any] = {
        "command": shlex.join(_last_part(word) for word in [Path(sys.executable).name, *sys.argv]),
        "commit": given or commit,
        **({"commit_given": True} if given else {}),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _last_part(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
