"""Which heads keep all tokens, or how far they reach: one rule for the planner and the runtime, from head map, options
and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from longrun.arguments import number
from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError, HeadMapError, InputError, quoted
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import SYSTEM, Budget
from longrun.plan.reaches import allocated_split, window_of
from longrun.quant.kv_format import PageFormat
from longrun.specs.cache_spec import head_bytes
from longrun.specs.reach import Reach
from longrun.units import ALL_TOKENS, format_bytes, parse_bytes, parse_tokens, share_of

KV_BYTES_HELP = (
    "instead of a ratio: memory for keys and values, like 8GB, or a share of what full attention takes, like 25%%; it "
    "decides how far each head reaches"
)
KEEP_HELP = "first tokens that no head drops, whatever its reach"


@dataclass(frozen=True)
class ChosenSplit:
    """A split with its origin.

    Attributes:
        head_map: the map it was made from.
        note: for the plan's head line; notes: to be shown.
        even: scores stand for no measurement but for heads spread evenly over the layers, with `head_map`'s window.
        kv_bytes: what reaches were allocated from; None where a ratio or scores decided, or a session.
        keep: the split's sinks, where a run asked for more first tokens than those that `head_map` keeps.
    """

    split: HeadSplit
    head_map: HeadMap
    note: str
    notes: tuple[str, ...] = ()
    even: bool = False
    kv_bytes: int | None = None
    keep: int | None = None

    @property
    def said(self) -> str:
        """`note`, and what every head keeps."""
        return self.note if self.keep is None else f"{self.note}; no head drops the first {self.keep:,} tokens"

    def keeping(self, keep: int | None) -> ChosenSplit:
        """The same heads with these first tokens as sinks, where they are more than the map's own; None keeps those."""
        sinks = self.head_map.sink_size
        more = None if keep is None or keep <= sinks or self.split.is_full else keep
        said: tuple[str, ...] = ()
        if keep and more is None:
            why = "every head keeps all tokens" if self.split.is_full else f"every head keeps {sinks:,} of its own"
            said = (f"keep {keep:,} changes nothing, as {why}",)
        split = self.split if self.split.is_full else replace(self.split, sink_size=more or sinks)
        return replace(self, split=split, notes=self.notes + said, keep=more)

    def resplits(self, retrieval_ratio: float) -> tuple[HeadSplit, ...]:
        """What the split may be at another ratio: of the same map, or of one that keeps the heads evenly; without a
        map (full attention) also of one that keeps whole layers, which needs the most memory."""
        if self.split.reaches:  # other bytes give other reaches, another ratio gives none
            return (self.split,)
        sinks = self.head_map.sink_size if self.keep is None else self.keep
        if not self.even:
            return (self.head_map.with_window(sinks).split(retrieval_ratio=retrieval_ratio),)
        window = sinks, self.head_map.recent_size
        shape = self.split.num_layers, self.split.num_kv_heads
        even = HeadMap.uniform(*shape, retrieval_ratio, *window).split(retrieval_ratio)
        if not self.split.is_full:
            return (even,)
        return even, HeadMap.full(*shape).with_window(*window).split(retrieval_ratio)


def parse_keep(keep: int | str, what: str = "keep") -> int | str:
    """First tokens to keep: a number like 700 or "1K", 0 for the sinks alone, or "system".

    Raises:
        InputError: neither, or a number out of range.
    """
    if keep == SYSTEM:
        return SYSTEM
    return parse_tokens(keep, what, 0)


def budget_by_hand(budget: Budget, retrieval_ratio: float | None, kv_bytes: int | str | None) -> Budget:
    """The budget where a ratio or bytes given by hand win over what the file says of either.

    Raises:
        InputError: both are given, or `kv_bytes` is neither a size nor a share like "25%".
        ConfigError: 0 bytes.
    """
    if kv_bytes is None:
        return budget if retrieval_ratio is None else replace(budget, kv_bytes=None)
    size = kv_bytes if share_of(kv_bytes) is not None else parse_bytes(kv_bytes, "kv_bytes")
    if retrieval_ratio is not None:
        raise InputError(
            f"kv_bytes {quoted(kv_bytes)} and retrieval ratio {quoted(retrieval_ratio)} both say which heads keep all "
            f"tokens: give one"
        )
    return replace(budget, retrieval_ratio=None).override(kv_bytes=size)


