"""The memory plan: model shape + head split + budget + capacity -> every byte, or an error that says what would fit.

Plain arithmetic without torch. `python -m longrun.plan --help` prints a plan from config.json (or a GGUF header) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from longrun.arguments import choice, integer, number
from longrun.config.key_biases import KeyBiases
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError, PlanError, shortened
from longrun.machine.processor import bf16_product_copy_bytes
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.crossover import data_sheet
from longrun.plan.hot_pool import check_hot_bytes, hot_bytes_of, hot_pool_notes
from longrun.plan.key_biases import key_bias_warnings
from longrun.plan.placement import DEFAULT_WEIGHT_FORMAT, Placement, PlanItem, PlanSettings, place
from longrun.plan.prefill import prefill_facts, prefill_notes, prefill_of
from longrun.plan.reaches import allocated_split
from longrun.plan.search import Suggestion, largest_capacity, shortfall, suggest
from longrun.plan.selection import select_from_of, selection_notes, selection_of
from longrun.plan.split import ChosenSplit, choose_split
from longrun.quant.kv_format import PageFormat
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import MARKS, MOST_MARKS, CacheSpec
from longrun.specs.model_bytes import ModelWork, model_work
from longrun.units import ALL_TOKENS, format_bytes, parse_tokens

__all__ = ["ChosenSplit", "NoFitError", "Plan", "PlanItem", "Suggestion", "choose_split", "make_plan"]


class NoFitError(PlanError):
    """The budget does not hold what was asked.

    Attributes:
        device_short, host_short: bytes that are missing; no smaller sum of the two would be enough.
        suggestions: the nearest changes that fit, each verified; empty where none does.
    """

    def __init__(self, problem: str, device_short: int, host_short: int, suggestions: Sequence[Suggestion]) -> None:
        self._problem = problem
        self.device_short, self.host_short = device_short, host_short
        self.suggestions = tuple(suggestions)
        super().__init__()
        self.args = (self.told_by(()),)  # whole: an advice that is cut out would mislead

    def told_by(self, options: Collection[str]) -> str:
        if not self.suggestions:
            return f"{self._problem}; use a larger machine"
        return f"{self._problem}; what fits: " + ", or ".join(each.told_by(options) for each in self.suggestions)

    def to_dict(self, options: Collection[str]) -> dict[str, Any]:
        """The facts as JSON types, in the words of a command with these options."""
        return {
            "fits": False,
            "error": self.told_by(options),
            "device_short": self.device_short,
            "host_short": self.host_short,
            "suggestions": [
                {"setting": each.setting, "value": each.value, "text": each.told_by(options)}
                for each in self.suggestions
            ],
        }


@dataclass(frozen=True)
class Plan:
    """What a run holds, byte by byte. Sizes are bytes, lengths are tokens.

    Attributes:
        capacity: tokens that the cache holds.
        max_capacity: the most tokens that the same memory and settings hold (`longrun.plan.search.MAX_CAPACITY` where
            nothing grows with the context).
        model: the model's shape in words.
        cache, attention: what cache and attention backend allocate.
        work: what the weights cost a step in time.
        items: every part, with its place ("device" or "host").
        device_budget, host_budget: what the budget allows.
        split_hash: hash of the head split; split_note: where the split comes from.
        warnings: sentences a person must see before the run; notes: sentences that may help.
        kv_bytes_given: bytes of keys and values from which reaches were allocated; None where something else decided.
    """

    capacity: int
    max_capacity: int
    model: str
    device_type: str
    weight_format: str
    chunk_size: int
    split_hash: str
    split_note: str
    cache: CacheSpec
    attention: AttentionSpec
    work: ModelWork
    items: tuple[PlanItem, ...]
    device_budget: int
    host_budget: int
    budget_source: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kv_bytes_given: int | None = None

    @property
    def kv_format(self) -> str:
        return self.cache.page_format.name

    @property
    def page_size(self) -> int:
        return self.cache.page_format.page_size

    @property
    def device_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.place == "device")

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.place == "host")

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the dual cache on device and host together."""
        return self.cache.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as JSON types."""
        cache = self.cache
        return {
            "fits": True,
            "ctx": self.capacity,
            "max_ctx": self.max_capacity,
            "model": self.model,
            "device_type": self.device_type,
            "weight_format": self.weight_format,
            "kv_format": self.kv_format,
            "page_size": self.page_size,
            "chunk_size": self.chunk_size,
            "split": {
                "hash": self.split_hash,
                "note": self.split_note,
                "retrieval_heads": list(cache.retrieval_heads),
                "num_kv_heads": cache.num_kv_heads,
                "sink_size": cache.sink_size,
                "recent_size": cache.recent_size,
                "reaches": [[None if reach == ALL_TOKENS else reach for reach in row] for row in cache.reaches] or None,
            },
            "pages": {
                "per_head": cache.pages_per_head,
                "device_per_head": cache.device_pages_per_head,
                "device": cache.device_pages,
                "host": cache.host_pages,
                "fetch": cache.fetch_pages,
                "hot_per_head": cache.hot_slots,
            },
            "selection": None if self.attention.selection is None else asdict(self.attention.selection),
            "prefill": prefill_facts(self.attention),
            "items": [asdict(item) for item in self.items],
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "total_bytes": self.total_bytes,
            "cache_bytes": self.cache_bytes,
            "kv_bytes": cache.kv_bytes,
            "kv_bytes_given": self.kv_bytes_given,
            "bytes_per_token": cache.bytes_per_token,
            "budget": {"source": self.budget_source, "device": self.device_budget, "host": self.host_budget},
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def make_plan(
    config: ModelConfig,
    budget: Budget,
    capacity: int | None = None,
    *,
    split: HeadSplit | ChosenSplit | None = None,
    device_type: str = "cuda",
    reserved_bytes: int = 0,
    device_share: float = 1.0,
    gpu_kernels: bool = True,
    key_biases: KeyBiases | None = None,
    marks: int = MARKS,
    serves: bool = False,
) -> Plan:
    """Plan a run of `capacity` tokens within `budget`.

    Args:
        config: shape of the model.
        budget: memory, formats and chunk size; see `Budget.override` for options that win over a file.
        capacity: tokens that the cache holds; None takes the model's trained window, or less where less fits.
        split: head split, best with its origin (`choose_split`), so that the plan can name it and propose another
            ratio; None is full attention.
        device_type: "cpu" or "cuda".
        reserved_bytes: device memory that is taken already.
        device_share, gpu_kernels: see `PlanSettings`.
        key_biases: of the model's file, or None where they are not known; large ones get a warning.
        marks: points of a session to come back to (`Session.mark`) that get memory of their own.
        serves: see `PlanSettings`.

    Raises:
        NoFitError: the budget does not hold it; with the shortfall and what would fit.
        PlanError: a capacity that the model's own sliding window or the page tables do not allow.
        InputError: the split keeps more first tokens than the capacity, or the budget selects pages where that is not
            served (`longrun.plan.selection`) or reads sparsely where that is not (`longrun.plan.prefill`), or has a hot
            pool without use or of too few bytes.
    """
    capacity = None if capacity is None else parse_tokens(capacity, "capacity")
    choice(device_type, "device_type", ("cpu", "cuda"))
    device_share = number(device_share, "device_share", 0, 1)
    reserved_bytes = integer(reserved_bytes, "reserved_bytes")
    chosen = _with_origin(split, config, budget)
    selection = selection_of(budget, config, chosen.split)
    page_format = PageFormat(budget.kv_format, budget.page_size, config.head_dim)
    settings = PlanSettings(
        config=config,
        split=chosen.split,
        device_type=device_type,
        weight_format=budget.weight_format or DEFAULT_WEIGHT_FORMAT[device_type],
        kv_format=budget.kv_format,
        page_size=budget.page_size,
        chunk_size=budget.chunk_size,
        device_bytes=budget.device_bytes,
        host_bytes=budget.host_bytes,
        reserved_bytes=reserved_bytes,
        device_share=device_share,
        gpu_kernels=gpu_kernels,
        bf16_product_copy=bf16_product_copy_bytes(),
        marks=integer(marks, "marks", 1, MOST_MARKS),
        serves=serves,
        selection=selection,
        select_from=select_from_of(budget),
        speeds=data_sheet(budget.source),
        hot_bytes=hot_bytes_of(budget, selection),
        prefill=prefill_of(budget, config, device_type),
    )
    max_capacity = largest_capacity(settings)
    warnings = []
    if capacity is None:
        capacity, why = _default_capacity(config, max_capacity)
        warnings += why
    _check_window(config, capacity)
    check_hot_bytes(settings.hot_bytes, selection, chosen.split, page_format, capacity)
    if chosen.keep is not None and chosen.keep > capacity and max_capacity >= capacity:
        raise InputError(
            f"keep {chosen.keep:,} is more than the context of {capacity:,} tokens: give fewer, or a longer context"
        )
    if capacity > config.trained_positions:
        warnings.append(
            f"{capacity:,} tokens are more than the {config.trained_positions:,} that the model was trained for: "
            f"answers may degrade beyond that"
        )
    warnings += [warning.text for warning in config.warnings if capacity > warning.above]
    placement = place(settings, capacity)
    if not placement.fits:
        raise _no_fit(settings, placement, budget, chosen)
    if placement.cache.total_retrieval_heads:
        warnings += key_bias_warnings(key_biases, placement.cache.page_format)
    return Plan(
        capacity=capacity,
        max_capacity=max_capacity,
        model=describe_model(config),
        device_type=device_type,
        weight_format=settings.weight_format,
        chunk_size=placement.chunk_size,
        split_hash=chosen.split.hash,
        split_note=chosen.said,
        cache=placement.cache,
        attention=placement.attention,
        work=model_work(config, settings.weight_format, device_type),
        items=placement.items,
        device_budget=budget.device_bytes,
        host_budget=budget.host_bytes,
        budget_source=budget.source,
        warnings=tuple(warnings),
        notes=(
            *chosen.notes,
            *hot_pool_notes(settings, placement),
            *selection_notes(placement.attention),
            *prefill_notes(settings, placement),
        ),
        kv_bytes_given=chosen.kv_bytes,
    )


def describe_model(config: ModelConfig) -> str:
    stretched = f", YaRN {config.yarn:g}: {config.trained_positions:,} positions" if config.yarn else ""
    return (
        f"{config.architecture}, {config.num_layers} layers, {config.num_qo_heads} query and "
        f"{config.num_kv_heads} KV heads of {config.head_dim}{stretched}"
    )


def _with_origin(split: HeadSplit | ChosenSplit | None, config: ModelConfig, budget: Budget) -> ChosenSplit:
    if split is None:
        return choose_split(config, budget)
    if isinstance(split, ChosenSplit):
        return split
    scores = tuple(tuple(float(keep) for keep in row) for row in split.retrieval)
    note = "full attention" if split.is_full else "head split"
    return ChosenSplit(split, HeadMap(scores, split.sink_size, split.recent_size), note)


def _default_capacity(config: ModelConfig, max_capacity: int) -> tuple[int, list[str]]:
    """The trained window, or what fits of it; without a fit, one token, whose refusal then says what is missing."""
    wanted = config.trained_positions
    if config.sliding_window is not None:
        wanted = min(wanted, config.sliding_window)
    if max_capacity < wanted:
        warning = f"the budget holds {max_capacity:,} tokens of the model's {wanted:,}"
        return max(max_capacity, 1), [warning]
    return wanted, []


def _check_window(config: ModelConfig, capacity: int) -> None:
    if config.sliding_window is not None and capacity > config.sliding_window:
        raise PlanError(
            f"{capacity:,} tokens are more than the sliding window of {config.sliding_window:,} to which this "
            f"checkpoint limits every layer, which is not implemented: ask for at most {config.sliding_window:,} "
            f'tokens, or set "sliding_window": null in its config.json to run it with full context'
        )


def _no_fit(settings: PlanSettings, placement: Placement, budget: Budget, chosen: ChosenSplit) -> NoFitError:
    split_of = None
    if chosen.kv_bytes is not None:
        page_format = placement.cache.page_format
        losses = chosen.head_map.reach_losses
        split_of = partial(
            allocated_split, losses, page_format, placement.capacity, window=budget.recent_size, sink_size=chosen.keep
        )
    suggestions = suggest(
        settings, placement.capacity, chosen.resplits, split_of, chosen.kv_bytes or 0, chosen.keep or 1
    )
    device, host = shortfall(settings, placement.capacity)
    source = shortened(budget.source)
    before_cache = settings.weight_bytes + settings.weight_rounding + settings.base_bytes + settings.reserved_bytes
    if before_cache > settings.device_bytes:
        device, host = before_cache - settings.device_bytes, 0
        what = (
            f"{source} does not even hold the weights: {format_bytes(settings.weight_bytes)} in "
            f"{settings.weight_format}, and {format_bytes(before_cache - settings.weight_bytes)} for the rest, against "
            f"gpu = {format_bytes(settings.device_bytes)}"
        )
    elif settings.loading_bytes > settings.device_bytes:
        device, host = settings.loading_bytes - settings.device_bytes, 0
        what = (
            f"{source} (gpu {format_bytes(settings.device_bytes)}) does not hold the "
            f"{format_bytes(settings.weight_bytes)} of {settings.weight_format} weights while they load"
        )
    else:
        what = (
            f"{source} (gpu {format_bytes(settings.device_bytes)}, host {format_bytes(settings.host_bytes)}) does "
            f"not hold {placement.capacity:,} tokens"
        )
    kind = "GPU memory" if settings.device_type == "cuda" else "device pool memory"
    short = [f"{format_bytes(size)} of {name}" for size, name in ((device, kind), (host, "host memory")) if size]
    return NoFitError(f"{what}, {' and '.join(short)} short", device, host, suggestions)
