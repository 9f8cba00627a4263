"""What an answer looked at: squared attention weights by a mask, passages, and a session left as it was."""

from __future__ import annotations

import pytest
import torch
from driven_attention import drive
from test_attention import DIM, SINK, random_tokens
from test_reach import PAGE, REACHES, drive_on, reaching, scattered
from test_reach import by_mask as attended
from tiny_models import save_tiny, tiny_model

import longrun
from longrun.attention.interface import Step
from longrun.attention.look_back import LookBack
from longrun.attention.looked import LookedTokens
from longrun.errors import InputError, PlanError
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import key_rotation
from longrun.session.passages import passages
from longrun.specs.reach import ALL_TOKENS


def by_mask(q, k, start, sink_size=SINK):
    """The definition in float64: weights under each head's mask, squared and summed over queries and heads.

    q [layers, n, heads, dim], k [layers, n, kv_heads, dim]; tokens from `start` on ask, heads without a reach do not.
    """
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    asking, keys = torch.arange(start, n)[:, None], torch.arange(n)[None]
    sums = torch.zeros(start, dtype=torch.float64)
    for layer, row in enumerate(REACHES):
        for head in range(len(row) * group):
            scores = q[layer, start:, head].double() @ k[layer, :, head // group].double().T / q.shape[3] ** 0.5
            seen = (keys <= asking) & ((keys < sink_size) | (keys > asking - row[head // group]))
            sums += scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, :start].square().sum(0)
    return sums


def look(attention, q, k, v, start, tile_bytes=2**12, move=lambda attention: None):
    """Drive the first `start` tokens, mark, drive the rest one by one, and look back from there."""
    drive(attention, q[:, :start], k[:, :start], v[:, :start], [start])
    cache = attention.cache
    mark = cache.mark()
    drive_on(attention, q, k, v, start, [1] * (q.shape[1] - start))
    move(attention)
    looked = LookedTokens(start, DIM**-0.5, tile_bytes, torch.device("cpu"))
    before = {name: x.clone() for name, x in cache.state().items()}
    back = LookBack(attention, cache.layers_at(mark), looked)
    step = Step(start, q.shape[1] - start, None, None)
    out = [back.run(layer, *(x[layer, start:].clone() for x in (q, k, v)), step) for layer in range(len(q))]
    cache.check()
    assert all(torch.equal(x, before[name]) for name, x in cache.state().items())
    return looked.sums, torch.stack(out)


@pytest.mark.parametrize("tile_bytes", [8, 2**12, 2**20])
@pytest.mark.parametrize(("start", "n"), [(5, 9), (130, 161), (300, 301)])
def test_sums_are_those_of_the_definition(start, n, tile_bytes):
    q, k, v = random_tokens(n)
    sums, out = look(reaching("fp32", n), q, k, v, start, tile_bytes)
    assert torch.allclose(sums.double(), by_mask(q, k, start), rtol=1e-4, atol=1e-6)
    assert torch.allclose(out.double(), attended(q, k, v)[:, start:], atol=1e-5)


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
@pytest.mark.parametrize("compiled", [True, False])
def test_quantized_pages_wherever_they_stand(kv, compiled):
    """Against the definition over the keys as the cache held them at the mark; pages are moved after it."""
    n, start = 261, 203
    q, k, v = random_tokens(n)
    for_queries, for_keys = key_rotation(DIM)
    held = (k @ for_keys).bfloat16().float()
    pooled = slice(PAGE, start // PAGE * PAGE)
    fmt = PageFormat(kv, PAGE, DIM)
    for layer in range(len(k)):
        for head in range(k.shape[2]):
            keys = held[layer, pooled, head].reshape(-1, PAGE, DIM)
            held[layer, pooled, head] = decode_pages(*encode_pages(keys, keys, fmt), fmt)[0].flatten(0, 1)
    expected = by_mask(q @ for_queries, held, start)
    attention = reaching(kv, n, compiled, device_pages=9)
    sums, _ = look(attention, q, k, v, start, move=lambda attention: scattered(attention, 3))
    assert torch.allclose(sums.double(), expected, rtol=2e-3, atol=1e-4)
    assert not torch.allclose(sums.double(), by_mask(q, k, start), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("device_share", [1.0, 0.3])
@pytest.mark.parametrize("kv", ["int4", "k5v3"])
def test_backends_agree(tmp_path, kv, device_share):
    pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")
    from test_gpu_backend import SHAPE, engines

    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (500,), generator=torch.Generator().manual_seed(2))
    found = []
    for engine in engines(tmp_path, "mixed", device_share, kv=kv, reaches=((ALL_TOKENS, 200), (130,), ())):
        engine.run(ids[:430])
        mark = engine.cache.mark()
        for token in ids[430:]:
            engine.run(token[None])
        found.append(engine.look_back(mark, ids[430:], 2**12))
        engine.cache.check()
    fused, plain = found
    assert plain[64:].sum() > 0.1
    assert (fused - plain).abs().sum() < 0.02 * plain.sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "llama")
    return folder


def text(n, seed=0):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("kv", "heads"), [("fp32", "full"), ("k5v3", [[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])])
def test_the_session_goes_on_as_if_nobody_had_asked(folder, kv, heads):
    """Bit by bit, also where the look was broken off in the middle of a layer."""
    head_map = heads if heads == "full" else longrun.HeadMap.from_scores(heads, sink_size=4, recent_size=24)
    runtime = longrun.load(folder, "cpu", head_map, kv, device="cpu", ctx=512, chunk_size=50)
    rows = []
    for asked in (False, True):
        session = runtime.new_session()
        session.prefill(text(230))
        mark = session.mark()
        written = list(session.generate(70, eos=False))
        if asked:
            found = session.looked_at(mark)
            assert found and all(64 <= passage.first < passage.stop <= 230 for passage in found)
            assert sum(passage.share for passage in found) <= 1 + 1e-9
            early = session.looked_at(mark, stop=240, before=128, most=1)
            assert len(early) == 1 and early[0].stop <= 128
            break_off(runtime.engine(session), session, mark)
        written += session.generate(30, eos=False)
        rows.append((written, session.logits))
    assert rows[0][0] == rows[1][0]
    assert torch.equal(rows[0][1], rows[1][1])


def break_off(engine, session, mark):
    calls, look = [], engine.attention.look

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return look(*given)

    engine.attention.look = stopped
    with pytest.raises(KeyboardInterrupt):
        session.looked_at(mark)
    engine.attention.look = look


def test_what_cannot_be_looked_at(folder):
    runtime = longrun.load(folder, "cpu", kv_format="fp32", device="cpu", ctx=512, chunk_size=50)
    session, other = runtime.new_session(), runtime.new_session()
    session.prefill(text(64))
    early = session.mark()
    session.prefill(text(100))
    mark = session.mark()
    with pytest.raises(InputError, match="no token follows the mark at token 164"):
        session.looked_at(mark)
    session.prefill([3, 4])
    with pytest.raises(InputError, match="of another session"):
        other.looked_at(mark)
    for options in ({"stop": 164}, {"stop": 167}, {"before": 165}, {"most": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            session.looked_at(mark, **options)
    assert session.looked_at(early) == [] and session.looked_at(mark, before=64) == []
    assert session.looked_at(mark)
    small = longrun.load(folder, "cpu", kv_format="fp32", device="cpu", ctx=3000, chunk_size=2).new_session()
    small.prefill(text(2000))
    mark = small.mark()
    small.prefill([5])
    with pytest.raises(PlanError, match="chunks of 2 tokens leave no memory"):
        small.looked_at(mark)


def test_tokens_that_no_head_drops_count_beside_the_first_page(folder):
    head_map = longrun.HeadMap.from_scores([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]], sink_size=4, recent_size=24)
    runtime = longrun.load(folder, "cpu", head_map, "fp32", device="cpu", ctx=512, chunk_size=50, keep=150)
    session = runtime.new_session()
    session.prefill(text(230))
    mark = session.mark()
    session.prefill(text(9, seed=1))
    assert session.cache.spec.sink_size == 150
    assert all(64 <= passage.first < 150 for passage in session.looked_at(mark, before=150))
    assert session.looked_at(mark, before=150)


def test_passages_join_neighbours_and_leave_out_empty_ends():
    sums = torch.zeros(1000)
    sums[3] = 100  # the first page never counts
    sums[120:140] = 2.0  # across two pages
    sums[400], sums[700:710] = 3.0, 1.0
    sums[900] = 0.5  # below a twentieth
    found = passages(sums, 64, 64, 5)
    assert [(p.first, p.stop) for p in found] == [(116, 140), (696, 710), (396, 401)]
    assert [round(p.share, 6) for p in found] == [round(x / 53.5, 6) for x in (40, 10, 3)]
    assert found[:2] == passages(sums, 64, 64, 2)
    sums[64] = sums[999] = 5000.0
    assert [(p.first, p.stop) for p in passages(sums, 64, 64, 5)] == [(64, 65), (995, 1000)]
    assert passages(torch.zeros(200), 64, 64, 5) == [] == passages(sums[:64], 64, 64, 5)
