"""Runtimes that rows share weights through are those that loading gives; budgets decide memory, not heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.errors import HeadMapError, InputError
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from scripts.quality import compare_runtimes as script

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RATIO = 0.4


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # qwen2 has biases on q, k and v
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(path, request.param)
    return path


@pytest.fixture
def runtimes(folder):
    budget = script.comparison_budget(None, "cpu", 50)
    return script.Runtimes(folder, None, budget, "cpu", capacity=300)


@pytest.mark.parametrize("row", [Row("a", "random:3", RATIO), Row("b", "streaming", sink_size=3, recent_size=20)])
def test_a_shared_runtime_is_the_loaded_one(runtimes, folder, row):
    reference = runtimes.get(REFERENCE_ROW)
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    before = reference.new_session().prefill(ids).clone()
    own = runtimes.get(row)
    loaded = longrun.load(
        folder, "cpu", row.make_map(3, 3), row.kv, device="cpu", ctx=300, chunk_size=50,
        retrieval_ratio=row.retrieval_ratio,
    )  # fmt: skip
    assert own.split == loaded.split and not own.split.is_full
    assert any(list(order) != sorted(order) for order in own.parts.decoder.permutation) == (row.name == "a")
    assert own.identity == loaded.identity
    copied = [item.bytes for item in own.plan.items if item.name == "reserved"]  # heads of the other runtime's order
    assert len(copied) == (row.name == "a") and own.plan.total_bytes == loaded.plan.total_bytes + sum(copied)
    assert own.plan.capacity == 300
    for mine, theirs in zip(own.parts.decoder.layers, loaded.parts.decoder.layers, strict=True):
        pairs = list(zip(mine.tensors(), theirs.tensors(), strict=True))
        assert all(torch.equal(one, other) and one.is_contiguous() for one, other in pairs)
    sessions = own.new_session(), loaded.new_session()
    first, second = (session.prefill(ids) for session in sessions)
    assert torch.equal(first, second)
    assert sessions[0].cache.spec == sessions[1].cache.spec
    assert not torch.equal(first, before)
    assert torch.equal(reference.new_session().prefill(ids), before)  # the weights it shares were not touched


def test_every_row_tells_of_a_map_made_for_another_model(runtimes, tmp_path):
    facts = {"model": "theirs", "model_fingerprint": "0" * 64, "weights_fingerprint": "1" * 64}
    HeadMap.uniform(3, 3, RATIO).save(tmp_path / "map", facts={"identification": facts})
    told = f"head map {tmp_path / 'map'} was made for theirs and not for "
    for head_map, kept in ((tmp_path / "map", 1), (f"inverted:{tmp_path / 'map'}", 1), ("random:3", 0)):
        for weights in (None, "int8"):
            notices = runtimes.get(Row("a", str(head_map), RATIO, weights=weights)).notices
            assert sum(notice.startswith(told) for notice in notices) == kept
    assert not any("was made for" in notice for notice in runtimes.get(REFERENCE_ROW).notices)


def test_weights_are_read_once_unless_they_are_quantized(runtimes, monkeypatch):
    reads, load = [], longrun.load

    def counting(*given, **named):
        reads.append(given[4])
        return load(*given, **named)

    monkeypatch.setattr(longrun, "load", counting)
    reference = runtimes.get(REFERENCE_ROW)
    rows = [Row("a", "random:3", RATIO), Row("b"), Row("c", "random:3", RATIO, weights="fp32")]
    found = [runtimes.get(row) for row in rows]
    assert reads == [None]
    layer = reference.parts.decoder.layers[0]
    assert all(one.parts.decoder.layers[0].down is layer.down for one in found)
    eight = runtimes.get(Row("d", "random:3", RATIO, weights="int8"))
    assert reads == [None, "int8"]
    assert eight.plan.weight_format == "int8" and eight.split == found[0].split


def test_a_row_may_have_chunks_of_its_own(runtimes):
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    reference, again = runtimes.get(REFERENCE_ROW), runtimes.get(Row("again", kv="bf16", chunk_size=30))
    assert (reference.plan.chunk_size, again.plan.chunk_size) == (50, 30)
    chunks = []
    session = again.new_session()
    found = session.prefill(ids, progress=lambda done, total: chunks.append(done))
    assert chunks == [30, 60, 90, 120, 150]
    torch.testing.assert_close(found, reference.new_session().prefill(ids), rtol=1e-3, atol=1e-3)
    assert again.parts.decoder.layers[0].down is reference.parts.decoder.layers[0].down
    assert runtimes.get(REFERENCE_ROW).plan.chunk_size == 50
    eight = runtimes.get(Row("d", kv="bf16", weights="int8", chunk_size=30))
    assert eight.plan.chunk_size == 30


def test_a_budget_chooses_no_heads_and_an_unnamed_one_no_weights(folder, tmp_path, monkeypatch):
    text = """
[memory]
gpu = "8 GB"
[weights]
format = "int8"
[kv]
retrieval_ratio = 0.5
sink_size = 8
recent_size = 9
"""
    path = tmp_path / "budget.toml"
    path.write_text(text)
    named = script.comparison_budget(str(path), "cpu", None)
    assert (named.weight_format, named.retrieval_ratio) == ("int8", None)
    assert (named.sink_size, named.recent_size) == (None, None)
    assert named.device_bytes == 8 * 10**9
    monkeypatch.setattr(script.gpu_checks, "default_budget", lambda device: str(path))
    unnamed = script.comparison_budget(None, "cpu", 33)
    assert unnamed.weight_format is None and unnamed.chunk_size == 33
    # with the file's ratio, half of the heads of this map would keep all tokens
    found = script.Runtimes(folder, None, unnamed, "cpu", capacity=300).get(Row("all streaming", "streaming"))
    assert found.split.total_retrieval == 0 and found.split.recent_size == 256
    loaded = longrun.load(folder, Budget.load(path), Row("s", "streaming").make_map(3, 3), device="cpu", ctx=300)
    assert loaded.split.total_retrieval > 0
    with pytest.raises(InputError, match="neither a file nor a shipped budget"):
        script.comparison_budget("no-such-budget", "cpu", None)


def test_a_missing_map_is_heard_of_before_anything_is_measured(runtimes, tmp_path, monkeypatch):
    runtimes.check([REFERENCE_ROW, Row("a", "random:3", RATIO)])
    monkeypatch.setattr(longrun, "load", None)
    with pytest.raises(HeadMapError, match="no-such-map"):
        runtimes.check([REFERENCE_ROW, Row("a", str(tmp_path / "no-such-map"), RATIO)])
