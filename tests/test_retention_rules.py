"""Retention rules: every one keeps its budget to the token, and the tokens that its paper's words name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from exact_runtime import exact_runtime, text

from longrun.errors import InputError
from longrun.lab.quality.eviction import end_prompt, make_session
from longrun.lab.retention_rules import (
    RULE_NAMES,
    AdaAllocation,
    PyramidAllocation,
    RetentionRule,
    UniformAllocation,
    retention_rule,
)
from longrun.lab.retention_scores import HeavyHitterScore, LayerPrompt, RecencyScore, received_attention

LAYERS, HEADS, GROUP, DIM, WINDOW = 3, 3, 2, 16, 7
SCALE = DIM**-0.5
RULES = [name.replace("SEED", "5") for name in RULE_NAMES]


def attention_by_hand(q: torch.Tensor, k: torch.Tensor) -> list[list[list[float]]]:
    """Softmax weights [num_qo_heads][n][n] of q [n, num_qo_heads, dim] over k [num_kv_heads, n, dim], in float64."""
    weights = []
    for head in range(q.shape[1]):
        scores = (q[:, head].double() @ k[head // (q.shape[1] // len(k))].double().T * SCALE).tolist()
        exps = [[math.exp(x) for x in row[: i + 1]] for i, row in enumerate(scores)]
        weights.append([[x / sum(row) for x in row] + [0.0] * (len(exps) - len(row)) for row in exps])
    return weights


@dataclass
class Layer:
    """Queries [n, num_qo_heads, dim] and keys [num_kv_heads, n, dim] of a prompt, and softmax by hand."""

    q: torch.Tensor
    k: torch.Tensor

    def __post_init__(self) -> None:
        self.weights = attention_by_hand(self.q, self.k)

    def received(self, first: int) -> list[list[float]]:
        """Of each KV head: what every token gets from the queries of [first, n), on the mean of the group."""
        n, group = len(self.q), self.q.shape[1] // len(self.k)
        return [
            [sum(self.weights[h * group + g][i][j] for g in range(group) for i in range(first, n)) / group
             for j in range(n)]
            for h in range(len(self.k))
        ]  # fmt: skip

    def prompt(self, layer_idx: int) -> LayerPrompt:
        received = torch.tensor(self.received(0), dtype=torch.float32)
        return LayerPrompt(layer_idx, LAYERS, self.q[-WINDOW:], self.k, received, SCALE)


def made(n: int, seed: int, heads: int = HEADS, group: int = GROUP) -> Layer:
    """Heads that look the sharper the later they come, so that they want different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, heads * group, DIM, generator=generator)
    k = torch.randn(heads, n, DIM, generator=generator)
    return Layer(q * torch.linspace(0.5, 4, heads * group)[:, None], k)


def scores_by_hand(name: str, layer: Layer, count: int) -> list[list[float]]:
    heads = len(layer.k)
    if name == "h2o":
        return [row[:count] for row in layer.received(0)]
    if name == "streamingllm":
        return [[math.inf if j < 4 else j for j in range(count)]] * heads
    votes = [[0.0] * 3 + row[:count] + [0.0] * 3 for row in layer.received(len(layer.q) - WINDOW)]
    return [[sum(row[j : j + 7]) / 7 for j in range(count)] for row in votes]


