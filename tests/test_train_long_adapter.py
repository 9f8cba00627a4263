"""The adapter of a training on long texts: what ships is what was trained, and a training may begin from it."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import transformers
from long_training import RECIPE
from reference import ReferenceAttention
from safetensors.torch import load_file

from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.lab.long_tasks import Corpus
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder
from longrun.model.rope import RopeParameters, RotaryTable
from scripts.training.long_lora import LoraModel


def test_the_shipped_adapter_gives_the_trained_logits(training):
    """The trained model in transformers against the checkpoint with the adapter in our loader."""
    model, trained = training.model, training.trained
    ours = training.trainer(trained)
    for layer in ours.lora.layers.values():  # what ships is rounded to bf16
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.bfloat16().float()
    ids = torch.tensor(Corpus.read(training.data, "held_out").stretch(random.Random(0), 200))
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


def test_training_on_from_an_adapter(training, tmp_path):
    model, trained = training.model, training.trained
    on = training.trainer(tmp_path / "on", start_from=trained / "adapter")
    fresh = training.trainer(tmp_path / "fresh")
    (batch,) = on.share(9)
    with torch.no_grad():
        ours, theirs = (one._losses(batch)[0][0] / batch.weights.sum() for one in (on, fresh))
    assert ours < theirs - 0.2
    settings = {**on.lora.settings, "r": 8}
    with pytest.raises(InputError, match="has r 4"):
        LoraModel(model, settings, torch.float32, torch.device("cpu")).load_adapter(trained / "adapter")


def test_training_on_with_a_larger_rope_base(training, tmp_path):
    """The adapter's weights and the recipe's base; an adapter without a base of its own is refused."""
    model, trained = training.model, training.trained
    larger = tmp_path / "larger.toml"
    larger.write_text(RECIPE.replace("rope_theta = 5000.0", "rope_theta = 9000.0"))
    on = training.trainer(tmp_path / "on", larger, start_from=trained / "adapter")
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
