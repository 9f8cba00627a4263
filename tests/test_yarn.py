"""`--yarn FACTOR`: the model of a checkpoint whose config.json asks for YaRN, and what does not go with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_adapter import write_adapter
from tiny_models import ROPES, edit_config, save_tiny, save_tokenizer, tiny_model

import longrun
from longrun.chat.command import chat_command
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, ConfigError, InputError, LongrunError, SessionError
from longrun.model.adapter import Adapter
from longrun.model.adapter_merge import load_merged
from longrun.model.fingerprint import model_fingerprint
from longrun.model.rope import RopeParameters
from longrun.patterns.__main__ import main as patterns_command
from longrun.plan.command import plan_command
from scripts.quality.compare_runtimes import Runtimes, comparison_budget
from scripts.tiny_gguf import write_gguf

IDS = torch.arange(100) * 7 % 97
FACTOR, TRAINED = 4, 64
WRITTEN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": TRAINED}
EXACT = {"kv_format": "fp32", "device": "cpu", "ctx": 128}


def logits(model: Path, **options) -> torch.Tensor:
    """Next-token logits at each of the last tokens of `IDS`."""
    session = longrun.load(model, **EXACT, **options).new_session()
    session.prefill(IDS[:80])
    return session.score(IDS[80:])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_tiny(folder, "qwen2")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_a_config_that_asks_for_it(tmp_path, family):
    save_tiny(tmp_path / "plain", family)
    save_tiny(tmp_path / "written", family, rope_parameters=dict(WRITTEN), max_position_embeddings=FACTOR * TRAINED)
    want, got = logits(tmp_path / "written"), logits(tmp_path / "plain", yarn=FACTOR)
    assert torch.equal(got, want)
    assert (got - logits(tmp_path / "plain")).abs().max() > 0.01
    edit_config(tmp_path / "written", max_position_embeddings=TRAINED)  # as most such files leave it
    assert torch.equal(logits(tmp_path / "written"), want)
    edit_config(tmp_path / "plain", rope_parameters=None, rope_theta=500.0)  # the older spelling
    assert torch.equal(logits(tmp_path / "plain", yarn=FACTOR), want)
    file = write_gguf(tmp_path / "plain.gguf", tiny_model(family))
    assert torch.equal(logits(file, yarn=FACTOR), want)


def test_transformers_model_of_a_measurement(plain, tmp_path):
    save_tiny(tmp_path, "qwen2", rope_parameters=dict(WRITTEN), max_position_embeddings=FACTOR * TRAINED)
    ours, theirs = load_merged(plain, None, FACTOR, dtype=torch.float32), load_merged(tmp_path, None)
    with torch.inference_mode():
        assert torch.equal(ours(IDS[None]).logits, theirs(IDS[None]).logits)
    assert ours.config.max_position_embeddings == FACTOR * TRAINED


def test_the_config_is_stretched_and_nothing_without_a_factor(plain):
    config = ModelConfig.from_dir(plain)
    assert config.stretched(None) is config
    assert config.stretched(2.5).max_position_embeddings == config.stretched(2.5).trained_positions == 160
    assert RopeParameters.from_dir(plain, 2.5).values == {**WRITTEN, "factor": 2.5}
    assert model_fingerprint(plain) == model_fingerprint(plain, None)
    assert config.arithmetic().keys().isdisjoint({"yarn", "rope_table"})  # fingerprints of before stay


def test_plan_names_it_and_warns_beyond_the_new_limit(plain, capsys):
    def planned(*options: str) -> dict:
        plan_command(["--model", str(plain), "--json", *options])
        return json.loads(capsys.readouterr().out)

    plan = planned("--yarn", "4")
    assert plan["ctx"] == 256 and plan["model"].endswith(", YaRN 4: 256 positions") and not plan["warnings"]
    assert "257 tokens are more than the 256" in planned("--yarn", "4", "--ctx", "257")["warnings"][0]
    assert "65 tokens are more than the 64" in planned("--ctx", "65")["warnings"][0]
    assert "YaRN" not in planned()["model"]


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_scaling_of_its_own_is_refused(tmp_path, rope):
    model = save_tiny(tmp_path / "model", "llama", rope)
    where = [tmp_path / "model"]
    if rope not in ("dynamic", "yarn-mscale"):  # which GGUF files do not hold
        where.append(write_gguf(tmp_path / "model.gguf", model))
    for path in where:
        with pytest.raises(ConfigError, match=f"RoPE scaling of type {rope.split('-')[0]}.*leave yarn out"):
            longrun.load(path, device="cpu", yarn=4)
        with pytest.raises(ConfigError, match="yarn 4 stretches a model without RoPE scaling"):
            plan_command(["--model", str(path), "--yarn", "4"])
    with pytest.raises(ConfigError, match="type llama3"):
        plan_command(["--model", "Llama-3.1-8B", "--yarn", "4"])


def test_sessions_keep_it(plain, tmp_path):
    runtimes = {yarn: longrun.load(plain, **EXACT, yarn=yarn) for yarn in (None, 4, 2)}
    for yarn, runtime in runtimes.items():
        session = runtime.new_session()
        session.prefill(IDS[:70])
        session.save(tmp_path / str(yarn))
        session.detach()
    for saved in runtimes:
        for yarn, runtime in runtimes.items():
            folder = tmp_path / str(saved)
            if saved == yarn:
                assert runtime.load_session(folder).seq_len == 70
                continue
            said = {None: "none", 4: "4.0", 2: "2.0"}
            with pytest.raises(SessionError, match=f"with yarn {said[saved]}, but this runtime has {said[yarn]}: load"):
                runtime.load_session(folder)
            with pytest.raises(SessionError, match="yarn"):
                longrun.load(plain, **EXACT, yarn=yarn, session=folder)
    assert runtimes[4].derive(kv_format="bf16").identity.yarn == 4


def test_a_session_of_before_means_none(plain, tmp_path):
    saved = {name: value for name, value in vars(longrun.load(plain, **EXACT).identity).items() if name != "yarn"}
    longrun.load(plain, **EXACT).identity.check(saved, tmp_path)
    with pytest.raises(SessionError, match="with yarn none, but this runtime has 4"):
        longrun.load(plain, **EXACT, yarn=4).identity.check(saved, tmp_path)


def test_an_adapter_with_its_own_rope_is_refused(plain, tmp_path):
    stretched = ModelConfig.from_dir(plain).stretched(4)
    for number, own in enumerate(({"rope_theta": 9000.0}, {"max_position_embeddings": 4096})):
        folder = write_adapter(tmp_path / str(number), plain, own=own)
        with pytest.raises(CheckpointError, match=r"yarn 4 and adapter .* contradict each other: leave one"):
            longrun.load(plain, device="cpu", adapter=folder, yarn=4)
        command = ["identify", "--model", str(plain), "--adapter", str(folder), "--out", str(tmp_path / "m")]
        with pytest.raises(CheckpointError, match="yarn 4 and adapter"):
            patterns_command([*command, "--yarn", "4", "--device", "cpu"])
    simple = write_adapter(tmp_path / "simple", plain)
    assert Adapter.open(simple, stretched).adapted_config(stretched) is stretched
    assert not torch.equal(logits(plain, adapter=simple, yarn=4), logits(plain, adapter=simple))


@pytest.mark.parametrize("yarn", [0, 1, -4, math.nan, math.inf, 1001, "4", True, [4]], ids=repr)
def test_impossible_factors(plain, yarn):
    with pytest.raises(InputError, match=r"yarn .* give a number above 1 and at most 1000"):
        longrun.load(plain, device="cpu", yarn=yarn)


@pytest.mark.parametrize("text", ["0", "1", "-4", "nan", "four", "", "1e9"])
def test_impossible_options(plain, text):
    for command in (plan_command, chat_command):
        with pytest.raises(LongrunError, match=r"--yarn.*value.*give a number above 1 and at most 1000"):
            command(["--model", str(plain), f"--yarn={text}"])


def test_maps_measured_without_it_load_and_those_measured_with_it_say_so(plain, tmp_path):
    identify = ["identify", "--model", str(plain), "--device", "cpu", "--steps", "1"]
    identify += ["--context", "256", "--method", "gates", "--sink-size", "4", "--recent-size", "8"]
    text = tmp_path / "text"  # the default one takes seconds to encode
    text.write_text("The harbour was quiet before the market opened. " * 200)
    identify += ["--text", str(text)]
    facts = {}
    for yarn in (None, "4"):
        out = tmp_path / str(yarn)
        patterns_command([*identify, "--out", str(out), *([] if yarn is None else ["--yarn", yarn])])
        facts[yarn] = json.loads((out / "config.json").read_text())["identification"]
        for given in (None, 4):
            runtime = longrun.load(plain, **EXACT, head_map=out, retrieval_ratio=0.5, yarn=given)
            assert not any("was made for" in notice for notice in runtime.notices)
    assert "yarn" not in facts[None] and facts["4"]["yarn"] == 4
    assert facts[None]["model_fingerprint"] == facts["4"]["model_fingerprint"]


def test_a_reach_is_measured_up_to_the_stretched_window(plain, tmp_path):
    command = ["identify", "--method", "reach", "--model", str(plain), "--device", "cpu", "--out", str(tmp_path / "m")]
    with pytest.raises(InputError, match="300 tokens is longer than the 256"):
        patterns_command([*command, "--context", "300", "--yarn", "4"])


def test_a_comparison_passes_it_on(plain):
    from longrun.lab.quality.row import REFERENCE_ROW

    for yarn in (None, 4.0):
        made = Runtimes(plain, None, comparison_budget("cpu", "cpu", 64), "cpu", 128, yarn).get(REFERENCE_ROW)
        assert made.identity.yarn == yarn
