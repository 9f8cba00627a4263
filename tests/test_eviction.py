"""Eviction baselines: full attention while nothing must go, the papers' kept sets, and memory really given back."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from exact_runtime import exact_runtime, text

import longrun
from longrun.attention.interface import Step
from longrun.errors import InputError, PlanError, SessionError
from longrun.lab.evicting_cache import EvictingCache, EvictingSpec
from longrun.lab.eviction_attention import EvictionAttention, EvictionSettings
from longrun.lab.quality.eviction import end_prompt, make_session

HEADS, GROUP, DIM = 3, 2, 16
RULES = ("snapkv", "h2o", "streamingllm", "pyramidkv", "adakv", "random-1")
METHODS = ("tova", *RULES)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return exact_runtime(tmp_path_factory.mktemp("tiny"))


def capture(session) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """(layer, start, q, k) of every step, in float64, as the backend is given them."""
    seen, real = [], session._engine.attention.run

    def run(layer_idx, q, k, v, step):
        seen.append((layer_idx, step.start, q.double().clone(), k.double().clone()))
        return real(layer_idx, q, k, v, step)

    session._engine.attention.run = run
    return seen


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_with_room_for_every_token_it_is_full_attention(runtime, method):
    ids = text(140)
    full, own = runtime.new_session(200), make_session(runtime, method, 200, 200, chunk_size=37)
    for session in (full, own):
        session.prefill(ids[:100])
    end_prompt(own)
    end_prompt(full)  # any other session is left alone
    assert own.seq_len == 100 and own.cache.layers[0].length == 100
    torch.testing.assert_close(own.logits, full.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.score(ids[100:]), full.score(ids[100:]), rtol=1e-4, atol=1e-4)
    assert list(own.generate(8)) == list(full.generate(8))


@pytest.mark.parametrize("method", METHODS)
def test_with_less_room_the_logits_differ(runtime, method):
    """The failing side of the test above."""
    ids = text(140)
    full, own = runtime.new_session(200), make_session(runtime, method, 20, 200, chunk_size=37, window=4)
    for session in (full, own):
        session.prefill(ids[:100])
        end_prompt(session)
    assert (own.score(ids[100:]) - full.score(ids[100:])).abs().max() > 0.05


def snapkv_by_hand(seen, layer: int, head: int, keep: int, window: int, kernel: int) -> list[int]:
    """Positions, from the paper's words, in loops and float64."""
    queries = torch.cat([q for one, _, q, _ in seen if one == layer])
    keys = torch.cat([k for one, _, _, k in seen if one == layer])[:, head]
    n = len(keys)
    votes = [0.0] * (n - window)
    for position in range(n - window, n):
        for query_head in range(head * GROUP, (head + 1) * GROUP):
            weights = softmax([float(queries[position, query_head] @ keys[j]) / 4 for j in range(position + 1)])
            for j in range(n - window):
                votes[j] += weights[j] / GROUP
    half = kernel // 2
    padded = [0.0] * half + votes + [0.0] * half
    pooled = [sum(padded[j : j + kernel]) / kernel for j in range(n - window)]
    best = sorted(range(n - window), key=lambda j: (-pooled[j], j))[:keep]
    return [*sorted(best), *range(n - window, n)]


@pytest.mark.parametrize(("chunk", "kernel"), [(100, 5), (9, 7), (1, 1)])
def test_snapkv_keeps_what_the_window_looks_at(runtime, chunk, kernel):
    n, keep, window = 83, 12, 10
    session = make_session(runtime, "snapkv", keep, 120, chunk_size=chunk, window=window, kernel=kernel)
    seen = capture(session)
    session.prefill(text(n))
    end_prompt(session)
    kept = set()
    for layer_idx, layer in enumerate(session.cache.layers):
        assert layer.length == keep + window
        for head in range(HEADS):
            found = layer.positions[head, : layer.length].tolist()
            assert found == snapkv_by_hand(seen, layer_idx, head, keep, window, kernel)
            kept.add(tuple(found))
    assert len(kept) > 5  # heads keep sets of their own
    end_prompt(session)
    session.prefill(text(5, seed=1))
    end_prompt(session)  # later tokens are only added
    assert session.cache.layers[0].length == keep + window + 5
    assert session.seq_len == n + 5