def choose_split(
    config: ModelConfig,
    budget: Budget,
    head_map: HeadMap | HeadSplit | str | Path | None = None,
    retrieval_ratio: float | None = None,
    *,
    assume: bool = False,
    capacity: int | None = None,
    session_reaches: Sequence[Sequence[int]] | None = None,
) -> ChosenSplit:
    """The split for a model, with the budget's `keep`.

    A head map is split by `retrieval_ratio`, else by the budget's, else at score 0.5; the budget's sink_size and
    recent_size win over the map's own. "full", and None without a ratio, mean full attention, and the budget's
    ratio is then not used.

    Args:
        head_map: folder, map, "full" or None; or a split, which stays as it is.
        retrieval_ratio: the caller's own ratio.
        assume: let None with a ratio stand for a map that keeps that share of the heads of every layer. That is good
            enough to plan with, never to run with.
        capacity: tokens of the context, for which the budget's `kv_bytes` are allocated.
        session_reaches: [num_layers][num_kv_heads] of the session that will be loaded: with `kv_bytes` they stay.

    Raises:
        HeadMapError: a map that cannot be read, has another shape than the model, or a ratio outside [0, 1].
        InputError: a ratio or `kv_bytes` without a head map to apply it to or with a split, `kv_bytes` without a
            capacity or reach losses, or `keep` stands for a system prompt that nobody has counted.
        ConfigError: the budget asks for another window than the reach losses were measured with.
    """
    if isinstance(budget.keep, str):
        raise InputError(
            f"keep {budget.keep} needs a chat's system prompt, which is not known here: give a number of tokens"
        )
    chosen = _choose(config, budget, head_map, retrieval_ratio, assume, capacity, session_reaches)
    return chosen.keeping(budget.keep)


def _choose(
    config: ModelConfig,
    budget: Budget,
    head_map: HeadMap | HeadSplit | str | Path | None,
    retrieval_ratio: float | None,
    assume: bool,
    capacity: int | None,
    session_reaches: Sequence[Sequence[int]] | None,
) -> ChosenSplit:
    """See `choose_split`; with the map's own sinks."""
    if retrieval_ratio is not None:
        retrieval_ratio = number(retrieval_ratio, "retrieval ratio", 0, 1, error=HeadMapError)
    if isinstance(head_map, HeadSplit):
        return _given(config, budget, head_map, retrieval_ratio)
    if not isinstance(head_map, HeadMap | str | PathLike | None):
        raise InputError(f'head map {quoted(head_map)} is neither a HeadMap nor a folder: give one, or "full"')
    if budget.kv_bytes is not None:
        budget_by_hand(budget, retrieval_ratio, budget.kv_bytes)
        return _allocated(config, budget, head_map, capacity, session_reaches)
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
    loaded, source, notes = _opened(head_map, config)
    loaded = loaded.with_window(budget.sink_size, budget.recent_size)
    ratio = budget.retrieval_ratio if retrieval_ratio is None else retrieval_ratio
    split = loaded.split(retrieval_ratio=ratio)
    notes += tuple(f"{source}: {doubt}" for doubt in loaded.doubts(split, by_ratio=ratio is not None))
    how = "heads that score at least 0.5" if ratio is None else f"retrieval ratio {ratio:g}"
    return ChosenSplit(split, loaded, f"{source}, {how}", notes)


def _given(config: ModelConfig, budget: Budget, split: HeadSplit, retrieval_ratio: float | None) -> ChosenSplit:
    """A split that was decided before."""
    if retrieval_ratio is not None or budget.kv_bytes is not None:
        raise InputError("a head split says which heads keep how much: give it without a retrieval ratio and kv_bytes")
    scores = tuple(tuple(float(keep) for keep in row) for row in split.retrieval)
    head_map = HeadMap(scores, split.sink_size, split.recent_size)
    head_map.check_shape(config.num_layers, config.num_kv_heads, "head split")
    return ChosenSplit(split, head_map, f"a given split, {split.hash}")


