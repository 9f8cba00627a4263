"""The runtimes of a comparison: one after another, over weights that are read once.

Rows differ in their head map, page format and chunk size. These change no weight, so a row's runtime is derived from
the full-attention one, in milliseconds, where loading takes seconds. Quantized weights cannot be reordered and are
loaded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import longrun
from longrun.config.model_config import ModelConfig
from longrun.lab.quality.settings import Row
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.placement import DEFAULT_WEIGHT_FORMAT
from longrun.plan.plan import choose_split
from longrun.quant.weight_format import is_quantized
from longrun.runtime import gpu_checks
from longrun.runtime.runtime import Runtime

_FULL = "full"


def comparison_budget(name: str | None, device: str | None, chunk_size: int | None) -> Budget:
    """Memory, page size and chunk size of a budget; which heads keep what, and in which window, the rows alone say.

    Args:
        name: shipped budget or file; None takes the device's, and weights in its own format (bf16 on a GPU, fp32 on a
            CPU) where shipped budgets may quantize them.
        device: "cpu", "cuda" or None for cuda where there is one.
        chunk_size: tokens of a prefill step, None for the budget's.

    Raises:
        InputError, ConfigError: no such budget, a broken one, or a GPU that cannot be used.
    """
    device = device or default_device()
    if device == "cuda":
        gpu_checks.check_gpu()
    budget = Budget.load(name or gpu_checks.default_budget(device)).override(chunk_size=chunk_size)
    budget = replace(budget, retrieval_ratio=None, sink_size=None, recent_size=None)
    return budget if name else replace(budget, weight_format=None)


def default_device() -> str:
    """What `longrun.load` takes without a device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Runtimes:
    """Makes the runtime of a row, whose page format, weights and chunk size win over the budget's.

    Args:
        folder: the model; adapter: LoRA adapter for all rows, or None.
        budget: see `comparison_budget`.
        device: as `longrun.load` takes it.
        capacity: tokens to plan for.
    """

    def __init__(self, folder: Path, adapter: Path | None, budget: Budget, device: str | None, capacity: int) -> None:
        self._folder, self._adapter, self._budget, self._capacity = folder, adapter, budget, capacity
        self._device = device or default_device()
        if self._device == "cuda":
            # cuDNN plans for tenths of a second for every pair of lengths it has not seen, and hundreds come up here.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._config = ModelConfig.from_dir(folder)
        self._bases: dict[str, Runtime] = {}  # by weight format

    def check(self, rows: Sequence[Row]) -> None:
        """Every row's head map is there and fits the model: said before hours of other rows.

        Raises:
            HeadMapError: one is not, or does not.
        """
        for row in rows:
            head_map = row.make_map(self._config.num_layers, self._config.num_kv_heads)
            choose_split(self._config, self._budget, head_map, row.retrieval_ratio)

    def get(self, row: Row) -> Runtime:
        """A runtime with the row's head split, page format and weights.

        Raises:
            LongrunError: as `longrun.load`.
        """
        config = self._config
        head_map = row.make_map(config.num_layers, config.num_kv_heads)
        weights = row.weights or self._budget.weight_format or DEFAULT_WEIGHT_FORMAT[self._device]
        if is_quantized(weights):
            return self._load(row, head_map, row.retrieval_ratio)
        if weights not in self._bases:
            self._bases[weights] = self._load(replace(row, chunk_size=None), _FULL, None)
        return self._bases[weights].derive(
            head_map, row.stored_kv, row.chunk_size, ctx=self._capacity, retrieval_ratio=row.retrieval_ratio
        )

    def _load(self, row: Row, head_map: HeadMap | str, ratio: float | None) -> Runtime:
        return longrun.load(
            self._folder, self._budget.override(chunk_size=row.chunk_size), head_map, row.stored_kv, row.weights,
            self._device, ctx=self._capacity, adapter=self._adapter, retrieval_ratio=ratio,
        )  # fmt: skip
