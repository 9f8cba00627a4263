"""What is lost where a head sees only its newest tokens: a loss for every head and reach, and its file.

`reach_losses.json` stands in a head map's folder, next to the two files of DuoAttention's format, which says nothing of
reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longrun.arguments import integer, number
from longrun.errors import HeadMapError, quoted, short_path
from longrun.files.user_files import read_object
from longrun.units import ALL_TOKENS, MAX_TOKENS

REACH_LOSSES_FILE = "reach_losses.json"
MEASURED_SHARE = 4
"""A reach is measured on a text of at least this many times its length: most tokens then see less than all."""

SMALL_SHARE = 0.01
"""Of a head's largest loss: what is called nothing when a map is shown."""

_ADVICE = "measure the losses again, or remove the file"


@dataclass(frozen=True)
class ReachLosses:
    """Losses of every KV head with the sinks and its newest tokens alone; with all tokens there is none.

    Attributes:
        sink_size: tokens from position 0 on that every head saw.
        measured_length: tokens of the text on which it was measured.
        reaches: tokens beside the sinks, the query's own included; ascending. The first is the streaming heads' window.
        losses: [num_layers][num_kv_heads][len(reaches)], at least 0, of any unit that is the same for all heads.

    Raises:
        HeadMapError: no reach, reaches that do not ascend or are longer than a quarter of the measured text, losses
            of another shape, or one that is no finite number of at least 0.
    """

    sink_size: int
    measured_length: int
    reaches: tuple[int, ...]
    losses: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        integer(self.sink_size, "reach losses: sink_size", 0, MAX_TOKENS, HeadMapError)
        integer(self.measured_length, "reach losses: measured_length", 1, MAX_TOKENS, HeadMapError)
        if not self.reaches:
            raise HeadMapError("reach losses name no reach: give at least the streaming heads' window")
        for before, reach in zip((0, *self.reaches), self.reaches, strict=False):
            integer(reach, "reach losses: reach", 1, MAX_TOKENS, HeadMapError)
            if reach <= before:
                raise HeadMapError(f"reach losses: reach {reach:,} follows {before:,}: list them in ascending order")
        if self.reaches[-1] * MEASURED_SHARE > self.measured_length:
            raise HeadMapError(
                f"reach losses: reach {self.reaches[-1]:,} is longer than a quarter of the {self.measured_length:,} "
                f"tokens it was measured on: measure on a text of at least {self.reaches[-1] * MEASURED_SHARE:,}, or "
                f"leave the reach out"
            )
        if not self.losses or not self.losses[0]:
            raise HeadMapError("reach losses are empty: they need a row per layer and a column per KV head")
        for layer, row in enumerate(self.losses):
            if len(row) != len(self.losses[0]):
                raise HeadMapError(
                    f"reach losses: layer {layer} has {len(row)} KV heads where layer 0 has {len(self.losses[0])}: "
                    f"every layer needs as many"
                )
            for head, of_head in enumerate(row):
                where = f"reach losses: layer {layer}, KV head {head}"
                if len(of_head) != len(self.reaches):
                    raise HeadMapError(
                        f"{where} has {len(of_head)} losses for {len(self.reaches)} reaches: give one for each"
                    )
                for loss in of_head:
                    number(loss, f"{where}: loss", 0, error=HeadMapError)

    def needed(self, layer_idx: int, head: int, share: float = SMALL_SHARE) -> int:
        """The shortest reach from which on the head loses at most `share` of its largest loss; `ALL_TOKENS` where no
        measured one does."""
        of_head = self.losses[layer_idx][head]
        most = share * max(of_head)
        needed = ALL_TOKENS
        for reach, loss in zip(reversed(self.reaches), reversed(of_head), strict=True):
            if loss > most:
                break
            needed = reach
        return needed

    def at_least(self, reach: int) -> ReachLosses:
        """Without the reaches shorter than this one, which was measured."""
        number = self.reaches.index(reach)
        rows = tuple(tuple(of_head[number:] for of_head in row) for row in self.losses)
        return replace(self, reaches=self.reaches[number:], losses=rows)

    def lost(self, reaches: Sequence[Sequence[int]]) -> float:
        """What all heads lose with these reaches [num_layers][num_kv_heads], each a measured one or `ALL_TOKENS`."""
        places = {reach: place for place, reach in enumerate(self.reaches)}
        return math.fsum(
            of_head[places[reach]]
            for row, own in zip(self.losses, reaches, strict=True)
            for of_head, reach in zip(row, own, strict=True)
            if reach < ALL_TOKENS
        )

    @property
    def num_layers(self) -> int:
        return len(self.losses)

    @property
    def num_kv_heads(self) -> int:
        return len(self.losses[0])

    def to_dict(self) -> dict[str, Any]:
        """What the file holds, as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str) -> ReachLosses:
        """The losses in the object of a file, which messages call `source`.

        Raises:
            HeadMapError: a key is missing or has another type, or as the class.
        """
        rows = _list(fields, "losses", source)
        try:
            losses = tuple(tuple(tuple(of_head) for of_head in _rows(row)) for row in _rows(rows))
        except TypeError:
            raise HeadMapError(
                f"{source}: losses are no lists of layers, of KV heads, of numbers, nested in this order: {_ADVICE}"
            ) from None
        try:
            return cls(
                fields.get("sink_size"), fields.get("measured_length"), tuple(_list(fields, "reaches", source)), losses
            )
        except HeadMapError as error:
            raise HeadMapError(f"{source}: {error}") from None

    @classmethod
    def read(cls, folder: Path) -> ReachLosses | None:
        """The losses in a head map's folder, or None where it has no such file.

        Raises:
            HeadMapError: the file cannot be read, or holds something else.
        """
        path = folder / REACH_LOSSES_FILE
        if not path.exists():
            return None
        return cls.from_dict(read_object(path, HeadMapError, _ADVICE), short_path(path))


def _list(fields: Mapping[str, Any], name: str, source: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise HeadMapError(f"{source}: {name} is {quoted(value)}, no list: {_ADVICE}")
    return value


def _rows(value: Sequence[Any]) -> Sequence[list[Any]]:
    if not all(isinstance(row, list) for row in value):
        raise TypeError
    return value
