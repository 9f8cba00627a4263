"""Rows, sweeps and benchmarks that read sparsely: what they ask for, what they read how, and what they record."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_needle_sweep import options, sweep
from tiny_models import save_tiny

import longrun
from longrun.errors import InputError
from longrun.lab.needle_report import panel_title
from longrun.lab.quality.measures import Opened, measure_retrieval, measure_text
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.settings import read_rows
from longrun.lab.quality.tasks import retrieval_documents
from longrun.needles.needles import Haystack
from longrun.session.session import Session
from longrun.specs.prefill_spec import PrefillSpec
from scripts.bench import bench_prefill
from scripts.bench import command as bench
from scripts.quality import compare_runtimes as script

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 192}
SPEC = PrefillSpec(mass=0.9, dense_tokens=100, dense_end=100, newest=1, floor=2, least=0, cap=0.5)


def test_rows_name_how_documents_are_read(tmp_path):
    (tmp_path / "rows.toml").write_text(
        '[[row]]\nname = "few"\nprefill = "sparse"\nprefill_mass = 0.9\nprefill_dense = "64K"\nprefill_least = 0.08\n'
        "prefill_cap = 0.08\n"
    )
    (row,) = read_rows(tmp_path / "rows.toml")
    assert row.sparse == PrefillSpec(mass=0.9, dense_tokens=64_000, least=0.08, cap=0.08)
    assert row.method == "full, read sparsely, k5v3" and row.to_dict()["prefill_cap"] == 0.08
    assert Row("r", prefill="sparse", prefill_rows=4, prefill_end=9, prefill_correct=True).sparse == PrefillSpec(
        rows=4, dense_end=9, correct=True
    )
    assert row.read_exactly == Row("few")
    assert Row("r", prefill="sparse", prefill_dense=0).sparse == PrefillSpec(dense_tokens=0)
    assert Row("r", prefill="exact").sparse is REFERENCE_ROW.sparse is None
    assert not any(name.startswith("prefill") for name in REFERENCE_ROW.to_dict())
    for fields, words in (
        ({"prefill": "dense"}, "row r: prefill 'dense' is unknown: use exact or sparse"),
        ({"prefill": True}, "prefill is True, which is of the wrong type"),
        ({"prefill_mass": 0.9}, "row r: prefill_mass is for prefill sparse: give that as well"),
        ({"prefill": "exact", "prefill_dense": 5}, "row r: prefill_dense is for prefill sparse"),
        ({"prefill": "sparse", "prefill_mass": 1}, "row r: mass 1 is outside the range"),
        ({"prefill": "sparse", "prefill_mass": "0.9"}, "prefill_mass is '0.9', which is of the wrong type"),
        ({"prefill": "sparse", "prefill_dense": "x"}, "row r: prefill_dense 'x' is not a number with a known unit"),
        ({"prefill": "sparse", "prefill_dense": -1}, "row r: prefill_dense -1 is too small"),
        ({"prefill": "sparse", "prefill_least": 1.5}, "row r: least 1.5 is outside the range"),
        ({"prefill": "sparse", "prefill_cap": 0}, "row r: cap 0 is outside the range"),
        ({"prefill": "sparse", "prefill_rows": 3}, "row r: rows '3' is unknown"),
        ({"prefill": "sparse", "prefill_end": 0}, "row r: dense_end 0 is too small"),
        ({"prefill_correct": True}, "row r: prefill_correct is for prefill sparse"),
        ({"prefill": "sparse", "prefill_correct": 1}, "prefill_correct is 1, which is of the wrong type"),
        ({"prefill": "sparse", "head_map": "streaming"}, "row r: head_map streaming has no pages to choose"),
        ({"prefill": "sparse", "kv": "bf16", "eviction": "snapkv:50%"}, "evicting and simulated caches read exactly"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            Row("r", **fields)


def test_the_rows_that_are_shipped():
    rows = {row.name: row for row in read_rows(ROOT / "scripts" / "quality" / "compare_prefill.toml")}
    shares = {name: row.sparse.cap for name, row in rows.items() if row.sparse and row.sparse.mass is None}
    assert set(shares.values()) == {0.08, 0.15, 0.25, 0.4}
    assert all(name.startswith(f"{share:.0%}") for name, share in shares.items())
    assert rows["8% corrected"].sparse == replace(rows["8%"].sparse, correct=True)
    assert rows["8% corrected"].method == "full, read sparsely, corrected, k5v3, chunks of 4,096"
    assert all(row.sparse.dense_tokens == 0 for row in rows.values() if row.sparse)


def test_runtimes_of_rows_read_sparsely(tmp_path):
    save_tiny(tmp_path, "llama", max_position_embeddings=4096, **SHAPE)
    runtimes = script.Runtimes(tmp_path, None, script.comparison_budget(None, "cpu", 50), "cpu", capacity=3000)
    how = {"prefill": "sparse", "prefill_dense": 0}
    rows = (
        Row("a", prefill_mass=0.8, **how),
        Row("b", "random:1", kv_share=0.6, recent_size=50, **how),
        Row("c", weights="int8", **how),
        Row("d"),
    )
    found = [runtimes.get(row, 2900).plan.attention.prefill for row in rows]
    sparse = PrefillSpec(dense_tokens=0)
    assert found == [replace(sparse, mass=0.8), sparse, sparse, None]


def test_documents_are_read_sparsely_questions_exactly_and_rows_say_so(planted, monkeypatch):
    runtime = longrun.load(planted.path, "cpu", "full", device="cpu", ctx=1500, chunk_size=128, prefill=SPEC)
    documents = list(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 1200, [0.5], 1, 3))
    asked, prefill = [], Session.prefill

    def noted(self, token_ids, *more, sparse=True, **others):
        asked.append((len(token_ids) > 100, sparse))
        return prefill(self, token_ids, *more, sparse=sparse, **others)

    monkeypatch.setattr(Session, "prefill", noted)
    row = Row("sparse", prefill="sparse")
    found = measure_retrieval(runtime, row, Opened.of(runtime, row, 1300), documents, lambda name: None)
    assert set(asked) == {(True, True), (False, False)}
    assert 0 < found["read_sparsely"]["read_share"] < 1 and 0 < found["read_sparsely"]["caught_share"] <= 1
    exact = runtime.derive(prefill="exact")
    found = measure_retrieval(exact, row, Opened.of(exact, row, 1300), documents, lambda name: None)
    assert "read_sparsely" not in found


def test_a_scored_text_is_read_exactly(planted, tmp_path):
    from longrun.lab.quality.measures import ReferenceLogits

    runtime = longrun.load(planted.path, "cpu", "full", device="cpu", ctx=1500, chunk_size=128, prefill=SPEC)
    row, ids = Row("sparse", prefill="sparse"), torch.arange(1200) % 60
    opened = Opened.of(runtime, row, 1200)
    found = measure_text(
        row, opened, 1200, [ids.tolist()], 300, ReferenceLogits(tmp_path), True, lambda name: None
    )  # fmt: skip
    assert 500 < opened.session.sparse_tokens <= 1200 - 300 - 100 - 100 and found["read_sparsely"]["pages"] > 0


def test_a_sweep_records_what_was_read(planted, tmp_path):
    more = ["--prefill", "sparse", "--prefill-dense", "0", "--prefill-mass", "0.9", "--control", "full"]
    arguments = options(planted, tmp_path / "out", *more, "--depths", "1", "--needles", "1", lengths="4K")
    assert sweep.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["settings"]["prefill"], found["settings"]["prefill_dense"]) == ("sparse", 0)
    assert found["main"]["prefill"]["mass"] == 0.9 and found["control"]["prefill"] is None
    cells = {cell["setting"]: cell for cell in found["cells"]}
    read = cells["main"]["read_sparsely"]
    assert 0 < read["sparse_tokens"] < 2000 and 0 < read["read_share"] <= 1 and "read_sparsely" not in cells["control"]
    assert "pages, read sparsely (90%), " in panel_title("m", "main", found["main"])
    with pytest.raises(InputError, match="--prefill-dense 'x' is not a number"):
        sweep.main([*options(planted, tmp_path / "no"), "--prefill", "sparse", "--prefill-dense", "x"])


def test_operations_of_a_sparse_read_are_those_that_were_done():
    dense = {"linear": 7.0, "retrieval_attention": 1e10, "streaming_attention": 3.0}
    found = bench_prefill.sparse_flops(dense, head_dim=128, page_size=64, rows=1, pages_read=15, pages=200)
    assert found["retrieval_attention"] == 1e10 - 4 * 128 * 128 * 64 * (200 - 15)
    assert found["choosing"] == 2 * 128 * 64 * 200 and (found["linear"], found["streaming_attention"]) == (7.0, 3.0)


def test_the_prefill_benchmark(tmp_path, capsys, monkeypatch):
    fixed = {"matmul_tflops": 0.1, "attention_tflops": 0.05}
    monkeypatch.setattr(bench_prefill, "measure_ceilings", lambda *_: fixed)
    save_tiny(tmp_path / "m", "llama", max_position_embeddings=8192, **SHAPE)
    shared = ["prefill", "--model", str(tmp_path / "m"), "--device", "cpu", "--lengths", "4K", "--chunk-size", "512"]
    rows = []
    for more in ([], ["--prefill", "sparse", "--prefill-dense", "512"]):
        assert bench.main([*shared, *more]) == 0
        out = capsys.readouterr().out
        result = json.loads(out.splitlines()[-1])
        rows += result["rows"]
        assert (result["settings"]["prefill"] is None) == (not more)
        assert ("caught)" in out) == bool(more)
    dense, sparse = rows
    read = sparse["read_sparsely"]
    assert 4000 - 2048 - 512 - 128 < read["sparse_tokens"] <= 4000 - 2048 - 512 + 512
    assert 0 < read["read_share"] < 1 and 0 < read["caught_share"] <= 1 and "read_sparsely" not in dense
    assert sparse["dense_flops"] == dense["flops"] and sparse["flops"]["choosing"] > 0
    assert sparse["flops"]["retrieval_attention"] < dense["flops"]["retrieval_attention"]
    assert bench.main([*shared, "--prefill", "sparse", "--prefill-dense", "512", "--prefill-share", "0.3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["settings"]["prefill"]["cap"], result["settings"]["prefill"]["mass"]) == (0.3, None)
    for more, said in (
        (["--prefill-mass", "0.9"], "prefill_mass 0.9 is for sparse prefill"),
        (["--prefill-share", "0.1"], "prefill_share '0.1' is for sparse prefill, and texts are read exactly"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            bench.main([*shared, *more])
