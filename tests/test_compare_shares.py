"""Rows that hold a share of full attention's tokens: the heads they keep, what is refused, what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, save_tokenizer

import longrun
from longrun.errors import ConfigError, HeadMapError, InputError
from longrun.lab.quality import report
from longrun.lab.quality.measures import SPARE_TOKENS, cache_bytes, open_session
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.shares import reaching_split, split_tokens, streaming_split, whole_head_split
from longrun.patterns.head_map import HeadMap
from longrun.patterns.reach_losses import ReachLosses
from longrun.units import ALL_TOKENS
from scripts.quality import compare
from scripts.quality.compare_runtimes import Runtimes, comparison_budget

SINK, LENGTH = 16, 1200
OF_HEADS = ((3.0, 0.1, 0.05), (4.0, 3.9, 3.8), (0.2, 0.15, 0.12))
LOSSES = ReachLosses(
    SINK, 4000, (32, 100, 300), tuple(tuple(tuple(x / (1 + n) for x in one) for one in OF_HEADS) for n in range(3))
)
MAP = HeadMap(((0.5, 1.0, 0.0),) * 3, SINK, 32, reach_losses=LOSSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny(path, "llama")
    save_tokenizer(path)
    MAP.save(path / "map")
    HeadMap(MAP.scores).save(path / "plain")
    return path


@pytest.fixture
def runtimes(folder):
    return Runtimes(folder, None, comparison_budget(None, "cpu", 200), "cpu", capacity=LENGTH + SPARE_TOKENS)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.9, 1.0])
def test_no_split_holds_more_than_its_share_and_little_less(share):
    budget = share * LENGTH * 9
    reaching = reaching_split(MAP, share, LENGTH)
    assert budget - LENGTH < split_tokens(reaching, LENGTH) <= budget
    for window in (32, 100):
        whole = whole_head_split(MAP.with_window(recent_size=window), share, LENGTH)
        assert budget - LENGTH < split_tokens(whole, LENGTH) <= budget and not whole.reaches
        assert whole.total_retrieval < 9 or share == 1
    streaming = streaming_split(3, 3, share, LENGTH, SINK)
    assert split_tokens(streaming, LENGTH) == budget and streaming.total_retrieval == 0


def test_a_share_that_does_not_hold_the_windows_gives_nothing():
    assert reaching_split(MAP, 0.03, LENGTH) is None and reaching_split(MAP, 0.05, LENGTH) is not None
    assert whole_head_split(MAP.with_window(recent_size=300), 0.25, LENGTH) is None
    assert whole_head_split(MAP.with_window(recent_size=300), 0.3, LENGTH).total_retrieval == 0
    assert streaming_split(3, 3, 0.01, LENGTH, SINK) is None
    assert whole_head_split(MAP.with_window(recent_size=5000), 0.25, LENGTH) is None
    assert whole_head_split(MAP.with_window(recent_size=5000), 1.0, LENGTH).is_full


def test_whole_heads_are_ranked_by_what_the_window_costs_them():
    narrow = whole_head_split(MAP, 0.3, LENGTH)  # 2 heads: losses 4 and 3 of layer 0
    assert narrow.retrieval == ((True, True, False), (False,) * 3, (False,) * 3)
    wide = whole_head_split(MAP.with_window(recent_size=100), 0.33, LENGTH)  # 3.9 and 1.95
    assert wide.retrieval == ((False, True, False), (False, True, False), (False,) * 3)
    by_scores = whole_head_split(HeadMap(MAP.scores, SINK, 32), 0.3, LENGTH)
    assert by_scores.retrieval == ((False, True, False), (False, True, False), (False,) * 3)


def test_a_reaching_runtime_holds_its_share_at_every_length(runtimes, folder):
    row = Row("reach", str(folder / "map"), kv_share=0.4)
    splits = []
    for length in (600, LENGTH):
        runtime = runtimes.get(row, length)
        session = open_session(runtime, row, length)
        session.prefill(torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(0)).tolist())
        kv = cache_bytes(session.cache)
        assert kv["full_tokens"] == 9 * length and kv["planned"] == session.plan.cache.kv_bytes
        assert 0.4 - 1 / 9 < kv["tokens"] / kv["full_tokens"] <= 0.4
        assert kv["tokens"] == split_tokens(runtime.split, length)
        assert runtime.identity.reaches == runtime.split.reaches
        splits.append(runtime.split)
    assert splits[0] != splits[1] and {100, ALL_TOKENS} <= {reach for row in splits[1].reaches for reach in row}
    weights = runtimes.get(REFERENCE_ROW).parts.decoder.layers[0]
    assert runtime.parts.decoder.layers[0].down is weights.down  # shared
    assert runtimes.get(Row("reach", str(folder / "map"), kv_share=0.02), LENGTH) is None


def test_bytes_are_the_plans(runtimes, folder):
    full = runtimes.get(Row("full"), LENGTH).plan.cache.kv_bytes
    for asked, most in (("60%", 0.6 * full), (f"{full // 2} B", full // 2)):
        plan = runtimes.get(Row("bytes", str(folder / "map"), kv_bytes=asked), LENGTH).plan
        assert 0.8 * most < plan.cache.kv_bytes <= most and plan.capacity == LENGTH + SPARE_TOKENS
    assert runtimes.get(Row("bytes", str(folder / "map"), kv_bytes="1%"), LENGTH) is None


@pytest.mark.parametrize("size", [{"kv_share": 0.4}, {"kv_share": 0.4, "recent_size": 32}, {"kv_bytes": "60%"}, {}])
def test_rows_pay_for_the_first_tokens_that_they_keep(runtimes, folder, size):
    most = runtimes.get(Row("full"), LENGTH).plan.cache.kv_bytes
    for keep in (200, "system"):
        row = Row("kept", str(folder / "map"), keep=keep, **size)
        runtime = runtimes.get(row, LENGTH, system_size=200)
        assert runtime.split.sink_size == 200 and row.by_length == (keep == "system" or bool(size))
        if "kv_share" in size:
            assert 0.4 - 1 / 9 < split_tokens(runtime.split, LENGTH) / (9 * LENGTH) <= 0.4
        elif size:
            assert runtime.plan.cache.kv_bytes <= 0.6 * most
    assert runtimes.get(REFERENCE_ROW).split.is_full
    assert "keep" not in REFERENCE_ROW.to_dict() and row.to_dict()["keep"] == "system"
    assert ", keep system" in row.method


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"keep": 100}, "head_map full keeps everything: leave keep out"),
        ({"head_map": "m", "keep": 0}, "neither system nor a number above 0"),
        ({"head_map": "m", "keep": "much"}, "neither system nor a number above 0"),
        ({"head_map": "m", "kv_share": 0.5, "retrieval_ratio": 0.5}, "retrieval_ratio and kv_share both say"),
        ({"head_map": "m", "kv_share": 1.5}, "kv_share 1.5 must be above 0"),
        ({"kv_share": 0.5}, "head_map full keeps everything"),
        ({"head_map": "streaming", "kv_share": 0.5, "recent_size": 9}, "leave recent_size out"),
        ({"head_map": "m", "kv_share": 0.5, "sink_size": 9}, "leave sink_size out"),
        ({"head_map": "random:0", "kv_bytes": "25%"}, "need reach losses"),
        ({"head_map": "m", "kv_bytes": "25%", "recent_size": 9}, "leave sink_size, recent_size out"),
        ({"head_map": "m", "kv_bytes": "125%"}, "is no share"),
        ({"head_map": "m", "kv_bytes": "much"}, "much"),
    ],
)
def test_rows_that_contradict_themselves(row, said):
    with pytest.raises((InputError, ConfigError), match=said):
        Row("a", **row)


def test_a_map_without_losses_is_refused_before_anything_is_measured(runtimes, folder):
    plain = str(folder / "plain")
    for row in (Row("a", plain, kv_share=0.5), Row("a", plain, kv_bytes="50%")):
        with pytest.raises(HeadMapError, match="reach losses"):
            runtimes.check([row])
    runtimes.check([Row("a", plain, kv_share=0.5, recent_size=64), Row("b", "random:1", kv_share=0.5)])


def test_a_given_split_goes_with_neither_ratio_nor_bytes(folder):
    runtime = longrun.load(folder, "cpu", device="cpu", ctx=300)
    split = reaching_split(MAP, 0.4, LENGTH)
    assert runtime.derive(split).split == split and runtime.derive(split).derive(kv_format="bf16").split == split
    for more in ({"retrieval_ratio": 0.5}, {"kv_bytes": "1MB"}):
        with pytest.raises(InputError, match="head split says"):
            runtime.derive(split, **more)


def test_methods_name_what_rows_are_points_of():
    names = [
        Row("a", "x/m", kv_share=0.5), Row("a", "x/m", kv_bytes="25%"), Row("a", "x/m", kv_share=0.5, recent_size=1024),
        Row("a", "streaming", kv_share=0.5), Row("a", "random:3", kv_share=0.5),
    ]  # fmt: skip
    assert [row.method for row in names] == [
        "reaches m, k5v3", "reaches m, k5v3", "map m, window 1,024, k5v3", "all streaming, k5v3",
        "random map, window 256, k5v3",
    ]  # fmt: skip


def test_a_comparison_says_what_every_row_held_and_what_was_left_out(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_draw", lambda *_, **__: tmp_path / "no picture")  # takes seconds; see test_compare.py
    settings = tmp_path / "rows.toml"
    settings.write_text(
        """
[[row]]
name = "random"
head_map = "random:3"
kv_share = 0.7
recent_size = 100

[[row]]
name = "streaming"
head_map = "streaming"
kv_share = 0.6

[[row]]
name = "too wide"
head_map = "random:3"
kv_share = 0.2
recent_size = 400
"""
    )
    out = tmp_path / "out"
    arguments = [
        "--model", str(planted.path), "--settings", str(settings), "--lengths", "350,450", "--depths", "1", "--items",
        "1", "--tasks", "several", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    assert compare.main(arguments) == 0
    found = json.loads((out / "results.json").read_text())
    measured = {(record["row"], record["length"]): record for record in found["records"]}
    assert {row for row, _ in measured} == {"reference", "random", "streaming"} and len(measured) == 6
    for length in (350, 450):
        kv = measured["streaming", length]["kv"]
        assert kv["tokens"] / kv["full_tokens"] == pytest.approx(0.6, abs=0.03)  # a prompt is a little shorter
        assert measured["streaming", length]["split"]["heads"] == {str(int(0.6 * length) - 64): 8}
    assert measured["random", 350]["split"] != measured["random", 450]["split"]
    text = (out / "report.md").read_text()
    assert "| tokens held | KV planned |" in text and "100.0%" in text
