"""Training on long texts, with a tiny model: resumed equals uninterrupted, what ships is what was trained."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from long_text import save_corpus, save_model, tokenizer
from reference import ReferenceAttention
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import long_batches
import train_long
from long_lora import LoraModel
from long_ranks import Ranks

from longrun.attention.interface import Step
from longrun.config import ModelConfig
from longrun.errors import InputError
from longrun.long_tasks import Corpus
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder
from longrun.model.rope import RopeParameters, RotaryTable

RECIPE = """
rank = 4
alpha = 8
rope_theta = 5000.0
max_position_embeddings = 4096
final_rate = 0.0
warmup_steps = 2
text_positions = 64
keep_weight = 0.5
keep_batch = 4
keep_tokens = 64
keep_positions = 16
chat_answers = 2
chat_tokens = 6
[[stage]]
length = 256
batch = 2
steps = 5
rate = 1e-2
stretched = 0.5
[[stage]]
length = 384
batch = 2
steps = 3
rate = 5e-3
[[stage]]
length = 512
batch = 2
steps = 2
rate = 3e-3
"""
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    save_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(RECIPE)
    return file


def trainer(model: Path, data: Path, recipe: Path, out: Path, **changes) -> train_long.Trainer:
    return train_long.Trainer(model, data, out, train_long.Recipe.read(recipe), ALONE, torch.float32, **changes)


@pytest.fixture(scope="module")
def trained(model, data, recipe, tmp_path_factory) -> Path:
    """One run from beginning to end."""
    out = tmp_path_factory.mktemp("trained")
    assert trainer(model, data, recipe, out).train(1e9, save_every=100)
    return out


def steps_of(out: Path) -> list[dict]:
    return [entry for line in (out / "log.jsonl").read_text().splitlines() if "rate" in (entry := json.loads(line))]


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_stages_rates_and_a_falling_loss(trained):
    steps = steps_of(trained)
    assert [step["length"] for step in steps] == [256] * 5 + [384] * 3 + [512] * 2
    rates = [step["rate"] for step in steps]
    assert rates == pytest.approx([0.005, 0.009, 0.008, 0.007, 0.006, 0.005, 0.0043333, 0.0036667, 0.003, 0.0015])
    first, last = (sum(step["answer"] for step in part) / 2 for part in (steps[:2], steps[-2:]))
    assert last < first - 0.1
    assert all(step["keep"] > 0 for step in steps)  # the larger RoPE base alone makes another model
    assert all(0 <= step["exact"] <= step["first"] <= 1 and step["values"] >= 2 for step in steps)
    assert all(0 <= step[key] <= 1 for step in steps for key in ("first_answers", "stretched") if key in step)
    assert [any("stretched" in step for step in part) for part in (steps[:5], steps[5:])] == [True, False]


def test_every_stage_ends_with_a_saved_state(trained):
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry.get("event") == "saved"] == [5, 8, 10]


def test_interrupted_and_resumed_equals_uninterrupted(model, data, recipe, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not trainer(model, data, recipe, out).train(1e9, save_every=2, most_steps=3)
    stepping = train_long.Trainer._step

    def step_and_signal(self, *args) -> None:
        stepping(self, *args)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_long.Trainer, "_step", step_and_signal)
    assert not trainer(model, data, recipe, out).train(1e9, save_every=100)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1]) | {"seconds": 0} == {
        "event": "stopped", "step": 6, "seconds": 0,
    }  # fmt: skip
    assert not trainer(model, data, recipe, out).train(0.0, save_every=100)  # no time at all: nothing is done
    assert trainer(model, data, recipe, out).train(1e9, save_every=100)
    assert adapter_bytes(out) == adapter_bytes(trained)
    assert [step["answer"] for step in steps_of(out)] == [step["answer"] for step in steps_of(trained)]


def test_other_settings_are_refused(model, data, recipe, trained, tmp_path):
    other = tmp_path / "recipe.toml"
    other.write_text(RECIPE.replace("alpha = 8", "alpha = 16"))
    with pytest.raises(InputError, match="another recipe, and stands at step 10"):
        trainer(model, data, other, trained)
    stage = "[[stage]]\nlength=1\nbatch=1\nsteps=1\nrate=1e-3"
    for text, message in (
        ("made_up = 3\n" + RECIPE, "made_up is unknown"),
        ("rank = -1\n" + stage, "rank is -1"),
        ("rank = 4", "has no"),
        ("[[stage]]\nlength = 5", "every"),
        (stage + "\npeak = 3", "every"),
        (stage + "\nstretched = 1.5", "stretched is 1.5, and must be from 0 to 1"),
        (stage.replace("batch=1", "batch=0.5"), "batch is 0.5, and must be a whole number"),
        ("rank = = 4", "cannot be read"),
    ):
        other.write_text(text)
        with pytest.raises(InputError, match=message):
            train_long.Recipe.read(other)


def test_stages_that_have_not_begun_may_change(model, data, recipe, tmp_path):
    out, other = tmp_path / "out", tmp_path / "recipe.toml"
    assert not trainer(model, data, recipe, out).train(1e9, save_every=100, most_steps=6)
    other.write_text(RECIPE.replace("\nsteps = 2", "\nsteps = 1").replace("\nsteps = 3", "\nsteps = 2"))
    assert trainer(model, data, other, out).train(1e9, save_every=100)
    assert [step["length"] for step in steps_of(out)] == [256] * 5 + [384] * 2 + [512]
    earlier = train_long.Recipe.read(recipe)
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


def test_the_shipped_adapter_gives_the_trained_logits(model, data, recipe, trained):
    """The trained model in transformers beside the checkpoint and the adapter in our loader."""
    ours = trainer(model, data, recipe, trained)
    for layer in ours.lora.layers.values():  # what ships is rounded to bf16
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.bfloat16().float()
    ids = torch.tensor(Corpus.read(data, "held_out").stretch(random.Random(0), 200))
    with torch.inference_mode():
        want = ours.lora.model.eval()(ids[None]).logits[0]
        with ours.lora.as_original():
            base = ours.lora.model(ids[None]).logits[0]
        plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids[None]).logits[0]
    assert torch.equal(base, plain)
    config = ModelConfig.from_dir(model)
    adapter = Adapter.open(trained / "adapter", config)
    decoder = load_decoder(model, config, [[1, 0], [0, 1]], "fp32", "cpu", adapter=adapter)
    table = RotaryTable(adapter.adapted_rope(RopeParameters.from_dir(model)), config.head_dim)
    step = Step(0, 200, *table.cos_sin(0, 200, 200))
    got = decoder.logits(decoder.forward(ids, step, ReferenceAttention(2), all_positions=True))
    assert (got - want).abs().max() < 1e-4
    assert (got - base).abs().max() > 0.1
    assert adapter.adapted_config(config).max_position_embeddings == 4096


def test_training_on_from_an_adapter(model, data, recipe, trained, tmp_path):
    on = trainer(model, data, recipe, tmp_path / "on", start_from=trained / "adapter")
    fresh = trainer(model, data, recipe, tmp_path / "fresh")
    (batch,) = on.share(9)
    with torch.no_grad():
        ours, theirs = (one._losses(batch)[0][0] / batch.weights.sum() for one in (on, fresh))
    assert ours < theirs - 0.2
    settings = {**on.lora.settings, "r": 8}
    with pytest.raises(InputError, match="has r 4"):
        LoraModel(model, settings, torch.float32, torch.device("cpu")).load_adapter(trained / "adapter")


def test_training_on_with_a_larger_rope_base(model, data, recipe, trained, tmp_path):
    """The adapter's weights and the recipe's base; an adapter without a base of its own is refused."""
    larger = tmp_path / "larger.toml"
    larger.write_text(RECIPE.replace("rope_theta = 5000.0", "rope_theta = 9000.0"))
    on = trainer(model, data, larger, tmp_path / "on", start_from=trained / "adapter")
    on.train(math.inf, 50, most_steps=0)
    begun = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    assert begun["start_from_rope_theta"] == 5000.0
    saved = json.loads((tmp_path / "on" / "adapter" / "adapter_config.json").read_text())
    assert saved["longrun"]["rope_theta"] == 9000.0
    before, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, tmp_path / "on")
    )
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    plain, other = (
        LoraModel.from_adapter(model, trained / "adapter", torch.float32, torch.device("cpu"), base)
        for base in (None, 9000.0)
    )
    assert (plain.settings["rope_theta"], other.settings["rope_theta"]) == (5000.0, 9000.0)
    ids = torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs, moved = (one.model.eval()(ids).logits for one in (on.lora, other, plain))
    assert (ours - theirs).abs().max() < 2e-2 < (ours - moved).abs().max()  # saved in bf16
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "longrun": {}}))
    with pytest.raises(InputError, match="has no rope_theta"):
        LoraModel.from_adapter(model, foreign, torch.float32, torch.device("cpu"))


def test_a_batch_learns_answers_and_draws_text(model, data, recipe, trained):
    ours = trainer(model, data, recipe, trained)
    (batch,) = ours.share(6)
    ids = torch.from_numpy(batch.token_ids)
    assert ids.shape == (2, 384)
    learned = batch.weights > 0
    assert not (learned & batch.text).any() and learned.any(axis=1).all()
    answer = tokenizer().decode(batch.token_ids[0][learned[0]])
    assert answer.endswith("</s>")
    assert not (learned | batch.text)[:, 0].any()
    assert batch.text.sum(axis=1).tolist() == [32, 32]
    # an independent computation of both losses: all logits, by hand
    with torch.no_grad():
        (answers, text), _ = ours._losses(batch)
        logs = ours.lora.model(ids).logits.log_softmax(dim=-1)
    for loss, marked in ((answers, batch.weights), (text, batch.text)):
        at = [(r, p) for r in range(2) for p in range(ids.shape[1]) if marked[r, p]]
        want = -sum(float(marked[r, p]) * logs[r, p - 1, ids[r, p]] for r, p in at)
        assert abs(loss - want) < 1e-4 * len(at)


def test_values_count_as_found_and_as_exact(model, data, recipe, trained):
    """Values are put in that the model itself would say: one whole, of another the first token alone."""
    ours = trainer(model, data, recipe, trained)
    batch = next(one for step in range(5, 10) for one in ours.share(step) if len(one.values) >= 3)
    assert batch.positions is None
    ids, counts = torch.from_numpy(batch.token_ids), []
    for value, stop in ((None, None), (batch.values[0], 2), (batch.values[1], 1)):
        if value is not None:
            for place in range(int(value[0]), int(value[stop]) + (stop == 1)):
                row, column = divmod(place, ids.shape[1])
                with torch.no_grad():
                    likeliest = ours.lora.model(ids[row : row + 1, :column]).logits[0, -1].argsort(descending=True)
                ids[row, column] = likeliest[0]
            if stop == 1:
                with torch.no_grad():  # the token after the first one is the second likeliest
                    after = ours.lora.model(ids[row : row + 1, : column + 1]).logits[0, -1].argsort(descending=True)
                ids[row, column + 1] = after[1]
        with torch.no_grad():
            counts.append(ours._losses(batch)[1].tolist())
    in_first_answer = bool(batch.groups[0][0])
    assert batch.groups[:, 0].sum() <= 2 and not batch.groups[:, 1].any()
    assert counts[0] == [0, 0, 0, 0]
    assert counts[1] == [1, 1, in_first_answer, 0]
    assert counts[2] == [2, 1, in_first_answer, 0]


def test_stretched_samples_have_positions_of_their_own(model, data, recipe, trained):
    ours = trainer(model, data, recipe, trained)
    batches = [batch for step in range(5) for batch in ours.share(step)]
    jumping = [batch.positions for batch in batches if batch.positions is not None]
    assert 0 < len(jumping) <= 5
    for one in batches:
        for value, (first, stretched) in zip(one.values, one.groups, strict=True):
            row, start = divmod(int(value[0]), 256)
            assert first == (not (one.token_ids[row, one.weights[row].argmax() : start] == 1).any())
            assert stretched == (one.positions is not None and (one.positions[row] != range(256)).any())
    rows = [row for positions in jumping for row in positions if (row != range(256)).any()]
    assert 2 <= len(rows) < 10  # about half of ten samples
    assert max(row.max() for row in rows) > 1000 and max(row.max() for row in rows) < 4096
    batch = next(batch for batch in batches if batch.positions is not None)
    with torch.no_grad():
        moved, plain = (ours._losses(one)[0] for one in (batch, replace(batch, positions=None)))
    assert (moved - plain).abs().min() > 1e-3


def test_attention_sees_no_mask_and_no_repeated_keys(model, data, recipe, trained, monkeypatch):
    """A mask of T x T or keys repeated for every query head would cost the flash kernel, and at 256K the memory."""
    ours = trainer(model, data, recipe, trained)
    (batch,) = ours.share(6)
    assert batch.token_ids.shape[0] == 2
    plain, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, **options):
        seen.append((query.shape[1], key.shape[1], options.get("attn_mask"), options.get("is_causal")))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        ours._losses(batch)
        next(ours.keeper.losses(0, range(1)))
    assert seen == [(4, 2, None, True)] * 6  # two layers, three forward passes


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt", weights_only=True)["lora"]


def assert_same_training(out: Path, other: Path) -> None:
    """Equal up to rounding, which Adam blows up where a gradient is near zero."""
    for steps in zip(steps_of(out), steps_of(other), strict=True):
        for key in ("answer", "text", "keep", "gradient"):
            assert steps[0][key] == pytest.approx(steps[1][key], rel=2e-3), (steps[0]["step"], key)
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours).sqrt()
    assert difference < 2e-3 * sum(tensor.square().sum() for tensor in ours.values()).sqrt()


def test_samples_one_at_a_time_train_the_same(model, data, recipe, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(long_batches, "TOGETHER", 300)
    assert [len(trainer(model, data, recipe, tmp_path).share(step)) for step in (0, 5)] == [2, 2]
    assert trainer(model, data, recipe, tmp_path).train(1e9, save_every=100)
    assert_same_training(tmp_path, trained)


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
import train_long

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


def test_two_processes_train_as_one_and_stop_together(model, data, recipe, trained, tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    scripts = Path(train_long.__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [scripts, model, data, recipe, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [step["step"] for step in steps_of(out)] == list(range(1, 11))
    events = [entry for line in (out / "log.jsonl").read_text().splitlines() if "event" in (entry := json.loads(line))]
    assert [e["step"] for e in events if e["event"] in ("stopped", "finished")] == [2, 4, 10]
    assert {e["processes"] for e in events if e["event"] == "started"} == {2}
    assert_same_training(out, trained)


def test_a_batch_that_processes_cannot_share_is_refused(model, data, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = ["--model", model, "--data", data, "--recipe", recipe, "--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(InputError, match=r"stage 0 \(256 tokens\) has a batch of 2, which 4 processes cannot"):
        train_long.main([str(option) for option in options])
    assert not (tmp_path / "out").exists()


def test_what_making_samples_raises_ends_the_training(model, data, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("chat_answers = 0\nkeep_weight = 0\nrank = 2\n[[stage]]\nlength=20\nbatch=1\nsteps=1\nrate=1")
    with pytest.raises(InputError, match="20 tokens are too short"):
        trainer(model, data, recipe, tmp_path / "out").train(1e9, save_every=1)


def test_data_that_is_not_there_is_named(model, recipe, tmp_path):
    with pytest.raises(InputError, match="holds no readable corpus"):
        trainer(model, tmp_path / "none", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