@pytest.mark.parametrize("chunk", [1, 13])
def test_tova_drops_what_the_newest_query_looks_at_least(runtime, chunk):
    n, keep = 60, 14
    session = make_session(runtime, "tova", keep, 120, chunk_size=chunk)
    seen = capture(session)
    session.prefill(text(n))
    for layer_idx, layer in enumerate(session.cache.layers):
        held: list[int] = []
        keys = torch.cat([k for one, _, _, k in seen if one == layer_idx])
        for one, start, q, k in seen:
            if one != layer_idx:
                continue
            held += range(start, start + len(k))
            if len(held) > keep:
                weights = [0.0] * len(held)
                for query_head in range(HEADS * GROUP):
                    scores = [float(q[-1, query_head] @ keys[j, query_head // GROUP]) / 4 for j in held]
                    weights = [w + p for w, p in zip(weights, softmax(scores), strict=True)]
                order = sorted(range(len(held)), key=lambda i: (-weights[i], i))[:keep]
                held = [held[i] for i in sorted(order)]
        for head in range(HEADS):
            assert layer.positions[head, : layer.length].tolist() == held


def backend(method: str, keep: int, chunk: int = 0, **settings) -> EvictionAttention:
    tova = method == "tova"
    spec = EvictingSpec(1, HEADS, DIM, torch.float32, 400, keep + chunk if tova else 100, 8, tova)
    return EvictionAttention(EvictingCache(spec, torch.device("cpu")), EvictionSettings(method, keep, **settings))


@pytest.mark.parametrize(("method", "chunk"), [*((rule, 40) for rule in RULES), ("tova", 11), ("tova", 1)])
@torch.inference_mode()  # as the engine's steps are
def test_every_step_is_dense_attention_over_the_kept_positions(method, chunk):
    attention = backend(method, 20, chunk, window=8)
    generator, n = torch.Generator().manual_seed(3), 150
    q = torch.randn(n, HEADS * GROUP, DIM, generator=generator) * 2
    k, v = torch.randn(2, n, HEADS, DIM, generator=generator)
    layer, start = attention.cache.layers[0], 0
    dropped = 0
    while start < n:
        count = min(chunk if start < 120 else 1, n - start, 120 - start if start < 120 else n)
        before = [row.clone() for row in layer.kept_positions()]
        part = slice(start, start + count)
        out = attention.run(0, q[part], k[part], v[part], Step(start, count, None, None))
        attention.cache.advance(count)
        for head in range(HEADS * GROUP):
            mask = torch.zeros(count, start + count, dtype=torch.bool)
            mask[:, before[head // GROUP].long()] = True
            mask[:, start:] = torch.ones(count, count, dtype=torch.bool).tril()
            scores = q[part, head].double() @ k[: start + count, head // GROUP].double().T / DIM**0.5
            expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[: start + count, head // GROUP].double()
            torch.testing.assert_close(out[:, head].double(), expected, rtol=1e-5, atol=1e-5)
            dropped += int((~mask[:, :start]).sum())
        start += count
        if start == 120:
            attention.compress()
    assert dropped > 0


@pytest.mark.parametrize("method", METHODS)
def test_marks_bring_evicted_tokens_back(runtime, method):
    """Questions asked after a rewind get the answer of a session that was asked nothing else."""

    def ask(session, question):
        session.prefill(question)
        end_prompt(session)
        return list(session.generate(6)), session.logits.clone()

    document, questions = text(90), [text(7, seed) for seed in (5, 6, 7)]
    session = make_session(runtime, method, 16, 200, chunk_size=20)
    session.prefill(document)
    mark = session.mark()
    for question in questions:
        session.rewind(mark)
        ids, logits = ask(session, question)
        fresh = make_session(runtime, method, 16, 200, chunk_size=20)
        fresh.prefill(document)
        expected_ids, expected = ask(fresh, question)
        assert ids == expected_ids
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", RULES)
def test_a_document_compressed_once_is_asked_often(runtime, method):
    """A mark of kept tokens: each question finds the document as it was, also after one that needed more room."""
    document, questions = text(90), [text(7, 5), text(80, 6), text(7, 5), text(9, 7), text(80, 6)]
    session = make_session(runtime, method, 16, 200, chunk_size=20)
    session.prefill(document)
    end_prompt(session)
    mark, found, kept = session.mark(), {}, []
    for question in questions:
        session.rewind(mark)
        kept.append([row.tolist() for layer in session.cache.layers for row in layer.kept_positions()])
        logits = session.prefill(question).clone()
        end_prompt(session)  # already compressed
        assert session.cache.used_bytes == (16 + 32 + len(question)) * session.cache.spec.token_bytes()
        assert torch.equal(found.setdefault(tuple(question), logits), logits)
    assert len(found) == 3 and all(one == kept[0] for one in kept)


def test_snapkv_gives_the_memory_back(runtime):
    session = make_session(runtime, "snapkv", 30, 300, window=10)
    spec, cache = session.cache.spec, session.cache
    token = 3 * HEADS * (2 * DIM * 4 + 4)  # three layers; keys and values in float32, a position of 4 bytes
    assert spec.token_bytes() == token
    assert session.cache_bytes == spec.initial_bytes() == 300 * token
    session.prefill(text(250))
    queries = 3 * 10 * HEADS * GROUP * DIM * 4
    assert session.cache_bytes == 300 * token + queries
    assert cache.used_bytes == 250 * token
    old = weakref.ref(cache.layers[1].k)
    end_prompt(session)
    assert old() is None
    assert session.cache_bytes == (30 + 10 + 64) * token  # 64 tokens of room for what comes
    assert cache.used_bytes == 40 * token
    assert sum(x.untyped_storage().nbytes() for y in cache.layers for x in (y.k, y.v, y.positions)) == cache.total_bytes
    assert cache.peak_bytes >= 300 * token
    session.prefill(text(40, 1))
    assert cache.used_bytes == 80 * token


def test_tova_never_holds_more_than_budget_and_chunk(runtime):
    session = make_session(runtime, "tova", 40, 400, chunk_size=16)
    token = session.cache.spec.token_bytes()
    session.prefill(text(300))
    list(session.generate(20))
    assert session.cache_bytes == session.cache.peak_bytes == (40 + 16) * token
    assert session.cache.used_bytes == 40 * token


def test_what_is_refused(runtime, tmp_path):
    session = make_session(runtime, "tova", 8, 100)
    session.prefill(text(20))
    with pytest.raises(SessionError, match=r"cannot be saved.*tova"):
        session.save(tmp_path / "session")
    with pytest.raises(InputError, match="'h3o' is unknown: use tova, snapkv, h2o"):
        make_session(runtime, "h3o", 8, 100)
    with pytest.raises(InputError, match="keep 0 tokens"):
        make_session(runtime, "tova", 0, 100)
    with pytest.raises(PlanError, match=r"snapkv holds .* and the budget has"):
        make_session(runtime, "snapkv", 8, 50_000_000)
    from longrun.patterns.baseline_maps import streaming_map

    mixed = longrun.load(runtime.model_dir, "cpu", streaming_map(3, 3, 4, 8), "fp32", device="cpu", ctx=64)
    with pytest.raises(InputError, match="head map full"):
        make_session(mixed, "snapkv", 8, 100)
