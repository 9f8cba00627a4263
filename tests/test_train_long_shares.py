"""A batch of long texts in shares: one sample at a time, or by two processes, trains as all at once does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from long_training import steps_of

from longrun.errors import InputError
from scripts.training import long_batches, train_long


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt", weights_only=True)["lora"]


def assert_same_training(out: Path, other: Path) -> None:
    """Equal up to rounding, which Adam enlarges where a gradient is near zero."""
    for steps in zip(steps_of(out), steps_of(other), strict=True):
        for key in ("answer", "text", "keep", "gradient"):
            assert steps[0][key] == pytest.approx(steps[1][key], rel=2e-3), (steps[0]["step"], key)
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours).sqrt()
    assert difference < 2e-3 * sum(tensor.square().sum() for tensor in ours.values()).sqrt()


def test_samples_one_at_a_time_train_the_same(training, tmp_path, monkeypatch):
    monkeypatch.setattr(long_batches, "TOGETHER", 300)
    assert [len(training.trainer(tmp_path).share(step)) for step in (0, 5)] == [2, 2]
    assert training.trainer(tmp_path).train(1e9, save_every=100)
    assert_same_training(tmp_path, training.trained)


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from scripts.training import train_long

model, data, recipe, out = map(Path, sys.argv[2:6])
torch.set_num_threads(1)
ranks = train_long.Ranks.start("cpu")


def train(out, **options):
    recipe_ = train_long.Recipe.read(recipe)
    return train_long.Trainer(model, data, out, recipe_, ranks, torch.float32).train(1e9, 100, **options)


stepping = train_long.Trainer._step


def step_and_signal(self, *args):
    stepping(self, *args)
    if self.step == 4 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


train_long.Trainer._step = step_and_signal
elsewhere = out if ranks.rank == 0 else out.with_name("of the second")
assert not train(elsewhere, most_steps=2)
assert not elsewhere.exists() or ranks.rank == 0, "the second process wrote"
assert not train(out), "the signal to the second process did not stop this one"
assert train(out)
ranks.close()
"""


def test_two_processes_train_as_one_and_stop_together(training, tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [root, training.model, training.data, training.recipe, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [step["step"] for step in steps_of(out)] == list(range(1, 11))
    events = [entry for line in (out / "log.jsonl").read_text().splitlines() if "event" in (entry := json.loads(line))]
    assert [e["step"] for e in events if e["event"] in ("stopped", "finished")] == [2, 4, 10]
    assert {e["processes"] for e in events if e["event"] == "started"} == {2}
    assert_same_training(out, training.trained)


def test_a_batch_that_processes_cannot_share_is_refused(training, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = ["--model", training.model, "--data", training.data, "--recipe", training.recipe]
    options += ["--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(InputError, match=r"stage 0 \(256 tokens\) has a batch of 2, which 4 processes cannot"):
        train_long.main([str(option) for option in options])
    assert not (tmp_path / "out").exists()
