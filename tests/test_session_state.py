"""Marks that no longer hold, weights that are no numbers, steps that broke off: refused, and never saved."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

import longrun
from longrun.engine.sampling import SamplingParams, probabilities, sample
from longrun.errors import CheckpointError, InputError, PlanError, SessionError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runtime(checkpoint):
    return longrun.load(checkpoint, device="cpu", ctx=400, kv_format="fp32", chunk_size=50)


def test_a_mark_whose_tokens_were_dropped_is_refused(runtime):
    session = runtime.new_session()
    session.prefill(range(20))
    early = session.mark()
    same = session.mark()
    session.prefill(range(20, 40))
    late = session.mark()
    session.rewind(late)
    session.rewind(early)
    session.prefill(range(60, 90))
    before = session.logits.clone()
    with pytest.raises(InputError, match=r"mark at token 40 .* dropped by a rewind to an earlier mark"):
        session.rewind(late)
    assert torch.equal(session.logits, before) and session.num_tokens == 50
    session.rewind(same)
    assert session.token_ids == list(range(20))


def test_a_mark_of_another_session_is_refused(runtime):
    session, other = runtime.new_session(), runtime.new_session()
    session.prefill(range(20))
    other.prefill(range(30))
    with pytest.raises(InputError, match="mark at token 30 is of another session"):
        session.rewind(other.mark())
    with pytest.raises(InputError, match="not str"):
        session.rewind("mark")
    assert session.num_tokens == 20


def spoil(folder, target, name, value, rows=slice(None)):
    """The checkpoint with one tensor, or some of its rows, of another value."""
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.get_parameter(name)[rows] = value
    model.save_pretrained(target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_said_before_anything_is_saved(checkpoint, tmp_path, name, value):
    spoil(checkpoint, tmp_path / "bad", name, value)
    session = longrun.load(tmp_path / "bad", device="cpu", ctx=200).new_session()
    session.attach(tmp_path / "s")
    with pytest.raises(CheckpointError, match=r"not finite numbers: its weights .* NaN or infinite"):
        session.prefill(range(90))
    with pytest.raises(SessionError, match="in the middle of a step"):
        session.save(tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["session.lock"]


def test_a_nan_that_only_a_later_token_meets_is_not_saved_either(checkpoint, tmp_path):
    spoil(checkpoint, tmp_path / "bad", "model.embed_tokens.weight", float("nan"), rows=slice(90, 91))
    runtime = longrun.load(tmp_path / "bad", device="cpu", ctx=200)
    session = runtime.new_session()
    session.prefill(range(90))
    session.save(tmp_path / "s")
    session.prefill([90])
    with pytest.raises(CheckpointError, match="not finite"):
        session.save(tmp_path / "s")
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="not finite"):
            next(session.generate(1, temperature=temperature))
    assert runtime.load_session(tmp_path / "s").num_tokens == 90


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.0), SamplingParams(0.5, 3, 0.9, 1.2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_drawn_from_logits_that_are_no_numbers(params, value):
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(CheckpointError, match="not finite"):
        sample(logits, params, torch.Generator())
    with pytest.raises(CheckpointError, match="not finite"):
        probabilities(logits, params)


def test_a_tiny_penalty_makes_no_infinite_logit():
    found = probabilities(torch.tensor([3.0, 1.0]), SamplingParams(1.0, repetition_penalty=1e-39), [0])
    assert found.tolist() == [1.0, 0.0]


def test_a_broken_step_is_neither_marked_nor_saved(runtime, tmp_path, monkeypatch):
    session = runtime.new_session()
    session.prefill(range(30))
    session.save(tmp_path / "s")
    whole = session.mark()
    decoder = session._engine.decoder

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder), "forward", fails)
        with pytest.raises(PlanError):
            session.prefill(range(20))
    for call in (session.mark, lambda: session.save(tmp_path / "s")):
        with pytest.raises(SessionError, match="out of memory"):
            call()
    session.rewind(whole)
    session.save(tmp_path / "s")
    assert runtime.load_session(tmp_path / "s").num_tokens == 30
