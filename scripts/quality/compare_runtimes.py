"""The runtimes of a comparison: one after another, over weights that are read once.

Rows differ in their head map and page format. Both change no weight: a head split only reorders the rows of q, k, v
and the columns of the output projection, so a row's runtime is made from the full-attention one on the device, in
milliseconds, where loading takes seconds. Quantized weights cannot be reordered and are loaded anew.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import longrun
from longrun.config.model_config import ModelConfig
from longrun.lab.quality.settings import Row
from longrun.model.decoder import Decoder, DecoderLayer
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.kernels import check_kernel_shapes
from longrun.plan.placement import DEFAULT_WEIGHT_FORMAT
from longrun.plan.plan import choose_split, make_plan
from longrun.quant.linear import QuantLinear
from longrun.runtime import gpu_checks
from longrun.runtime.head_map_check import other_model_notices
from longrun.runtime.runtime import Runtime

if TYPE_CHECKING:
    from longrun.kernels.gpu_kernels import GpuKernels

_EXACT = ("fp32", "bf16")  # weight formats that can be reordered
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
        ctx: capacity to plan for, tokens.
    """

    def __init__(self, folder: Path, adapter: Path | None, budget: Budget, device: str | None, ctx: int) -> None:
        self._folder, self._adapter, self._budget, self._ctx = folder, adapter, budget, ctx
        self._device = device or default_device()
        if self._device == "cuda":
            # cuDNN plans for tenths of a second for every pair of lengths it has not seen, and hundreds come up here.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._config = ModelConfig.from_dir(folder)
        self._bases: dict[str, Runtime] = {}  # by weight format
        self._kernels: dict[str, GpuKernels] = {}

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
        if weights not in _EXACT:
            return self._load(row, head_map, row.retrieval_ratio)
        if weights not in self._bases:
            self._bases[weights] = self._load(replace(row, chunk_size=None), _FULL, None)
        return self._derived(self._bases[weights], head_map, row)

    def _load(self, row: Row, head_map: HeadMap | str, ratio: float | None) -> Runtime:
        return longrun.load(
            self._folder, self._budget.override(chunk_size=row.chunk_size), head_map, row.stored_kv, row.weights,
            self._device, ctx=self._ctx, adapter=self._adapter, retrieval_ratio=ratio,
        )  # fmt: skip

    def _derived(self, base: Runtime, head_map: HeadMap | str, row: Row) -> Runtime:
        """A runtime of its own over the weights of `base`, reordered where the split wants it.

        Free memory is not asked for again: `base` was loaded for full attention at the same context.
        """
        budget = base._budget.override(kv_format=row.stored_kv, chunk_size=row.chunk_size)
        chosen = choose_split(base.config, budget, head_map, row.retrieval_ratio)
        if self._device == "cuda":
            check_kernel_shapes(base.config, budget)
        plan = make_plan(base.config, budget, self._ctx, split=chosen, device_type=self._device)
        kernels = self._gpu_kernels(base, plan.kv_format) if plan.attention.fused else None
        found = copy.copy(base)
        notices = other_model_notices(chosen.head_map, base._identity.model, self._folder, self._adapter)
        found.split, found.plan, found.notices = chosen.split, plan, [*base.notices, *chosen.notes, *notices]
        found._budget, found._chosen, found._sessions = budget, chosen, weakref.WeakSet()
        decoder = reordered(base._parts.decoder, found.split, kernels)
        found._parts = replace(base._parts, decoder=decoder, gpu_kernels=kernels)
        found._identity = replace(base._identity, head_split=found.split.hash, kv_format=plan.kv_format)
        return found

    def _gpu_kernels(self, base: Runtime, kv_format: str) -> GpuKernels:
        if kv_format not in self._kernels:
            from longrun.kernels.gpu_kernels import load_gpu_kernels

            held = base._parts.gpu_kernels if base.plan.kv_format == kv_format else None
            self._kernels[kv_format] = held or load_gpu_kernels(base.config.head_dim, kv_format)
        return self._kernels[kv_format]


def reordered(decoder: Decoder, split: HeadSplit, kernels: GpuKernels | None) -> Decoder:
    """The decoder with its KV heads in the order of `split`; what does not move is shared.

    Args:
        decoder: of full attention (heads in their own order), weights fp32 or bf16.
        kernels: fused kernels for it, or None for plain torch.
    """
    config = decoder.config
    assert decoder.permutation == (tuple(range(config.num_kv_heads)),) * config.num_layers
    orders = [split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
    layers = [_reordered_layer(layer, order, decoder) for layer, order in zip(decoder._layers, orders, strict=True)]
    return Decoder(
        config, orders, decoder._embedding, layers, decoder._final_norm, decoder._lm_head, decoder.token_slice, kernels
    )


def _reordered_layer(layer: DecoderLayer, order: Sequence[int], decoder: Decoder) -> DecoderLayer:
    if list(order) == sorted(order):
        return layer
    config, device = decoder.config, decoder.device
    heads = torch.tensor(order, device=device)

    def channels(width: int) -> torch.Tensor:
        return (heads[:, None] * width + torch.arange(width, device=device)).flatten()

    q, kv = channels(config.head_dim * config.group_size), channels(config.head_dim)
    rows = torch.cat((q, config.q_size + kv, config.q_size + config.kv_size + kv))
    return replace(layer, qkv=_taken(layer.qkv, 0, rows), out=_taken(layer.out, 1, q))


def _taken(linear: QuantLinear, dim: int, order: torch.Tensor) -> QuantLinear:
    assert linear.weight_format in _EXACT
    bias = linear.bias if linear.bias is None or dim == 1 else linear.bias[order]
    return QuantLinear(linear.data.index_select(dim, order), linear.weight_format, bias, linear.compute_dtype)
