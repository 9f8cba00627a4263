"""Which heads keep all tokens: one rule for the planner and the runtime, from head map, options and budget."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from longrun.arguments import number
from longrun.config.model_config import ModelConfig
from longrun.errors import HeadMapError, InputError, quoted
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget


@dataclass(frozen=True)
class ChosenSplit:
    """A split with its origin.

    Attributes:
        head_map: the map it was made from.
        note: for the plan's head line; notes: to be shown.
        even: scores stand for no measurement but for heads spread evenly over the layers, with `head_map`'s window.
    """

    split: HeadSplit
    head_map: HeadMap
    note: str
    notes: tuple[str, ...] = ()
    even: bool = False

    def resplits(self, retrieval_ratio: float) -> tuple[HeadSplit, ...]:
        """What the split may be at another ratio: of the same map, or of one that keeps the heads evenly; without a
        map (full attention) also of one that keeps whole layers, which needs the most memory."""
        if self.split.reaches:  # other bytes give other reaches, another ratio gives none
            return (self.split,)
        if not self.even:
            return (self.head_map.split(retrieval_ratio=retrieval_ratio),)
        window = self.head_map.sink_size, self.head_map.recent_size
        shape = self.split.num_layers, self.split.num_kv_heads
        even = HeadMap.uniform(*shape, retrieval_ratio, *window).split(retrieval_ratio)
        if not self.split.is_full:
            return (even,)
        return even, HeadMap.full(*shape).with_window(*window).split(retrieval_ratio)


def choose_split(
    config: ModelConfig,
    budget: Budget,
    head_map: HeadMap | str | Path | None = None,
    retrieval_ratio: float | None = None,
    *,
    assume: bool = False,
) -> ChosenSplit:
    """The split for a model.

    A head map is split by `retrieval_ratio`, else by the budget's, else at score 0.5; the budget's sink_size and
    recent_size win over the map's own. "full", and None without a ratio, mean full attention, and the budget's
    ratio is then not used.

    Args:
        head_map: folder, map, "full" or None.
        retrieval_ratio: the caller's own ratio.
        assume: let None with a ratio stand for a map that keeps that share of the heads of every layer. That is good
            enough to plan with, never to run with.

    Raises:
        HeadMapError: a map that cannot be read, has another shape than the model, or a ratio outside [0, 1].
        InputError: a ratio without a head map to apply it to.
    """
    if retrieval_ratio is not None:
        retrieval_ratio = number(retrieval_ratio, "retrieval ratio", 0, 1, error=HeadMapError)
    if not isinstance(head_map, HeadMap | str | PathLike | None):
        raise InputError(f'head map {quoted(head_map)} is neither a HeadMap nor a folder: give one, or "full"')
    shape = (config.num_layers, config.num_kv_heads)
    if head_map is None and retrieval_ratio is not None and assume:
        assumed = HeadMap.uniform(*shape, retrieval_ratio).with_window(budget.sink_size, budget.recent_size)
        split = assumed.split(retrieval_ratio=retrieval_ratio)
        note = f"assumed: {retrieval_ratio:g} of the heads, spread over the layers"
        return ChosenSplit(split, assumed, note, even=True)
    if head_map is None or (isinstance(head_map, str) and head_map == "full"):
        if retrieval_ratio is not None and retrieval_ratio != 1:
            raise InputError(
                f"retrieval ratio {retrieval_ratio:g} needs a head map that says which heads to keep: give a head "
                f"map folder, or leave the ratio out for full attention"
            )
        notes = ()
        if budget.retrieval_ratio not in (None, 1):
            notes = (f"{budget.source}: retrieval_ratio {budget.retrieval_ratio:g} is not used without a head map",)
        full = HeadMap.full(*shape)
        note = "full attention" + (": no head map given" if head_map is None else "")
        windowed = full.with_window(budget.sink_size, budget.recent_size)
        return ChosenSplit(full.split(), windowed, note, notes, even=True)
    source = "head map" if isinstance(head_map, HeadMap) else f"head map {head_map}"
    loaded = head_map if isinstance(head_map, HeadMap) else HeadMap.load(head_map)
    loaded.check_shape(*shape, source)
    notes = tuple(f"{source}: {note}" for note in loaded.notes)
    loaded = loaded.with_window(budget.sink_size, budget.recent_size)
    ratio = budget.retrieval_ratio if retrieval_ratio is None else retrieval_ratio
    split = loaded.split(retrieval_ratio=ratio)
    notes += tuple(f"{source}: {doubt}" for doubt in loaded.doubts(split, by_ratio=ratio is not None))
    how = "heads that score at least 0.5" if ratio is None else f"retrieval ratio {ratio:g}"
    return ChosenSplit(split, loaded, f"{source}, {how}", notes)
