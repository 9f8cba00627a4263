"""The numbers of a training run on long texts: what long_recipe.toml says and train_long.py does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrun.errors import InputError
from longrun.files.user_files import parse_toml, read_text

DEFAULT_RECIPE = Path(__file__).with_name("long_recipe.toml")
_NUMBERS = {
    "seed": 0, "rank": 32, "alpha": 32, "rope_theta": 4e6, "max_position_embeddings": 1048576,
    "final_rate": 2e-4, "warmup_steps": 10, "clip": 1.0, "first_weight": 3.0, "rest_weight": 1.0,
    "around_weight": 0.15, "first_turn_weight": 2.0, "text_weight": 0.3, "text_positions": 2048, "keep_weight": 1.0,
    "keep_batch": 8, "keep_tokens": 2048, "keep_positions": 1024, "chat_answers": 384, "chat_tokens": 192,
}  # fmt: skip
_WHOLE = {"length", "batch", "steps"}


@dataclass(frozen=True)
class Stage:
    """Steps of one length.

    Attributes:
        length: tokens of a sample. batch: samples of a step, of all processes. steps: how many.
        rate: learning rate of its first step; from there straight to the next stage's, or to the final one.
        stretched: share of the samples whose positions jump (long_positions.py).
    """

    length: int
    batch: int
    steps: int
    rate: float
    stretched: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Numbers of `_NUMBERS` and the stages."""

    numbers: dict[str, Any]
    stages: tuple[Stage, ...]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a TOML file: top-level numbers and `[[stage]]` tables.

        Raises:
            InputError: unreadable, an unknown key, a number or a stage that is impossible.
        """
        data = parse_toml(read_text(path, InputError, "name a recipe, a TOML file"), f"recipe {path}", InputError)
        stages = data.pop("stage", [])
        for key, value in data.items():
            if key not in _NUMBERS:
                raise InputError(f"{path}: key {key} is unknown: use {', '.join(_NUMBERS)} and [[stage]]")
            if not _is_number(value) or value < 0:
                raise InputError(f"{path}: {key} is {value!r}, and must be a number of at least 0")
        if not stages:
            raise InputError(f"{path} has no [[stage]]: every one needs length, batch, steps and rate")
        for number, stage in enumerate(stages):
            _check_stage(f"{path}: stage {number}", stage)
        return cls({**_NUMBERS, **data}, tuple(Stage(**stage) for stage in stages))

    def identity(self) -> dict[str, Any]:
        """What state.pt holds of it."""
        return json.loads(json.dumps({"numbers": self.numbers, "stages": [asdict(stage) for stage in self.stages]}))

    def goes_on_from(self, earlier: dict[str, Any], step: int) -> bool:
        """Whether the first `step` steps of a run with the recipe of identity `earlier` are this recipe's as well.

        Stages that have not begun may be others; rates and shares may change from here on.
        """
        if earlier["numbers"] != self.identity()["numbers"]:
            return False
        for stage in self.stages:
            if step <= 0 or not earlier["stages"]:
                break
            was = earlier["stages"][0]
            if (was["length"], was["batch"]) != (stage.length, stage.batch):
                return False
            if was["steps"] != stage.steps and min(was["steps"], stage.steps) < step:
                return False
            earlier = {**earlier, "stages": earlier["stages"][1:]}
            step -= stage.steps
        return step <= 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def window(self) -> int:
        """Positions that stretched samples are spread over."""
        return self.numbers["max_position_embeddings"]

    def at(self, step: int) -> tuple[Stage, int, int]:
        """(stage, its number, number of the step's first sample) of a step."""
        first = 0
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return stage, number, first + step * stage.batch
            step, first = step - stage.steps, first + stage.steps * stage.batch
        raise IndexError(step)

    def ends_stage(self, steps_done: int) -> bool:
        """Whether the step just done was the last of its stage, and another stage follows."""
        return 0 < steps_done < self.steps and self.at(steps_done)[1] != self.at(steps_done - 1)[1]

    def rate(self, step: int) -> float:
        """Learning rate: straight from stage to stage and to the final rate, after a linear warm-up."""
        stage, number, _ = self.at(step)
        begins = sum(earlier.steps for earlier in self.stages[:number])
        after = self.stages[number + 1].rate if number + 1 < len(self.stages) else self.numbers["final_rate"]
        rate = stage.rate + (after - stage.rate) * (step - begins) / stage.steps
        return rate * min(1.0, (step + 1) / max(1, self.numbers["warmup_steps"]))

    def check_world(self, world: int) -> None:
        """Raises `InputError` where a stage's batch cannot be shared evenly by `world` processes."""
        for number, stage in enumerate(self.stages):
            if stage.batch % world:
                raise InputError(
                    f"stage {number} ({stage.length:,} tokens) has a batch of {stage.batch}, which {world} processes "
                    f"cannot share evenly: make it a multiple of {world}, or change --nproc-per-node"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_stage(where: str, stage: dict[str, Any]) -> None:
    needed, known = _WHOLE | {"rate"}, _WHOLE | {"rate", "stretched"}
    if not needed <= set(stage) <= known:
        raise InputError(
            f"{where} has {', '.join(stage) or 'nothing'}: every [[stage]] needs {', '.join(sorted(needed))}, and may "
            "have stretched"
        )
    for key, value in stage.items():
        whole = key in _WHOLE
        good = _is_number(value) and (isinstance(value, int) and value >= 1 if whole else value >= 0)
        if not good or (key == "stretched" and value > 1):
            limit = "a whole number of at least 1" if whole else "from 0 to 1" if key == "stretched" else "0 or more"
            raise InputError(f"{where}: {key} is {value!r}, and must be {limit}")
