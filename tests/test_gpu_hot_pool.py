"""The hot pool on a real GPU, within the captured graph: `pytest -m gpu`. Collected only where there is one."""

import pytest
import torch
from test_gpu import load
from tiny_models import tiny_model

from scripts.bench.bench_decode import graph_ms, last_step_hits

pytestmark = pytest.mark.gpu

SELECT = 6
IDS = torch.randint(0, 97, (880,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[64, 128])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hot")
    shape = {"head_dim": request.param, "hidden_size": 6 * request.param, "intermediate_size": 320}
    tiny_model("llama", **shape, num_attention_heads=6).save_pretrained(path)
    return path


def runtime_of(folder, slots, device_share):
    """One whose hot pool has so many slots a head; None: without one."""
    options = {"kv": "k5v3", "select": SELECT, "select_from": 0, "device_share": device_share}
    runtime = load(folder, "cuda", **options)
    if slots is not None:
        cache = runtime.plan.cache
        size = slots * cache.keeping_heads * cache.page_format.payload_bytes
        runtime = load(folder, "cuda", **options, hot_pool=size)
        assert runtime.plan.cache.hot_slots == slots
    return runtime


def session_of(folder, slots, count=560, device_share=0.0):
    session = runtime_of(folder, slots, device_share).new_session()
    session.prefill(IDS[:count])
    return session


@pytest.mark.parametrize("device_share", [0.0, 0.4])
def test_no_answer_depends_on_it(folder, device_share):
    found = []
    for slots in (None, SELECT, SELECT + 2):
        session = session_of(folder, slots, device_share=device_share)
        mark = session.mark()
        rows = [session.score(IDS[560:800], one_by_one=True)]
        session.rewind(mark)
        session.prefill(IDS[100:340])  # other pages under the same numbers
        rows.append(session.score(IDS[:60], one_by_one=True))
        session.rewind(mark)
        answer = list(session.generate(120, eos=False))
        session.rewind(mark)
        assert session.score(answer, one_by_one=True).argmax(dim=-1).tolist() == answer
        rows.append(session.logits[None])
        if slots is not None:
            session.cache.check()
            counts = session.hot_counts
            assert 0 < sum(counts.missed) < sum(counts.pages)
        found.append(torch.cat(rows))
    assert all(torch.equal(found[0], rows) for rows in found[1:])


def test_it_counts_what_the_references_count(folder):
    """Teacher-forced, so that no step is thrown away: by kernels and by the references, from the same pages."""
    from longrun.kernels import hot_pages

    session = session_of(folder, SELECT + 1)
    mark, cache = session.mark(), session.cache
    layers = [cache.hot.layer(layer_idx) for layer_idx in range(len(cache.layers))]
    before = [None if hot is None else [tensor.clone() for tensor in vars(hot).values()] for hot in layers]
    session.prefill(IDS[560:561], one_by_one=True)
    torch.cuda.synchronize()
    last = max(layer_idx for layer_idx, hot in enumerate(layers) if hot is not None)
    decode = session._engine.attention.decode
    expected = hot_pages.HotPages(*before[last])
    hot_pages.hot_lookup(decode._selector.chosen(cache.view(last)), expected)
    for name in ("table", "order", "owner", "counts"):
        assert torch.equal(getattr(layers[last], name), getattr(expected, name)), name
    assert session.hot_counts.pages[last] == int(expected.counts[:, 0].sum()) > 0
    session.rewind(mark)


def test_steps_thrown_away_count_nothing(folder):
    """Every other token is not the likeliest, after steps that were launched ahead."""
    counts = []
    for ahead in (False, True):
        session = session_of(folder, SELECT)
        token = 5
        for step in range(90):
            logits = session._engine.run_one(token, ahead=ahead)
            token = int(logits.argmax()) if step % 2 else (int(logits.argmax()) + 1) % 97
        counts.append(session.hot_counts)
        session.cache.check()
    assert counts[0].pages == counts[1].pages and sum(counts[0].pages) > 0


def test_replays_of_one_step_find_every_page(folder):
    """The benchmark's time of a step that fetches nothing."""
    runtime = runtime_of(folder, 2 * SELECT, 0.2)
    session = runtime.new_session()
    session.prefill(IDS[:800])
    list(session.generate(12, eos=False))
    assert graph_ms(runtime, session) > 0
    assert last_step_hits(session) == 1.0


def test_hits_of_a_session_without_a_pool(folder):
    assert last_step_hits(session_of(folder, None)) is None
