"""Benchmarks in this process, with a tiny model and without waiting for ceilings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_models import save_tiny

from scripts.bench import ceilings
from scripts.bench import command as bench

CEILINGS = {"memory_tb_s": 0.01, "matmul_tflops": 0.1, "attention_tflops": 0.05, "host_to_device_gb_s": 5.0}


def save_bench_model(folder: Path) -> Path:
    save_tiny(folder, "llama", head_dim=32, max_position_embeddings=4096)
    return folder


@contextmanager
def fixed_ceilings(monkeypatch) -> Iterator[None]:
    """Ceilings as they are on no machine, so that nothing waits for them."""
    kinds = zip(("memory", "matmul", "attention", "transfer"), CEILINGS, strict=True)
    fixed = {kind: ((lambda device, key=key: {key: CEILINGS[key]}), kind) for kind, key in kinds}
    monkeypatch.setattr(ceilings, "MEASURES", fixed)
    ceilings.measured.cache_clear()
    yield
    ceilings.measured.cache_clear()


def run(capsys, tmp_path, *argv: str, status: int = 0, printed: str = "") -> dict:
    """The result of a command: the last line, which is also what --json writes; `printed` stands before it."""
    file = tmp_path / "made" / "result.json"
    command, *options = map(str, argv)
    assert bench.main([command, "--json", str(file), *options]) == status
    *lines, last = capsys.readouterr().out.splitlines()
    assert printed in "\n".join(lines)
    result = json.loads(last)
    assert json.loads(file.read_text()) == result
    assert result["complete"] is True
    assert {"command", "commit", "torch", "device"} <= result["environment"].keys()
    return result