def _allocated(
    config: ModelConfig,
    budget: Budget,
    head_map: HeadMap | str | Path | None,
    capacity: int | None,
    session_reaches: Sequence[Sequence[int]] | None,
) -> ChosenSplit:
    """The split that the budget's `kv_bytes` give, or that of a session."""
    share = share_of(budget.kv_bytes)
    wanted = f"kv_bytes of {format_bytes(budget.kv_bytes) if share is None else budget.kv_bytes}"
    if head_map is None or (isinstance(head_map, str) and head_map == "full"):
        raise InputError(
            f"{wanted} need a head map with reach losses, which say how far each head has to reach: give its folder, "
            f"or leave kv_bytes out for full attention"
        )
    loaded, source, notes = _opened(head_map, config)
    losses = loaded.reach_losses
    if losses is None:
        raise InputError(
            f"{wanted} need reach losses, and {source} has none: measure them (longrun.patterns identify --method "
            f"reach), or give a retrieval ratio instead"
        )
    if budget.sink_size not in (None, losses.sink_size):
        raise ConfigError(
            f"{budget.source}: [kv] sink_size = {budget.sink_size} is not the {losses.sink_size} with which the reach "
            f"losses of kv_bytes were measured: leave it out"
        )
    if budget.recent_size not in (None, *losses.reaches):
        raise ConfigError(
            f"{budget.source}: [kv] recent_size = {budget.recent_size} is none of the reaches with which the losses of "
            f"kv_bytes were measured ({', '.join(map(str, losses.reaches))}): give one of them, or leave it out"
        )
    if session_reaches is not None:
        split = HeadSplit.of_reaches(session_reaches, losses.sink_size, window_of(session_reaches, losses))
        if (split.num_layers, split.num_kv_heads) != (config.num_layers, config.num_kv_heads):
            raise HeadMapError(
                f"the session's reaches are of {split.num_layers} layers of {split.num_kv_heads} KV heads, but the "
                f"model has {config.num_layers} of {config.num_kv_heads}: load the checkpoint it was made with"
            )
        notes += (f"the session keeps the reaches it was made with: {wanted} change nothing in it",)
        return ChosenSplit(split, _with_window_of(loaded, split), f"{source}, reaches of the session", notes)
    if capacity is None:
        raise InputError(f"{wanted} need a stated context, since a reach costs more bytes in a longer one: give ctx")
    page_format = PageFormat(budget.kv_format, budget.page_size, config.head_dim)
    size = budget.kv_bytes
    if share is not None:
        heads = config.num_layers * config.num_kv_heads
        size = int(share * heads * head_bytes(Reach(ALL_TOKENS, losses.sink_size, page_format), capacity))
    assert not isinstance(budget.keep, str)
    sinks = max(losses.sink_size, budget.keep or 0)
    split = allocated_split(losses, page_format, capacity, size, budget.recent_size, sinks)
    split = replace(split, sink_size=losses.sink_size)  # the others come back with `keeping`
    note = f"{source}, {wanted}"
    return ChosenSplit(split, _with_window_of(loaded, split), note, notes, kv_bytes=size)


def _with_window_of(head_map: HeadMap, split: HeadSplit) -> HeadMap:
    return head_map.with_window(split.sink_size, split.recent_size)


def _opened(head_map: HeadMap | str | Path, config: ModelConfig) -> tuple[HeadMap, str, tuple[str, ...]]:
    """A map of the model's shape, what messages call it, and its notes."""
    source = "head map" if isinstance(head_map, HeadMap) else f"head map {head_map}"
    loaded = head_map if isinstance(head_map, HeadMap) else HeadMap.load(head_map)
    loaded.check_shape(config.num_layers, config.num_kv_heads, source)
    return loaded, source, tuple(f"{source}: {note}" for note in loaded.notes)
