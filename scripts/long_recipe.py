"""The numbers of a training run on long texts: what long_recipe.toml says and train_long.py does."""

from __future__ import annotations

import math
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.errors import InputError

DEFAULT_RECIPE = Path(__file__).with_name("long_recipe.toml")
_NUMBERS = {
    "seed": 0, "rank": 32, "alpha": 32, "rope_theta": 4e6, "max_position_embeddings": 1048576, "peak_rate": 1e-3,
    "final_rate": 3e-4, "warmup_steps": 10, "clip": 1.0, "text_weight": 0.3, "text_positions": 2048,
    "keep_weight": 0.5, "keep_batch": 1, "keep_tokens": 2048, "keep_positions": 1024, "chat_answers": 192,
    "chat_tokens": 192,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Numbers of `_NUMBERS` and the stages: (length, batch, steps) each."""

    numbers: dict[str, Any]
    stages: tuple[tuple[int, int, int], ...]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a TOML file: top-level numbers and `[[stage]]` tables.

        Raises:
            InputError: unreadable, an unknown key, a number or a stage that is impossible.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"recipe {path} cannot be read ({error}): name a TOML file") from error
        stages = data.pop("stage", [])
        for key, value in data.items():
            if key not in _NUMBERS:
                raise InputError(f"{path}: key {key} is unknown: use {', '.join(_NUMBERS)} and [[stage]]")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InputError(f"{path}: {key} is {value!r}, and must be a number of at least 0")
        wanted = {"length", "batch", "steps"}
        if not stages or any(set(stage) != wanted or min(stage.values()) < 1 for stage in stages):
            raise InputError(f"{path}: every [[stage]] needs length, batch and steps of at least 1")
        return cls({**_NUMBERS, **data}, tuple((s["length"], s["batch"], s["steps"]) for s in stages))

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.stages)

    def at(self, step: int) -> tuple[int, int, int, int]:
        """(stage, length, batch, index of the step's first sample) of a step."""
        first = 0
        for number, (length, batch, steps) in enumerate(self.stages):
            if step < steps:
                return number, length, batch, first + step * batch
            step, first = step - steps, first + steps * batch
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then half a cosine from the peak to the final rate."""
        peak, final, warmup = (self.numbers[key] for key in ("peak_rate", "final_rate", "warmup_steps"))
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def check_world(self, world: int) -> None:
        """Raises `InputError` where a stage's batch cannot be shared evenly by `world` processes."""
        for number, (length, batch, _) in enumerate(self.stages):
            if batch % world:
                raise InputError(
                    f"stage {number} ({length:,} tokens) has a batch of {batch}, which {world} processes cannot share "
                    f"evenly: make it a multiple of {world}, or change --nproc-per-node"
                )
