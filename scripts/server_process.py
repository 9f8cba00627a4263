"""A server in a process of its own, and a small model for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from longrun.errors import InputError
from longrun.lab.planted import make_planted_model

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class ServedModel:
    """A server in a process of its own.

    Attributes:
        root: its address, without /v1.
        process: what runs it.
    """

    root: str
    process: subprocess.Popen[str]

    def health(self) -> dict[str, Any]:
        """What /health says."""
        return httpx.get(f"{self.root}/health", timeout=60).json()


@contextmanager
def server(*options: str) -> Iterator[ServedModel]:
    """Start `python -m longrun.server` with these options, on a port of its own, until the block ends.

    Raises:
        InputError: it does not start, or does not end with status 143 on SIGTERM.
    """
    command = [sys.executable, "-m", "longrun.server", "--port", "0", *options]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise InputError(f"the server did not start (status {process.wait()}): see above")
        yield ServedModel(address.removesuffix("/v1"), process)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 143:
            raise InputError(f"the server left with status {process.returncode} instead of 143: see above")
    finally:
        process.kill()
        process.wait()


@contextmanager
def planted_folder() -> Iterator[Path]:
    """A small model that finds needles by construction, with a chat template, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="longrun-served-") as folder:
        model = Path(folder) / "planted"
        make_planted_model(model)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
        yield model
