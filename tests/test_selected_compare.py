"""Rows and benchmarks that select pages: what they ask for, how they are read, the bytes they count."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.errors import InputError
from longrun.lab.quality.measures import Opened, measure_retrieval
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.settings import read_rows
from longrun.lab.quality.tasks import retrieval_documents
from longrun.needles.needles import Haystack
from longrun.session.session import Session
from scripts.bench import bench_decode
from scripts.quality import compare_runtimes as script

SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 192}


def test_rows_name_what_they_select(tmp_path):
    (tmp_path / "rows.toml").write_text('[[row]]\nname = "few"\nselect = 64\nselect_question = true\n')
    (row,) = read_rows(tmp_path / "rows.toml")
    assert (row.select, row.select_question) == (64, True)
    assert row.method == "full, select 64 with questions, k5v3"
    assert row.to_dict()["select"] == 64 and row.to_dict()["select_question"] is True
    assert not {"select", "select_question"} & REFERENCE_ROW.to_dict().keys()
    for fields, words in (
        ({"select": 4}, "row r: select 4 is too small: it must be at least 5"),
        ({"select": "64"}, "row r: select '64' is neither a number of pages nor a share like \"25%\""),
        ({"select": 0.25}, "select is 0.25, which is of the wrong type"),
        ({"select": True}, "select is True, which is of the wrong type"),
        ({"select_question": 1, "select": 9}, "select_question is 1, which is of the wrong type"),
        ({"select_question": True}, "select_question needs pages to select: give select as well"),
        ({"select": 9, "kv": "bf16"}, "select needs kv int4 or k5v3, not bf16"),
        ({"select": 9, "head_map": "streaming"}, "head_map streaming has no pages to select"),
    ):
        with pytest.raises(InputError, match=words):
            Row("r", **fields)


def test_runtimes_of_rows_select(tmp_path):
    save_tiny(tmp_path, "llama", **SHAPE)
    runtimes = script.Runtimes(tmp_path, None, script.comparison_budget(None, "cpu", 50), "cpu", capacity=800)
    rows = (
        Row("a", select=5),
        Row("b", "random:1", kv_share=0.6, select=6),
        Row("c", weights="int8", select=7),
        Row("d"),
        Row("e", select="12.5%"),
    )
    found = [runtimes.get(row, 700).plan.attention.selection for row in rows]
    assert [selection and selection.asked for selection in found] == ["5", "6", "7", None, "12.5%"]


@pytest.mark.parametrize("select_question", [False, True])
def test_answers_are_read_token_by_token(planted, monkeypatch, select_question):
    row = Row("few", select=8, select_question=select_question)
    runtime = longrun.load(planted.path, "cpu", "full", device="cpu", ctx=900, select=8, select_from=0)
    documents = list(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 600, [0.5], 1, 3))
    asked = []
    for name in ("prefill", "score"):
        method = getattr(Session, name)

        def noted(self, token_ids, *more, one_by_one=False, method=method, name=name, **others):
            asked.append((name, len(token_ids) > 100, one_by_one))
            return method(self, token_ids, *more, one_by_one=one_by_one, **others)

        monkeypatch.setattr(Session, name, noted)
    items = measure_retrieval(runtime, row, Opened.of(runtime, row, 700), documents, lambda name: None)["items"]
    assert all(item["exact"] for item in items)  # no head has more than 8 pages here
    assert set(asked) == {("prefill", True, False), ("prefill", False, select_question), ("score", False, True)}


def test_a_selected_token_reads_fewer_bytes(tmp_path):
    save_tiny(tmp_path, "llama", **SHAPE)
    session = longrun.load(tmp_path, "cpu", device="cpu", ctx=1000, select=5, select_from=0).new_session()
    session.prefill(torch.zeros(900, dtype=torch.int64))
    plan, cache = session.plan, session.cache
    spec, heads = cache.spec, 9
    arguments = session._engine.decoder.config, "fp32", "cpu", spec, 900
    dense, few = (bench_decode.token_bytes(*arguments, selection) for selection in (None, plan.attention.selection))
    held = cache.layers[0][0].num_pooled
    assert few["page_payloads"] == heads * 5 * spec.page_format.payload_bytes < dense["page_payloads"]
    assert few["page_index"] == heads * 5 * spec.page_format.index_bytes
    assert few["page_digests"] == sum(pages.digest[:, :held].nbytes for pages, _ in cache.layers)
    assert "page_digests" not in dense and few["weights"] == dense["weights"]
