"""`Runtime.derive`: answers as a loaded runtime, counts the memory of the one it comes from, leaves it alone."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, save_tokenizer

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError, HeadMapError, InputError, PlanError, SessionError
from longrun.machine import host_memory
from longrun.model.checkpoint import load_decoder
from longrun.model.reorder import reordered
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan
from longrun.runtime.backend import Parts, build_engine

CTX = 300
IDS = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()
# Layer 0 moves all its heads, layer 1 none, layer 2 has streaming heads alone.
MAP = HeadMap.from_scores([[0.1, 0.9, 0.2], [0.8, 0.3, 0.1], [0.4, 0.2, 0.1]], sink_size=16, recent_size=32)
OTHER = HeadMap.from_scores([[0.1, 0.2, 0.9], [0.1, 0.3, 0.8], [0.9, 0.2, 0.9]], sink_size=16, recent_size=32)


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # qwen2 has biases on q, k and v
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(path, request.param)
    save_tokenizer(path)
    return path


def load(folder: Path, **options):
    return longrun.load(folder, "cpu", device="cpu", **{"ctx": CTX, "chunk_size": 50, **options})


def answers(runtime, session=None) -> torch.Tensor:
    """Logits of a prefill, of decoded tokens and of scored ones: [n, vocab_size]."""
    session = session or runtime.new_session()
    first = session.prefill(IDS)
    generated = list(session.generate(4, eos=False))
    return torch.stack([first, session.logits, *session.score(IDS[:7]), *torch.eye(97)[generated]])


CASES = {
    "map": {"head_map": MAP},
    "ratio": {"head_map": MAP, "retrieval_ratio": 0.6},
    "pages": {"kv_format": "bf16"},
    "exact pages": {"kv_format": "fp32", "head_map": OTHER},
    "chunks": {"chunk_size": 37},
    "all": {"head_map": OTHER, "kv_format": "int4", "chunk_size": 64, "ctx": 260},
}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_a_freshly_loaded_one(folder, case, weights):
    options = CASES[case]
    base = load(folder, weight_format=weights)
    before = answers(base)
    loaded = load(folder, weight_format=weights, **options)
    found = base.derive(options.get("head_map"), **{key: options[key] for key in options if key != "head_map"})
    assert found.split == loaded.split and found.identity == loaded.identity
    assert (found.plan.capacity, found.plan.kv_format) == (loaded.plan.capacity, loaded.plan.kv_format)
    assert (found.plan.chunk_size, found.plan.cache) == (loaded.plan.chunk_size, loaded.plan.cache)
    assert found.notices == loaded.notices
    expected = answers(loaded)
    assert torch.equal(answers(found), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(answers(base), before)
    assert base.split.is_full and (base.plan.kv_format, base.plan.chunk_size) == ("k5v3", 50)


def test_nothing_given_is_the_same_again_and_shares_every_weight(folder):
    base = load(folder, head_map=MAP, kv_format="bf16")
    again = base.derive()
    assert again.plan == base.plan and again.identity == base.identity and again.notices == base.notices
    mine, theirs = again.parts.decoder.tensors(), base.parts.decoder.tensors()
    assert all(one is other for one, other in zip(mine, theirs, strict=True))


def test_pages_may_go_to_the_host(folder):
    limits = replace(Budget.load("cpu"), host_bytes=10**9)
    base, loaded = (
        longrun.load(folder, limits, device="cpu", ctx=CTX, chunk_size=50, device_share=share) for share in (1, 0.4)
    )
    found = base.derive(device_share=0.4)
    assert found.plan.cache == loaded.plan.cache and found.plan.cache.host_pages > 0 == base.plan.cache.host_pages
    assert torch.equal(answers(found), answers(loaded))
    assert found.derive(chunk_size=37).plan.cache.host_pages == loaded.plan.cache.host_pages
    with pytest.raises(InputError, match=r"device_share 1\.5"):
        base.derive(device_share=1.5)


def test_the_order_of_heads_may_change_again_and_back(folder):
    base = load(folder, head_map=MAP)
    expected = answers(base)
    there = base.derive(OTHER)
    assert torch.equal(answers(there), answers(load(folder, head_map=OTHER)))
    back = there.derive(MAP)
    assert torch.equal(answers(back), expected)
    full = there.derive("full", "fp32")
    assert full.split.is_full and torch.equal(answers(full), answers(load(folder, kv_format="fp32")))


def test_another_ratio_is_of_the_own_map(folder, tmp_path):
    MAP.save(tmp_path / "map")
    base = load(folder, head_map=tmp_path / "map")
    ratio = base.derive(retrieval_ratio=0.7)
    assert ratio.split == MAP.split(retrieval_ratio=0.7) != base.split
    assert ratio.derive(kv_format="fp32").split == ratio.split
    assert base.derive(tmp_path / "map", retrieval_ratio=0.7).split == ratio.split


def test_sessions_of_both_live_together(folder):
    base = load(folder)
    derived = base.derive(MAP, chunk_size=37)
    alone = [load(folder).new_session(), load(folder, head_map=MAP, chunk_size=37).new_session()]
    together = [base.new_session(), derived.new_session()]
    for part in (IDS[:60], IDS[60:], IDS[:1], IDS[1:9]):  # in turn
        for session, expected in zip(together, alone, strict=True):
            assert torch.equal(session.prefill(part), expected.prefill(part))
    first, second = together
    for session, expected in zip(together, alone, strict=True):
        assert list(session.generate(9, eos=False)) == list(expected.generate(9, eos=False))
    with pytest.raises(InputError, match="no session of this runtime"):
        base.stream(second)
    assert derived.engine(second).cache is second.cache
    with pytest.raises(InputError, match="no session of this runtime"):
        derived.engine(first)


def test_weights_live_as_long_as_a_runtime_of_theirs(folder):
    base = load(folder)
    derived = base.derive(MAP)
    expected = answers(load(folder, head_map=MAP))
    del base
    gc.collect()
    assert torch.equal(answers(derived), expected)
    session = derived.new_session(CTX)
    assert not any(item.name == "reserved" for item in session.plan.items)  # what only the other held is gone


def test_a_saved_session_opens_in_a_freshly_loaded_one_and_back(folder, tmp_path):
    base = load(folder)
    derived = base.derive(MAP, "int4", 64)
    loaded = load(folder, head_map=MAP, kv_format="int4", chunk_size=64)
    for number, (one, other) in enumerate([(derived, loaded), (loaded, derived)]):
        session = one.new_session()
        session.prefill(IDS)
        session.save(tmp_path / f"{number}")
        opened = other.load_session(tmp_path / f"{number}")
        assert torch.equal(opened.logits, session.logits)
        assert torch.equal(opened.prefill(IDS[:9]), session.prefill(IDS[:9]))
    with pytest.raises(SessionError, match="saved with head split"):
        base.load_session(tmp_path / "0")


def reserved(plan) -> int:
    return sum(item.bytes for item in plan.items if item.name == "reserved")


def test_copies_and_sessions_of_all_runtimes_are_planned(folder):
    base = load(folder)
    derived = base.derive(MAP)
    config = ModelConfig.from_dir(folder)
    rows = config.q_size + 2 * config.kv_size
    layer = 4 * (rows * config.hidden_size + config.q_size * config.hidden_size)
    biases = 4 * rows if config.qkv_bias else 0
    assert reserved(derived.plan) == layer + biases  # of the one layer whose heads move
    assert reserved(base.plan) == 0
    session = base.new_session()
    assert reserved(session.plan) == layer + biases
    sizes = session.plan.cache.device_bytes().values()
    held = sum(sizes) + session.plan.attention.scratch_bytes() + session.plan.attention.decode_bytes()
    assert reserved(derived.new_session().plan) == layer + biases + held
    assert reserved(derived.derive(OTHER).plan) > layer + biases + held
    assert derived.derive(kv_format="fp32").parts.decoder.weight_bytes == base.parts.decoder.weight_bytes
    del session
    gc.collect()
    assert reserved(derived.new_session().plan) == layer + biases


def test_what_does_not_fit_is_refused_before_a_weight_is_copied(folder, monkeypatch):
    base = load(folder)
    monkeypatch.setattr("longrun.runtime.derive.reordered", lambda *args: pytest.fail("weights were copied"))
    exactly = Budget(base.plan.device_bytes, chunk_size=50)  # holds the loaded model, and no copies beside it
    tight = longrun.load(folder, exactly, device="cpu", ctx=CTX)
    with pytest.raises(PlanError, match="does not hold 300 tokens"):
        tight.derive(HeadMap.from_scores([[0.1, 0.9, 0.9]] * 3))
    monkeypatch.setattr(host_memory, "_machine_bytes", lambda: 1000)
    with pytest.raises(PlanError, match="are free: ask for a smaller context"):
        base.derive(MAP)


def test_refusals(folder, tmp_path):
    base = load(folder)
    refused = [
        (InputError, {"retrieval_ratio": 0.5}, "needs a head map"),
        (InputError, {"split": "full", "retrieval_ratio": 0.5}, "needs a head map"),
        (InputError, {"split": "auto"}, "give it to longrun.load, or give the folder"),
        (InputError, {"split": 3}, "neither a HeadMap nor a folder"),
        (HeadMapError, {"split": tmp_path / "no-such-map"}, "no-such-map"),
        (HeadMapError, {"split": HeadMap.uniform(2, 3, 0.5)}, "2"),
        (HeadMapError, {"split": MAP, "retrieval_ratio": 1.5}, "retrieval ratio"),
        (ConfigError, {"kv_format": "int5"}, "int5"),
        (ConfigError, {"chunk_size": 0}, "chunk_size"),
        (InputError, {"ctx": 0}, "ctx"),
        (PlanError, {"ctx": "999M"}, "does not hold 999,000,000 tokens"),
    ]
    for kind, options, said in refused:
        with pytest.raises(kind, match=said):
            base.derive(**options)
    assert base.plan.capacity == CTX and torch.equal(answers(base), answers(load(folder)))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_stay_in_their_order(folder, weights):
    base = load(folder, weight_format=weights)
    with pytest.raises(InputError, match=f"{weights} weights cannot be put into the order .* load the model with this"):
        base.derive(MAP)
    in_order = HeadMap.from_scores([[0.9, 0.1, 0.1], [0.8, 0.7, 0.1], [0.4, 0.2, 0.1]], sink_size=16, recent_size=32)
    derived = base.derive(in_order, "fp32", 64)
    loaded = load(folder, weight_format=weights, head_map=in_order, kv_format="fp32", chunk_size=64)
    assert torch.equal(answers(derived), answers(loaded))


def test_a_map_of_another_model_is_told_of(folder, tmp_path):
    facts = {"model": "theirs", "model_fingerprint": "0" * 64, "weights_fingerprint": "1" * 64}
    MAP.save(tmp_path / "map", facts={"identification": facts})
    base = load(folder)
    derived = base.derive(tmp_path / "map")
    told = f"head map {tmp_path / 'map'} was made for theirs and not for "
    assert [notice.startswith(told) for notice in derived.notices].count(True) == 1
    assert not any("was made for" in notice for notice in [*base.notices, *derived.derive("full").notices])
    assert any(notice.startswith(told) for notice in derived.derive(kv_format="fp32").notices)


def test_the_fused_decode_runs_on_reordered_weights(tmp_path):
    """The GPU's engine over the torch references of its kernels: as one whose weights were loaded in that order."""
    pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")
    from longrun.kernels.gpu_kernels import reference_kernels

    save_tiny(tmp_path, "qwen2", head_dim=64, hidden_size=192, intermediate_size=192)
    config, kernels = ModelConfig.from_dir(tmp_path), reference_kernels()
    split, in_order = MAP.split(threshold=0.5), [range(config.num_kv_heads)] * config.num_layers
    orders = [split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
    plan = make_plan(config, Budget.load("rtx4090-24g").override(weight_format="fp32"), CTX, split=split)
    assert plan.attention.fused
    base = load_decoder(tmp_path, config, in_order, "fp32", "cpu")
    loaded = load_decoder(tmp_path, config, orders, "fp32", "cpu", kernels=kernels)
    rotary = RotaryTable(RopeParameters.from_dir(tmp_path), config.head_dim)
    rows = []
    for decoder in (reordered(base, orders, kernels), loaded):
        assert decoder.permutation == loaded.permutation != base.permutation
        engine = build_engine(Parts(decoder, rotary, rotary, None, kernels), plan)
        pieces = [torch.tensor(IDS), *torch.tensor([[3], [5], [7]])]
        rows.append(torch.cat([engine.run(piece) for piece in pieces]))
    assert torch.equal(*rows)