def best(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def kept_by_hand(name: str, scores: list[list[float]], keep: int, layer_idx: int) -> list[set[int]]:
    heads, n = len(scores), len(scores[0])
    if name == "pyramidkv":
        first = min(2 * keep - keep // 20, n)
        keep = (first, keep, 2 * keep - first)[layer_idx]  # of three layers
    if name != "adakv":
        return [best(row, keep) for row in scores]
    kept = [best(row, keep // 5) for row in scores]
    others = sorted((-scores[h][j], j, h) for h in range(heads) for j in range(n) if j not in kept[h])
    for _, j, h in others[: keep * heads - sum(map(len, kept))]:
        kept[h].add(j)
    return kept


@pytest.mark.parametrize(("n", "keep"), [(61, 12), (61, 13), (90, 41), (90, 1), (40, 32)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_its_budget_and_what_its_paper_says(name, n, keep):
    total, sets = 0, []
    for layer_idx in range(LAYERS):
        layer = made(n, layer_idx)
        chosen = retention_rule(name).kept(layer.prompt(layer_idx), keep)
        assert chosen.shape == (HEADS, n) and chosen[:, n - WINDOW :].all()
        total += int(chosen.sum())
        sets.append([set(row.nonzero().ravel().tolist()) for row in chosen[:, : n - WINDOW]])
        if not name.startswith("random"):
            expected = kept_by_hand(name, scores_by_hand(name, layer, n - WINDOW), keep, layer_idx)
            assert sets[-1] == expected
    assert total == LAYERS * HEADS * (keep + WINDOW)
    counts = [[len(kept) for kept in layer] for layer in sets]
    if name == "pyramidkv":
        assert counts[0] > counts[1] > counts[2] or keep == 1
    elif name == "adakv":
        assert min(map(min, counts)) >= keep // 5
        assert any(len(set(row)) > 1 for row in counts)  # heads do keep different numbers
    else:
        assert {c for row in counts for c in row} == {keep}


def test_random_tokens_follow_the_seed_and_differ_by_head_and_layer():
    first, second = made(90, 0).prompt(0), made(90, 1).prompt(1)
    one, again, other = (retention_rule(name).kept(first, 30) for name in ("random-5", "random-5", "random-6"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])
    assert not torch.equal(one, retention_rule("random-5").kept(second, 30))


@pytest.mark.parametrize("allocation", [UniformAllocation(), PyramidAllocation(), PyramidAllocation(3)])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
def test_layers_share_the_budget_whatever_the_sizes(allocation, num_layers):
    for n in (1, 2, 39, 200):
        scores = torch.rand(2, n)
        for keep in {1, max(1, n // 3), (n + 1) // 2, n}:
            masks = [allocation.choose(scores, keep, i, num_layers) for i in range(num_layers)]
            counts = [int(mask[0].sum()) for mask in masks]
            assert sum(counts) == keep * num_layers
            assert counts == sorted(counts, reverse=True)
            assert all(int(mask.sum()) == 2 * own for mask, own in zip(masks, counts, strict=True))
            if isinstance(allocation, PyramidAllocation) and num_layers > 1:
                steps = [a - b for a, b in pairwise(counts)]
                assert max(steps) - min(steps) <= 2  # a line, but for rounding


def test_any_score_goes_with_any_allocation():
    prompt = made(50, 3).prompt(0)
    for allocation in (UniformAllocation(), PyramidAllocation(), AdaAllocation()):
        for score in (HeavyHitterScore(), RecencyScore(3)):
            kept = RetentionRule(score, allocation).kept(prompt, 20)
            if not isinstance(allocation, PyramidAllocation):
                assert kept.sum() == HEADS * (20 + WINDOW)
    assert RetentionRule(RecencyScore(3), AdaAllocation()).kept(prompt, 20)[:, :3].all()


@pytest.mark.parametrize(("heads", "group"), [(3, 2), (1, 5), (4, 1)])
@pytest.mark.parametrize("tile", [1, 97, 1 << 20])
def test_received_attention_is_the_weights_summed_whatever_tiles_and_chunks(heads, group, tile):
    n, layer = 41, made(41, 7, heads, group)
    expected = torch.tensor(layer.received(0))
    for cut in (0, 1, 17):
        total = torch.zeros(heads, n)
        for first, last in ((0, cut), (cut, n)):
            if first < last:
                scores = layer.q[first:last].transpose(0, 1) @ layer.k.repeat_interleave(group, 0)[:, :last].mT * SCALE
                future = torch.ones(last - first, last, dtype=torch.bool).triu(first + 1)
                lse = scores.masked_fill(future, -torch.inf).logsumexp(-1)
                total[:, :last] += received_attention(layer.q[first:last], layer.k[:, :last], lse, first, SCALE, tile)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(total.sum()) - heads * n) < 1e-2  # every query gives 1


def test_more_queries_than_a_tile_has_rows():
    n, layer = 300, made(300, 8, 1, 1)
    scores = (layer.q[:, 0] @ layer.k[0].T * SCALE).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    found = received_attention(layer.q, layer.k, scores.logsumexp(-1)[None], 0, SCALE, tile=256 * 50)
    torch.testing.assert_close(found[0], scores.softmax(-1).sum(0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return exact_runtime(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("keep", [10, 23])
@pytest.mark.parametrize("name", RULES)
def test_a_session_holds_the_bytes_of_its_budget_and_its_room(runtime, name, keep):
    session = make_session(runtime, name, keep, 300, window=WINDOW)
    token, cache = 2 * DIM * 4 + 4, session.cache
    session.prefill(text(201))
    received = 201 * LAYERS * HEADS * 4 if name == "h2o" else 0
    queries = LAYERS * WINDOW * HEADS * GROUP * DIM * 4
    assert session.cache_bytes == 300 * LAYERS * HEADS * token + queries + received
    end_prompt(session)
    assert sum(map(sum, (layer.counts for layer in cache.layers))) == LAYERS * HEADS * (keep + WINDOW)
    assert cache.used_bytes == LAYERS * HEADS * (keep + WINDOW) * token
    assert cache.total_bytes - cache.used_bytes == LAYERS * HEADS * 64 * token  # 64 tokens of room for what comes
    assert cache.peak_bytes >= 300 * LAYERS * HEADS * token + queries + received
    for layer in cache.layers:
        assert [len(row) for row in layer.kept_positions()] == list(layer.counts)
    session.prefill(text(90, 1))
    assert cache.used_bytes == LAYERS * HEADS * (keep + WINDOW + 90) * token
    assert all(row[-90:].tolist() == list(range(201, 291)) for x in cache.layers for row in x.kept_positions())


def test_h2o_keeps_the_same_in_chunks_of_any_size(runtime):
    kept, received = [], []
    for chunk in (200, 37, 1):
        session = make_session(runtime, "h2o", 25, 300, chunk_size=chunk, window=WINDOW)
        session.prefill(text(120))
        received.append(torch.stack(session.cache.received))
        assert float(received[-1].sum()) == pytest.approx(LAYERS * HEADS * 120, rel=1e-4)
        end_prompt(session)
        kept.append([row.tolist() for layer in session.cache.layers for row in layer.kept_positions()])
        assert session.cache.received == [None] * LAYERS
    for other in (1, 2):
        torch.testing.assert_close(received[0], received[other], rtol=1e-3, atol=1e-4)
        assert kept[0] == kept[other]


def test_with_room_for_every_token_all_rules_are_one(runtime):
    found = []
    for name in RULES:
        session = make_session(runtime, name, 100 - WINDOW, 200, window=WINDOW)
        session.prefill(text(100))
        end_prompt(session)
        assert {layer.counts for layer in session.cache.layers} == {(100,) * HEADS}
        found.append(session.score(text(20, 1)))
    full = runtime.new_session(200)
    full.prefill(text(100))
    torch.testing.assert_close(found[0], full.score(text(20, 1)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found)


def test_names():
    assert retention_rule("random-12").score.seed == 12
    for name in ("random", "random-", "random-x", "tova", "SnapKV", "snapkv-1"):
        with pytest.raises(InputError, match=r"is unknown: use tova, snapkv, h2o"):
            retention_rule(name)
