"""Training on long texts, with a tiny model: its stages, resumed equals uninterrupted, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from long_training import RECIPE, steps_of

from longrun.errors import InputError
from scripts.training import train_long


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_stages_rates_and_a_falling_loss(training):
    steps = steps_of(training.trained)
    assert [step["length"] for step in steps] == [256] * 5 + [384] * 3 + [512] * 2
    rates = [step["rate"] for step in steps]
    assert rates == pytest.approx([0.005, 0.009, 0.008, 0.007, 0.006, 0.005, 0.0043333, 0.0036667, 0.003, 0.0015])
    first, last = (sum(step["answer"] for step in part) / 2 for part in (steps[:2], steps[-2:]))
    assert last < first - 0.1
    assert all(step["keep"] > 0 for step in steps)  # the larger RoPE base alone makes another model
    assert all(0 <= step["exact"] <= step["first"] <= 1 and step["values"] >= 2 for step in steps)
    assert all(0 <= step[key] <= 1 for step in steps for key in ("first_answers", "stretched") if key in step)
    assert [any("stretched" in step for step in part) for part in (steps[:5], steps[5:])] == [True, False]


def test_every_stage_ends_with_a_saved_state(training):
    entries = [json.loads(line) for line in (training.trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry.get("event") == "saved"] == [5, 8, 10]


def test_interrupted_and_resumed_equals_uninterrupted(training, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not training.trainer(out).train(1e9, save_every=2, most_steps=3)
    stepping = train_long.Trainer._step

    def step_and_signal(self, *args) -> None:
        stepping(self, *args)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_long.Trainer, "_step", step_and_signal)
    assert not training.trainer(out).train(1e9, save_every=100)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1]) | {"seconds": 0} == {
        "event": "stopped", "step": 6, "seconds": 0,
    }  # fmt: skip
    assert not training.trainer(out).train(0.0, save_every=100)  # no time at all: nothing is done
    assert training.trainer(out).train(1e9, save_every=100)
    assert adapter_bytes(out) == adapter_bytes(training.trained)
    assert [step["answer"] for step in steps_of(out)] == [step["answer"] for step in steps_of(training.trained)]


def test_other_settings_are_refused(training, tmp_path):
    other = tmp_path / "recipe.toml"
    other.write_text(RECIPE.replace("alpha = 8", "alpha = 16"))
    with pytest.raises(InputError, match="another recipe, and stands at step 10"):
        training.trainer(training.trained, other)
    stage = "[[stage]]\nlength=1\nbatch=1\nsteps=1\nrate=1e-3"
    for text, message in (
        ("made_up = 3\n" + RECIPE, "made_up is unknown"),
        ("rank = -1\n" + stage, "rank is -1"),
        ("rank = 4", "has no"),
        ("[[stage]]\nlength = 5", "every"),
        (stage + "\npeak = 3", "every"),
        (stage + "\nstretched = 1.5", "stretched is 1.5, and must be from 0 to 1"),
        (stage.replace("batch=1", "batch=0.5"), "batch is 0.5, and must be a whole number"),
        ("rank = = 4", "not valid TOML"),
    ):
        other.write_text(text)
        with pytest.raises(InputError, match=message):
            train_long.Recipe.read(other)


def test_stages_that_have_not_begun_may_change(training, tmp_path):
    out, other = tmp_path / "out", tmp_path / "recipe.toml"
    assert not training.trainer(out).train(1e9, save_every=100, most_steps=6)
    other.write_text(RECIPE.replace("\nsteps = 2", "\nsteps = 1").replace("\nsteps = 3", "\nsteps = 2"))
    assert training.trainer(out, other).train(1e9, save_every=100)
    assert [step["length"] for step in steps_of(out)] == [256] * 5 + [384] * 2 + [512]
    earlier = train_long.Recipe.read(training.recipe)
    for changed, step, goes_on in (
        (("steps = 5", "steps = 6"), 5, True),
        (("steps = 5", "steps = 6"), 6, False),
        (("steps = 3", "steps = 1"), 7, False),
        (("length = 384", "length = 400"), 5, True),
        (("length = 384", "length = 400"), 6, False),
        (("length = 256\nbatch = 2", "length = 256\nbatch = 4"), 1, False),
        (("rank = 4", "rank = 8"), 0, False),
    ):
        other.write_text(RECIPE.replace(*changed))
        assert train_long.Recipe.read(other).goes_on_from(earlier.identity(), step) == goes_on, (changed, step)


def test_what_making_samples_raises_ends_the_training(training, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("chat_answers = 0\nkeep_weight = 0\nrank = 2\n[[stage]]\nlength=20\nbatch=1\nsteps=1\nrate=1")
    with pytest.raises(InputError, match="20 tokens are too short"):
        training.trainer(tmp_path / "out", recipe).train(1e9, save_every=1)


def test_data_that_is_not_there_is_named(training, tmp_path):
    with pytest.raises(InputError, match="holds no readable corpus"):
        replace(training, data=tmp_path / "none").trainer(tmp_path / "out")
    assert not (tmp_path / "out").exists()
