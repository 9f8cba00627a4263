"""Documents that are read sparsely, by the engines of both backends and by sessions: what stays dense bit for bit, what
does not, and coming back to a mark."""

from dataclasses import replace

import pytest
import torch
from tiny_models import save_tiny

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.config.model_config import ModelConfig
from longrun.engine.chunks import chunk_lengths, sparse_positions
from longrun.errors import InputError
from longrun.kernels.gpu_kernels import reference_kernels
from longrun.model.checkpoint import load_decoder
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.patterns.head_map import HeadMap
from longrun.plan import placement
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan
from longrun.runtime import backend
from longrun.runtime.backend import Parts, build_engine
from longrun.session.session import Session
from longrun.specs.prefill_spec import PrefillSpec

CTX, CHUNK = 2400, 300
SPEC = PrefillSpec(mass=0.6, dense_tokens=500, dense_end=200, newest=1, floor=2, least=0, cap=0.3)
IDS = torch.randint(0, 97, (CTX,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, "llama", head_dim=64, hidden_size=192, intermediate_size=192)
    return path


def session(folder, prefill, fused, kv="int4", page_size=16, device_share=0.5):
    """A session of a tiny model, through the GPU's backend with reference kernels or through plain torch."""
    config = ModelConfig.from_dir(folder)
    head_map = HeadMap.from_scores([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], sink_size=16, recent_size=48)
    split = head_map.split(threshold=0.5)
    budget = Budget.load("rtx4090-24g").override(kv_format=kv, weight_format="fp32", chunk_size=CHUNK)
    budget = replace(budget, page_size=page_size)
    plan = make_plan(config, budget, CTX, split=split, device_share=device_share, gpu_kernels=fused)
    settings = replace(plan.attention, prefill=prefill)
    plan = replace(plan, attention=settings)
    kernels = reference_kernels() if fused else None
    permutation = [split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
    decoder = load_decoder(folder, config, permutation, "fp32", "cpu", 64, kernels)
    rotary = RotaryTable(RopeParameters.from_dir(folder), config.head_dim)
    return Session(build_engine(Parts(decoder, rotary, rotary, None, kernels), plan), plan, None, frozenset())


def everything(session):
    """What a session holds, to be compared bit for bit."""
    found = [session.logits]
    for pages, ring in session.cache.layers:
        found += [] if pages is None else [pages.places.table, *pages.tail_tokens(session.seq_len)]
        found += [] if ring is None else list(ring.in_order(session.seq_len))
    return [*found, session.cache.device_pool.storage, session.cache.host_pool.storage]


def same(one, other):
    assert one.token_ids == other.token_ids
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_dense_is_dense_bit_for_bit(folder, fused):
    """A document that ends before the first sparse position, a short one behind it, one that is said not to be one,
    known tokens, and tokens one by one."""
    exact, sparse = session(folder, None, fused), session(folder, SPEC, fused)
    for each in (exact, sparse):
        each.prefill(IDS[:700])
    assert same(exact, sparse)
    for each in (exact, sparse):
        each.prefill(IDS[700 : 700 + SPEC.dense_end])
    assert same(exact, sparse)
    for each in (exact, sparse):
        each.prefill(IDS[900:1700], sparse=False)
    assert same(exact, sparse)
    assert torch.equal(*(each.score(IDS[1700:2100]) for each in (exact, sparse)))
    for each in (exact, sparse):
        each.prefill(IDS[2100:2104], one_by_one=True)
    assert same(exact, sparse)
    assert (exact.sparse_tokens, exact.prefill_counts) == (0, None)
    assert sparse.sparse_tokens == 0 and sparse.prefill_counts.read_share is None
    with pytest.raises(InputError, match="sparse"):
        sparse.prefill(IDS[:1], sparse="no")


@pytest.mark.parametrize("fused", [True, False])
def test_a_long_document_is_read_sparsely_but_for_its_ends(folder, fused):
    exact, sparse = session(folder, None, fused), session(folder, SPEC, fused)
    for each in (exact, sparse):
        each.prefill(IDS[:2000])
        each.cache.check()
    assert not same(exact, sparse)
    positions, cuts = sparse_positions(SPEC, 2000), list(chunk_lengths(0, 2000, CHUNK, sparse_positions(SPEC, 2000)))
    assert cuts == [(300, False)] * 2 + [(300, True)] * 4 + [(200, False)] and positions == range(500, 1800)
    assert sparse.sparse_tokens == 1200
    counts, tiles = sparse.prefill_counts, 3
    pages = sum((start - 1) // 16 - 1 for start in (600, 900, 1200, 1500))
    for read, whole, heads in zip(counts.read, counts.pages, (2, 1, 3), strict=True):  # retrieval heads of each layer
        assert whole == (tiles * pages,) * 2 * heads + (0,) * 2 * (3 - heads)
        assert all(0 < some < tiles * pages for some in read[: 2 * heads]) and not any(read[2 * heads :])
    assert all(rows in (0, 4) for row in counts.rows for rows in row)
    assert 0 < counts.read_share < 0.35 and 0 < counts.caught_share < 1


def test_everything_chosen_is_the_exact_reading(folder):
    """The whole model over exact pages, where no nibble can fall the other way."""
    spec = replace(SPEC, dense_tokens=0, floor=10**6, cap=1.0)
    exact, sparse = (session(folder, some, False, "fp32") for some in (None, spec))
    logits = [each.prefill(IDS[:2000]) for each in (exact, sparse)]
    assert sparse.sparse_tokens == 1500 and sparse.prefill_counts.read_share == 1
    assert torch.allclose(*logits, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_mark_is_a_point_to_come_back_to(folder, fused):
    """Whatever was read meanwhile, and however it steered the levels, a document is read as the first time."""
    one = session(folder, SPEC, fused)
    one.prefill(IDS[:400])
    mark = one.mark()
    one.prefill(IDS[400:1900])
    list(one.generate(5, eos=False))
    found, tokens, count = [x.clone() for x in everything(one)], one.token_ids, one.sparse_tokens
    assert count == 900
    one.rewind(mark)
    assert one.sparse_tokens == 0 and one.num_tokens == 400
    one.prefill(IDS.flip(0)[:1700])
    second = one.mark()
    assert one.sparse_tokens > 0
    one.rewind(mark)
    one.prefill(IDS[400:1900])
    list(one.generate(5, eos=False))
    assert one.token_ids == tokens and one.sparse_tokens == count
    assert torch.equal(found[0], one.logits)
    one.cache.check()
    del second


def test_a_waiting_token_belongs_to_the_document(folder):
    one = session(folder, replace(SPEC, dense_tokens=0), False)
    one.prefill(IDS[:300])
    list(one.generate(1, eos=False))
    assert one.seq_len == 300 and one.num_tokens == 301
    one.prefill(IDS[301:1301])
    assert one.seq_len == one.num_tokens == 1301 and one.sparse_tokens == 801  # but for the last 200


def test_the_plan_holds_it(folder):
    settings = placement.PlanSettings(
        config=ModelConfig.from_dir(folder), split=HeadMap.uniform(3, 3, 1.0).split(threshold=0.5), device_type="cuda",
        weight_format="fp32", kv_format="int4", page_size=64, chunk_size=CHUNK, device_bytes=10**10, host_bytes=0,
    )  # fmt: skip
    exact, sparse = (placement.place(replace(settings, prefill=some), CTX) for some in (None, SPEC))
    lines = [{item.name: item.bytes for item in place.items} for place in (exact, sparse)]
    assert "sparse prefill" not in lines[0]
    assert lines[1]["sparse prefill"] == sparse.attention.sparse_bytes() > 0
    assert sum(lines[1].values()) - sum(lines[0].values()) == lines[1]["sparse prefill"]


def test_a_gpu_warms_its_kernels_up(folder, monkeypatch):
    """The kernels that a sparse chunk needs have run once before the first text, and nothing of it is counted."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    one = session(folder, SPEC, True)
    engine, steps = one._engine, []
    run = engine.attention.run

    def seen(layer_idx, q, k, v, step):
        steps.append((layer_idx, step.start, step.num_tokens, step.sparse))
        return run(layer_idx, q, k, v, step)

    engine.attention.run = seen
    backend._warm_up(engine)
    assert [step for step in steps if step[0] == 0] == [(0, 0, 300, False), (0, 300, 300, False), (0, 600, 300, True)]
    assert engine.cache.seq_len == 0 and one.prefill_counts.line() == "nothing read sparsely"
