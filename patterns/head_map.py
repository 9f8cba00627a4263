"""Head maps: one score per (layer, KV head), and its deterministic split into retrieval and streaming heads.

On disk a head map is a folder in the format of DuoAttention (arXiv 2410.10819): `full_attention_heads.tsv`, floats
separated by tabs, a row per layer and a column per KV head, and `config.json`, of which `sink_size`, `recent_size` and
the model that `longrun.patterns.identify` recorded are read. A score of 1 says that the head needs all tokens, 0 that
sinks and a recent window will do. A third file, `reach_losses.json` (`longrun.patterns.reach_losses`), may say how far
each head needs to reach.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from longrun.arguments import number
from longrun.errors import HeadMapError, quoted
from longrun.paths import user_path
from longrun.patterns.head_map_folder import (
    CONFIG_FILE,
    SCORES_FILE,
    HeadMapOrigin,
    read_origin,
    read_scores,
    read_window,
    write_folder,
)
from longrun.patterns.head_split import (
    DEFAULT_RECENT_SIZE,
    DEFAULT_SINK_SIZE,
    HeadSplit,
    check_rows,
    check_window,
    count_for_ratio,
    spread_retrieval_heads,
)
from longrun.patterns.reach_losses import ReachLosses

__all__ = ["DEFAULT_RECENT_SIZE", "DEFAULT_SINK_SIZE", "HeadMap", "HeadSplit", "spread_retrieval_heads"]

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class HeadMap:
    """Scores of the KV heads, and the window with which they were measured.

    Attributes:
        scores: [num_layers][num_kv_heads], each in [0, 1].
        sink_size, recent_size: tokens a streaming head keeps: positions < sink_size and the last recent_size.
        notes: what was corrected or assumed while loading; to be shown.
        origin: the model it was made for, or None where that is not known; maps of the same scores are equal whatever
            it says.
        reach_losses: what each head loses with a shorter reach, or None where that was not measured.

    Raises:
        HeadMapError: no layer or head, rows of different lengths, a score that is not in [0, 1] (`from_scores`
            clips), sink_size < 0 or recent_size < 1, or reach losses of another shape.
    """

    scores: tuple[tuple[float, ...], ...]
    sink_size: int = DEFAULT_SINK_SIZE
    recent_size: int = DEFAULT_RECENT_SIZE
    notes: tuple[str, ...] = ()
    origin: HeadMapOrigin | None = field(default=None, compare=False)
    reach_losses: ReachLosses | None = None

    def __post_init__(self) -> None:
        check_rows(self.scores, "head map")
        check_window(self.sink_size, self.recent_size, "head map")
        for layer, row in enumerate(self.scores):
            for head, score in enumerate(row):
                number(score, f"head map: layer {layer}, KV head {head}: score", 0, 1, error=HeadMapError)
        losses = self.reach_losses
        if losses is not None and (losses.num_layers, losses.num_kv_heads) != (self.num_layers, self.num_kv_heads):
            raise HeadMapError(
                f"the reach losses are of {losses.num_layers} layers of {losses.num_kv_heads} KV heads, but the head "
                f"map has {self.num_layers} of {self.num_kv_heads}: measure both on one model"
            )

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[Sequence[float]],
        sink_size: int = DEFAULT_SINK_SIZE,
        recent_size: int = DEFAULT_RECENT_SIZE,
        notes: Sequence[str] = (),
        source: str = "head map",
    ) -> HeadMap:
        """A map from raw scores, clipped to [0, 1], with a note where that changed one.

        Args:
            scores: [num_layers][num_kv_heads] of numbers, also as array or tensor.

        Raises:
            HeadMapError: empty or ragged rows, NaN or infinity (row and column named, counted from 1), a bad window.
        """
        scores = _plain(scores)
        if isinstance(scores, list | tuple):
            scores = [_plain(row) for row in scores]
        check_rows(scores, source)
        rows = [[_score(score, f"{source}: a score of row {number}") for score in row]
                for number, row in enumerate(scores, start=1)]  # fmt: skip
        for row_number, row in enumerate(rows, start=1):
            for column, score in enumerate(row, start=1):
                if not math.isfinite(score):
                    raise HeadMapError(
                        f"{source}: row {row_number}, column {column} (layer {row_number - 1}, KV head {column - 1}) "
                        f"is {score}: every score must be a finite number"
                    )
        notes = list(notes)
        flat = [score for row in rows for score in row]
        for count, what in ((sum(s < 0 for s in flat), "below 0"), (sum(s > 1 for s in flat), "above 1")):
            if count:
                notes.append(f"clipped {count} score{'s' if count > 1 else ''} {what}")
        clipped = tuple(tuple(min(max(score, 0.0), 1.0) for score in row) for row in rows)
        return cls(clipped, sink_size, recent_size, tuple(notes))

    @classmethod
    def full(cls, num_layers: int, num_kv_heads: int) -> HeadMap:
        """Every head needs all tokens: full attention."""
        return cls(((1.0,) * num_kv_heads,) * num_layers)

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        num_kv_heads: int,
        retrieval_ratio: float,
        sink_size: int = DEFAULT_SINK_SIZE,
        recent_size: int = DEFAULT_RECENT_SIZE,
    ) -> HeadMap:
        """Scores 1 for the first heads of each layer and 0 for the others, spread evenly over the layers."""
        counts = spread_retrieval_heads(num_layers, num_kv_heads, retrieval_ratio)
        scores = tuple((1.0,) * count + (0.0,) * (num_kv_heads - count) for count in counts)
        return cls(scores, sink_size, recent_size)

    @classmethod
    def load(cls, folder: str | Path) -> HeadMap:
        """Read a head map folder.

        A missing `config.json`, or one without a size, gives 64 sinks and a window of 256, with a note.

        Raises:
            HeadMapError: a missing folder or file, ragged rows, something that is not a finite number (file, row and
                column named), an impossible sink_size or recent_size, or reach losses that cannot be used.
        """
        folder = user_path(folder, "head map", HeadMapError)
        rows = read_scores(folder)
        loaded = cls.from_scores(rows, *read_window(folder), source=str(folder / SCORES_FILE))
        return replace(loaded, origin=read_origin(folder), reach_losses=ReachLosses.read(folder))

    def save(self, folder: str | Path, force: bool = False, facts: Mapping[str, object] | None = None) -> None:
        """Write the map so that `load` gives the very same scores and reach losses back.

        Args:
            force: overwrite another map.
            facts: JSON types that go into `config.json` with the window, such as where the scores come from.

        The folder appears complete or not at all. Saving the map that is already there changes nothing; files that
        are not part of a head map are kept.

        Raises:
            HeadMapError: the folder holds another map and `force` is false, it holds the `config.json` of something
                else, or it cannot be written.
        """
        folder = user_path(folder, "head map folder", HeadMapError)
        target = Path(os.path.realpath(folder))
        if target.exists() and not target.is_dir():
            raise HeadMapError(f"head map {folder} is a file: give a folder to save to")
        if (target / CONFIG_FILE).exists() and not (target / SCORES_FILE).exists():
            raise HeadMapError(f"{folder} holds a {CONFIG_FILE} that is not a head map's: save to a folder of its own")
        if (target / SCORES_FILE).exists():
            if self._same_as_saved(target) and not (force and facts):
                return
            if not force:
                raise HeadMapError(f"{folder} holds another head map: save to a new folder, or overwrite with force")
        try:
            write_folder(target, self.scores, self.sink_size, self.recent_size, facts or {}, self.reach_losses)
        except OSError as error:
            raise HeadMapError(f"head map cannot be saved to {folder}: {error.strerror or error}") from error

    def check_shape(self, num_layers: int, num_kv_heads: int, source: str = "head map") -> None:
        """Raise HeadMapError unless the map has the model's [num_layers][num_kv_heads]."""
        if (self.num_layers, self.num_kv_heads) != (num_layers, num_kv_heads):
            raise HeadMapError(
                f"{source} has {self.num_layers} layers of {self.num_kv_heads} KV heads, but the model has "
                f"{num_layers} of {num_kv_heads}: give a head map made for this model"
            )

    def with_window(self, sink_size: int | None = None, recent_size: int | None = None) -> HeadMap:
        """The same scores with another window; None keeps the map's own value."""
        return replace(
            self,
            sink_size=self.sink_size if sink_size is None else sink_size,
            recent_size=self.recent_size if recent_size is None else recent_size,
        )

    def split(self, retrieval_ratio: float | None = None, threshold: float | None = None) -> HeadSplit:
        """Retrieval and streaming heads, always the same for the same map and arguments.

        Args:
            retrieval_ratio: keep the `round(retrieval_ratio * total)` heads with the highest scores over all layers;
                ties go to the lower (layer, head).
            threshold: keep every head with a score of at least this. With neither argument it is 0.5.

        Raises:
            HeadMapError: both arguments given, or one outside [0, 1].
        """
        if retrieval_ratio is not None and threshold is not None:
            raise HeadMapError(
                f"a head map is split by retrieval ratio ({retrieval_ratio}) or by threshold ({threshold}): give one"
            )
        if retrieval_ratio is not None:
            order = [(-score, layer, head) for layer, row in enumerate(self.scores) for head, score in enumerate(row)]
            kept = {(layer, head) for _, layer, head in sorted(order)[: count_for_ratio(retrieval_ratio, len(order))]}
            bits = tuple(
                tuple((layer, head) in kept for head in range(self.num_kv_heads)) for layer in range(self.num_layers)
            )
        else:
            threshold = DEFAULT_THRESHOLD if threshold is None else threshold
            threshold = number(threshold, "threshold", 0, 1, error=HeadMapError)
            bits = tuple(tuple(score >= threshold for score in row) for row in self.scores)
        return HeadSplit(bits, self.sink_size, self.recent_size)

    def doubts(self, split: HeadSplit, by_ratio: bool) -> tuple[str, ...]:
        """What a person should know before relying on `split` of this map: sentences, mostly none.

        Args:
            by_ratio: it was split by a retrieval ratio, so that only the order of the scores counts.
        """
        scores = {score for row in self.scores for score in row}
        if by_ratio and len(scores) == 1 and not split.is_full and split.total_retrieval:
            return (
                f"all scores are {scores.pop():g}, so they rank nothing and the first heads are kept: measure a map "
                f"with more steps or longer texts",
            )
        if not by_ratio and not split.total_retrieval:
            return (
                f"no head scores enough to keep all tokens (the highest score is {max(scores):.2g}), so nothing beyond "
                f"the window of {self.recent_size:,} tokens can be found: split the map by a retrieval ratio, or "
                f"measure one with more steps or longer texts",
            )
        return ()

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def num_kv_heads(self) -> int:
        return len(self.scores[0])

    def _same_as_saved(self, folder: Path) -> bool:
        try:
            saved = HeadMap.load(folder)
        except HeadMapError:
            return False
        return replace(saved, notes=()) == replace(self, notes=()) and not saved.notes


def _score(value: Any, what: str) -> float:
    """A score as float; NaN and infinity are reported with row and column later."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise HeadMapError(f"{what} is {quoted(value)}: every score must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _plain(values: Any) -> Any:
    """Lists for arrays and tensors; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values
