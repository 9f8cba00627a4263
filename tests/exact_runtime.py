"""A tiny model with exact float32 pages, and token ids for it: what tests of evicting caches run."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import save_tiny

import longrun
from longrun.runtime.runtime import Runtime


def exact_runtime(folder: Path) -> Runtime:
    save_tiny(folder, "llama")
    return longrun.load(folder, "cpu", kv_format="fp32", device="cpu", ctx=512, chunk_size=50, compiled_kernels=False)


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
