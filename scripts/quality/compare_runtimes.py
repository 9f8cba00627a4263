"""The runtimes of a comparison: one after another, over weights that are read once.

Rows differ in their head map, page format and chunk size. These change no weight, so a row's runtime is derived from
the full-attention one, in milliseconds, where loading takes seconds. Quantized weights cannot be reordered and are
loaded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import HeadMapError, InputError
from longrun.lab.quality.measures import SPARE_TOKENS
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.row_fields import SYSTEM
from longrun.lab.quality.shares import with_sinks
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.placement import DEFAULT_WEIGHT_FORMAT
from longrun.plan.plan import choose_split
from longrun.plan.reaches import reach_bytes
from longrun.quant.weight_format import is_quantized
from longrun.runtime import gpu_checks
from longrun.runtime.head_map_check import other_model_notices
from longrun.runtime.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    budget = replace(
        budget, retrieval_ratio=None, sink_size=None, recent_size=None, keep=None, pages_per_head=None,
        select_from=None, prefill_mode=None, prefill_mass=None, prefill_dense=None,
    )  # fmt: skip
    return budget if name else replace(budget, weight_format=None)


def default_device() -> str:
    """What `longrun.load` takes without a device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Runtimes:
    """Makes the runtime of a row, whose page format, weights and chunk size win over the budget's.

    Args:
        folder: the model; adapter: LoRA adapter for all rows, or None.
        budget: see `comparison_budget`.
        device, yarn: as `longrun.load` takes them.
        capacity: tokens to plan for.
    """

    def __init__(
        self, folder: Path, adapter: Path | None, budget: Budget, device: str | None, capacity: int,
        yarn: float | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._adapter, self._budget, self._capacity = folder, adapter, budget, capacity
        self._yarn = yarn
        self._device = device or default_device()
        if self._device == "cuda":
            # cuDNN plans for tenths of a second for every pair of lengths it has not seen, and hundreds come up here.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._config = ModelConfig.from_dir(folder).stretched(yarn)
        self._bases: dict[str, Runtime] = {}  # by weight format

    def check(self, rows: Sequence[Row]) -> None:
        """Every row's head map is there and fits the model: said before hours of other rows.

        Raises:
            HeadMapError: one is not, or does not.
        """
        for row in rows:
            head_map = row.make_map(self._config.num_layers, self._config.num_kv_heads)
            if row.kv_share is not None:
                row.split_at(self._config.num_layers, self._config.num_kv_heads, self._capacity)
                continue
            if row.kv_bytes is not None and isinstance(head_map, HeadMap) and head_map.reach_losses is None:
                raise HeadMapError(f"row {row.name}: kv_bytes need reach losses, which {row.head_map} does not have")
            choose_split(self._config, self._budget, head_map, row.retrieval_ratio)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's.

        Raises:
            InputError: it has none.
        """
        base = self._base(REFERENCE_ROW, self._weights(REFERENCE_ROW))
        if base.tokenizer is None:
            raise InputError(f"model folder {self._folder} has no tokenizer: questions are text, add its files")
        return base.tokenizer

    def get(self, row: Row, length: int | None = None, system_size: int = 0) -> Runtime | None:
        """A runtime with the row's head split, page format and weights.

        Args:
            length: the tested length, which a row that is `by_length` needs.
            system_size: what its keep "system" means at this length, in tokens.

        Returns:
            None where the row's share or bytes do not even hold the windows at this length.

        Raises:
            LongrunError: as `longrun.load`.
        """
        config = self._config
        if row.by_length:
            assert length is not None
            return self._at_length(row, length, system_size if row.keep == SYSTEM else int(row.keep or 0))
        head_map = row.make_map(config.num_layers, config.num_kv_heads)
        weights = self._weights(row)
        if is_quantized(weights):
            return self._load(row, head_map, row.retrieval_ratio)
        return self._base(row, weights).derive(
            head_map, row.stored_kv, row.chunk_size, ctx=self._capacity, retrieval_ratio=row.retrieval_ratio,
            keep=row.keep, select=row.select, select_from=row.select_from, prefill=row.sparse,
        )  # fmt: skip

    def _weights(self, row: Row) -> str:
        """The format of a row's weights."""
        return row.weights or self._budget.weight_format or DEFAULT_WEIGHT_FORMAT[self._device]

    def _base(self, row: Row, weights: str) -> Runtime:
        """Full attention over weights of this format, read once."""
        if weights not in self._bases:
            self._bases[weights] = self._load(
                replace(
                    row.read_exactly, chunk_size=None, keep=None, select=None, select_question=False,
                ),
                _FULL, None,
            )  # fmt: skip
        return self._bases[weights]

    def _at_length(self, row: Row, length: int, keep: int) -> Runtime | None:
        """The runtime of a row whose heads keep other tokens at every length, none of them the first `keep`."""
        weights = self._weights(row)
        if is_quantized(weights):
            raise InputError(
                f"row {row.name}: kv_share, kv_bytes and keep system are runtimes of their own at every length over "
                f"weights that are read once, which {weights} weights do not allow: use bf16 or fp32"
            )
        config, base, capacity = self._config, self._base(row, weights), length + SPARE_TOKENS
        if row.kv_share is not None:
            split = row.split_at(config.num_layers, config.num_kv_heads, length, keep)
            if split is None:
                return None
            made = base.derive(
                split, row.stored_kv, row.chunk_size, ctx=capacity, select=row.select, select_from=row.select_from,
                prefill=row.sparse,
            )  # fmt: skip
            head_map = row.make_map(config.num_layers, config.num_kv_heads)
            assert isinstance(head_map, HeadMap)
            adapter = None if self._adapter is None else Path(self._adapter)
            made.notices += other_model_notices(head_map, made.identity.model, made.model_dir, adapter)
            return made
        if row.kv_bytes is None:
            head_map = row.make_map(config.num_layers, config.num_kv_heads)
            return base.derive(
                head_map, row.stored_kv, row.chunk_size, ctx=capacity, retrieval_ratio=row.retrieval_ratio, keep=keep,
                select=row.select, select_from=row.select_from, prefill=row.sparse,
            )  # fmt: skip
        full = base.derive(_FULL, row.stored_kv, row.chunk_size, ctx=capacity)
        size, losses = row.bytes_at(full.plan.cache.kv_bytes), with_sinks(HeadMap.load(row.head_map), keep).reach_losses
        assert losses is not None, "checked before anything is measured"
        one = reach_bytes(losses, full.plan.cache.page_format, capacity)(losses.reaches[0])
        if size < one * config.num_layers * config.num_kv_heads:
            return None
        return base.derive(
            row.head_map, row.stored_kv, row.chunk_size, ctx=capacity, kv_bytes=size, keep=keep, select=row.select,
            select_from=row.select_from, prefill=row.sparse,
        )  # fmt: skip

    def _load(self, row: Row, head_map: HeadMap | str, ratio: float | None) -> Runtime:
        return longrun.load(
            self._folder, self._budget.override(chunk_size=row.chunk_size), head_map, row.stored_kv, row.weights,
            self._device, ctx=self._capacity, adapter=self._adapter, yarn=self._yarn, retrieval_ratio=ratio,
            keep=row.keep, select=row.select, select_from=row.select_from, prefill=row.sparse,
        )  # fmt: skip
