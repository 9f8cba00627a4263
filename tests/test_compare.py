"""The quality harness: what it measures, on a model that retrieves by construction; resuming; intervals by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import longrun
from longrun.errors import InputError
from longrun.needles import Haystack
from longrun.patterns.head_map import HeadMap
from longrun.planted import NOTE, make_planted_model
from longrun.quality.measures import (
    SPARE_TOKENS,
    cache_bytes,
    compare_blocks,
    greedy_choices,
    measure_retrieval,
    open_session,
)
from longrun.quality.report import BYTES_PICTURE, RATIO_PICTURE
from longrun.quality.results import QualityResults
from longrun.quality.settings import REFERENCE_ROW, Row, read_rows
from longrun.quality.statistics import wilson
from longrun.quality.summary import families, summarize
from longrun.quality.tasks import held_out_text, leading_ids, retrieval_documents, text_documents

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 700

ROWS = """
[[row]]
name = "map"
head_map = "{map}"
retrieval_ratio = 0.125

[[row]]
name = "inverted"
head_map = "inverted:{map}"
retrieval_ratio = 0.5

[[row]]
name = "streaming"
head_map = "streaming"

[[row]]
name = "random a"
head_map = "random:{misses[0]}"
retrieval_ratio = 0.25

[[row]]
name = "random b"
head_map = "random:{misses[1]}"
retrieval_ratio = 0.25

[[row]]
name = "SnapKV all"
kv = "bf16"
eviction = "snapkv:100%"

[[row]]
name = "TOVA 10%"
kv = "bf16"
eviction = "tova:10%"

[[row]]
name = "again"
kv = "bf16"
chunk_size = 100
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return make_planted_model(tmp_path_factory.mktemp("compare") / "planted")


@pytest.fixture(scope="module")
def misses(planted) -> list[int]:
    """Seeds of random maps that do not keep the one head that retrieves."""
    from longrun.patterns.baseline_maps import random_map

    layer, head = planted.retrieval_head
    shape = planted.shape.num_layers, planted.shape.num_kv_heads
    return [
        seed for seed in range(30) if not random_map(*shape, seed).split(retrieval_ratio=0.25).retrieval[layer][head]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def settings_file(planted, misses, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "rows.toml"
    path.write_text(ROWS.format(map=planted.head_map, misses=misses))
    return path


def options(planted, settings_file, out, *more) -> list[str]:
    return [
        "--model", str(planted.path), "--settings", str(settings_file), "--lengths", str(LENGTH), "--depths", "3",
        "--items", "1", "--texts", "1", "--score-tokens", "48", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(script, planted, settings_file, tmp_path_factory) -> Path:
    """One run of everything."""
    out = tmp_path_factory.mktemp("whole")
    assert script.main(options(planted, settings_file, out)) == 0
    return out


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def items(found: dict, row: str, task: str) -> list[dict]:
    return [item for r in found["records"] if r["row"] == row for item in r["items"] if item.get("task") == task]


def test_the_right_map_keeps_everything_and_the_others_miss_what_is_beyond_the_window(whole):
    found = read(whole)
    for task in ("passkey", "needle", "several", "keyvalue"):
        for row in ("reference", "map", "SnapKV all"):
            asked = items(found, row, task)
            assert sorted(item["depth"] for item in asked) == [0.0, 0.5, 1.0]
            assert all(item["exact"] and item["token_accuracy"] == 1 for item in asked), (row, task)
        for row in ("inverted", "streaming", "random a", "random b"):
            by_depth = {item["depth"]: item["exact"] for item in items(found, row, task)}
            assert by_depth == {0.0: True, 0.5: False, 1.0: True}, (row, task)  # sinks and window see the ends
        assert not any(item["exact"] for item in items(found, "TOVA 10%", task) if item["depth"] == 0.5)
        questions = [[item["expected"] for item in items(found, row["name"], task)] for row in found["rows"]]
        assert all(one == questions[0] for one in questions)  # the same for every row
    described = found["described"]
    assert (described["map"]["retrieval_heads"], described["streaming"]["retrieval_heads"]) == (1, 0)
    assert described["reference"]["kv_format"] == "bf16" and described["map"]["kv_format"] == "int4"


def test_the_report_says_so(whole):
    report = (whole / "report.md").read_text()
    assert NOTE in report
    lines = {line[2:].split(":")[0]: line for line in report.splitlines() if line.startswith("- ")}
    assert "exact 100%" in lines["map"] and "no difference to the reference seen" in lines["map"]
    for name in ("inverted", "streaming", "random a", "TOVA 10%", "random map, int4, 25% of heads (2 rows)"):
        assert "worse than the reference" in lines[name], lines[name]
    assert "exact 67%" in lines["streaming"]
    assert "-33.3 [" in lines["streaming"]
    for name in (BYTES_PICTURE, RATIO_PICTURE):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    summary = {row["name"]: row for row in read(whole)["summary"]}
    assert summary["streaming"]["tasks"]["needle"]["by_depth"]["0.5"]["value"] == 0
    assert summary["map"]["kv_used"] < 0.6 * summary["reference"]["kv_used"]
    assert summary["TOVA 10%"]["kv_peak"] < 0.25 * summary["reference"]["kv_used"]
    assert summary["SnapKV all"]["kv_peak"] >= summary["SnapKV all"]["kv_used"] > 0.9 * summary["reference"]["kv_used"]


def test_text_is_compared_with_the_reference_distribution(whole):
    found = read(whole)
    blocks = {
        r["row"]: r["items"] for r in found["records"] if r["group"] == "text"
    }  # fmt: skip
    for row, measured in blocks.items():
        assert [block["tokens"] for block in measured] == [32, 16], row
    assert all(block["kl"] == 0 and block["top1"] == 1 for block in blocks["reference"])
    for row in ("SnapKV all", "again"):
        assert all(block["kl"] < 1e-5 and block["top1"] == 1 for block in blocks[row])
    described = found["described"]
    assert described["again"]["chunk_size"] == 100 < described["reference"]["chunk_size"]
    assert described["again"]["method"] == "full, bf16, chunks of 100"
    assert max(block["kl"] for block in blocks["TOVA 10%"]) > 1e-3
    assert (whole / "reference" / f"{LENGTH}-0.npy").stat().st_size == 48 * 4096 * 4 + 128


def untimed(record: dict) -> dict:
    return {key: value for key, value in record.items() if "seconds" not in key and "per_s" not in key}


def test_a_stopped_run_goes_on_and_only_new_rows_are_measured(
    script, planted, settings_file, whole, tmp_path, monkeypatch
):
    rows = settings_file.read_text().split("[[row]]")
    two, three = tmp_path / "two.toml", tmp_path / "three.toml"
    two.write_text("[[row]]".join(rows[:3]))
    three.write_text("[[row]]".join(rows[:4]))
    more = ["--tasks", "several,text"]
    arguments = options(planted, two, tmp_path / "out", *more)
    monkeypatch.setattr("longrun.quality.report._draw", lambda *given, **named: Path("picture"))
    add = QualityResults.add

    def stopping(self, record):
        add(self, record)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QualityResults, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    before = read(tmp_path / "out")["records"]
    assert [(r["row"], r["group"]) for r in before][-1] == ("map", "several")
    assert script.main(arguments) == 0
    assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    found = read(tmp_path / "out")
    assert found["records"][:3] == before
    expected = [untimed(record) for record in read(whole)["records"] if record["group"] in ("several", "text")]
    assert [untimed(record) for record in found["records"]] == expected[:8]
    # nothing is missing: only the report is written again
    (tmp_path / "out" / "report.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(script, "measure_retrieval", None)
        assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    assert (tmp_path / "out" / "report.md").exists()
    with pytest.raises(InputError, match=r"row streaming = .* --force"):
        script.main(arguments)
    with pytest.raises(InputError, match="seed = 0, now it is 1"):
        script.main(options(planted, three, tmp_path / "out", *more, "--seed", "1"))
    # the reference's distributions were deleted: its text is measured again for the next row
    measured = []

    def noting(self, record):
        measured.append((record["row"], record["group"]))
        add(self, record)

    monkeypatch.setattr(QualityResults, "add", noting)
    (tmp_path / "out" / "reference" / f"{LENGTH}-0.npy").unlink()
    assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    assert measured == [("reference", "text")]


@pytest.fixture(scope="module")
def runtime(planted):
    return longrun.load(planted.path, "cpu", planted.head_map, device="cpu", ctx=900, retrieval_ratio=0.125)


def test_exact_match_is_what_greedy_generation_gives(planted, misses):
    """Beside another way to the same answer: generate, decode and compare the digits."""
    row = Row("random", f"random:{misses[0]}", 0.25)
    runtime = longrun.load(
        planted.path, "cpu", row.make_map(2, 4), device="cpu", ctx=800, retrieval_ratio=row.retrieval_ratio
    )  # fmt: skip
    documents = list(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 600, [0.3, 0.9], 2, 3))
    measured = measure_retrieval(runtime, row, 600, documents, lambda name: None)["items"]
    exact = []
    for document in documents:
        for question in document.prompt.questions:
            session = runtime.new_session(700)
            session.prefill([*document.prompt.document_ids, *question.token_ids])
            text = runtime.tokenizer.decode(list(session.generate(len(question.expected_ids) + 3)))
            exact.append(question.needle.matches(text))
    assert [item["exact"] for item in measured] == exact
    assert set(exact) == {True, False}
    assert all(item["token_accuracy"] < 1 for item in measured if not item["exact"])


def test_choices_in_one_chunk_are_those_along_one_token_after_another(runtime):
    """Also where the answer ends one page and begins the next, and after a rewind."""
    document = next(iter(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 600, [0.9], 1, 3)))
    question = document.prompt.questions[0]
    session = open_session(runtime, Row("map", "unused"), 700)
    session.prefill(document.prompt.document_ids)
    found = []
    for filled in (0, 60 - (session.seq_len + len(question.token_ids)) % 64):
        if filled > 0:
            session.prefill(document.prompt.document_ids[-filled:])
        mark = session.mark()
        session.prefill(question.token_ids)
        one_by_one = [int(session.logits.argmax())]
        one_by_one += [int(session.prefill([token]).argmax()) for token in question.expected_ids]
        session.rewind(mark)
        session.prefill(question.token_ids)
        at_once, after = greedy_choices(session, question.expected_ids)
        assert [*at_once, after] == one_by_one
        found.append(at_once == list(question.expected_ids))
    assert session.seq_len % 64 < 60 and found == [True, True]
    wrong = [(token + 1) % 90 for token in question.expected_ids]
    session.rewind(mark)
    session.prefill(question.token_ids)
    assert greedy_choices(session, wrong)[0] != wrong  # the failing side


def test_documents_hold_their_facts_once_and_fit(runtime):
    tokenizer, haystack = runtime.tokenizer, Haystack.generated(0)
    for task, count in (("single", 4), ("several", 2), ("keyvalue", 2)):
        made = list(retrieval_documents(tokenizer, haystack, task, 500, [0.0, 1.0], 2, seed=0))
        again = list(retrieval_documents(tokenizer, Haystack.generated(0), task, 500, [0.0, 1.0], 2, seed=0))
        assert made == again and len(made) == count
        for document in made:
            text = tokenizer.decode(document.prompt.document_ids)
            assert 400 < document.prompt.num_tokens <= 500
            for question in document.prompt.questions:
                digits = " ".join(question.needle.key)
                assert text.count(digits) == (2 if not question.needle.name else 1)  # a pass key is said twice
        asked = [(name, q.depth) for d in made for name, q in zip(d.tasks, d.prompt.questions, strict=True)]
        for name in {name for name, _ in asked}:
            assert sorted(depth for other, depth in asked if other == name) == [0.0, 0.0, 1.0, 1.0]


def test_texts_are_spread_over_the_source(runtime):
    ids = list(range(1000))
    assert [doc[0] for doc in text_documents(ids, 100, 3)] == [0, 450, 900]
    assert [len(doc) for doc in text_documents(ids, 100, 3)] == [100] * 3
    assert text_documents(ids, 1000, 1) == [ids]
    assert text_documents(ids, 4, 2, before=[-1]) == [[-1, 0, 1, 2], [-1, 997, 998, 999]]
    assert leading_ids(runtime.tokenizer) == []

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 7, 2] if add_special_tokens else [7]}

    assert leading_ids(tokenizer) == [1]
    with pytest.raises(InputError, match="1,000 tokens and 1,001 are needed"):
        text_documents(ids, 1001, 1)
    assert len(held_out_text()) > 300_000 and held_out_text(["a", "b"]) == "a\n\nb"


def test_bytes_in_use_are_those_of_the_tokens_held(runtime):
    row = Row("map", "unused")
    session = open_session(runtime, row, 700)
    session.prefill(list(range(3, 603)))
    # one retrieval head: page 0 and the tail exact (bf16), 8 INT4 pages; 7 streaming heads with full rings of 64 + 256
    head_dim, page = 64, 64
    exact = 2 * page * head_dim * 2
    int4 = page * head_dim + page * 4 + head_dim * 4 + 4  # nibbles, value scales, key scales, table entry
    rings = 7 * 320 * 2 * head_dim * 2
    assert session.seq_len == 600
    assert cache_bytes(session.cache)["used"] == 2 * exact + 8 * int4 + rings
    assert cache_bytes(session.cache)["allocated"] == session.cache_bytes == session.plan.cache_bytes
    assert session.capacity == 700 + SPARE_TOKENS


def test_blocks_by_hand():
    generator = torch.Generator().manual_seed(0)
    own, reference = (torch.randn(40, 11, generator=generator).log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 11, (40,), generator=generator).tolist()
    blocks = compare_blocks(own, reference, ids)
    assert [block["tokens"] for block in blocks] == [32, 8]
    for block, rows in zip(blocks, (range(32), range(32, 40)), strict=True):
        kl = [sum(math.exp(p) * (p - q) for p, q in zip(*pair, strict=True)) for pair in
              ((reference[row].tolist(), own[row].tolist()) for row in rows)]  # fmt: skip
        assert block["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-5)
        assert block["nll"] == pytest.approx(-sum(float(own[row, ids[row]]) for row in rows) / len(rows), rel=1e-5)
        same = [int(own[row].argmax()) == int(reference[row].argmax()) for row in rows]
        assert block["top1"] == pytest.approx(sum(same) / len(same))
    assert 0 < blocks[0]["top1"] < 1


def test_seeds_are_taken_together_a_question_at_a_time(tmp_path):
    settings = {"lengths": [100], "tasks": ["single"]}
    results = QualityResults.open(
        tmp_path, settings, [Row(n, f"random:{i}", 0.5).to_dict() for i, n in enumerate("abc")]
    )
    results.head["described"] = {n: {"method": "random map, int4", "retrieval_ratio": 0.5} for n in "abc"}
    kv = {"used": 1, "peak": 1}
    for name, right in zip("abc", (1, 1, 0), strict=True):
        asked = [
            {"task": "needle", "document": f"d/{i}", "depth": 0.5, "expected": str(i), "exact": bool(right and i % 2)}
            for i in range(10)
        ]
        asked = [item | {"token_accuracy": float(item["exact"])} for item in asked]
        results.add({"row": name, "length": 100, "group": "single", "items": asked, "kv": kv})
    ((label, names),) = families(results).items()
    assert names == ["a", "b", "c"] and "50% of heads (3 rows)" in label
    together = summarize(results, names, label, 100).tasks["all"]
    assert together.exact.count == 10 and together.exact.value == pytest.approx(1 / 3)
    assert summarize(results, ["a"], "a", 100).tasks["all"].exact == wilson(5, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"must hold \[\[row\]\]"),
        ("[[row]", "is not TOML"),
        ("x = 1\n[[row]]\nname = 'a'", r"must hold \[\[row\]\]"),
        ("[[row]]\nkv = 'int4'", "row 1 has no name"),
        ("[[row]]\nname = 'a'\nratio = 0.5", "ratio is unknown"),
        ("[[row]]\nname = 'reference'", "'reference' is taken"),
        ("[[row]]\nname = 'a'\n[[row]]\nname = 'a'", "'a' is taken"),
        ("[[row]]\nname = 'a'\nkv = 'int3'", "kv 'int3' is unknown"),
        ("[[row]]\nname = 'a'\nweights = 'int3'", "weights 'int3' is unknown"),
        ("[[row]]\nname = 'a'\nretrieval_ratio = '1'", "wrong type"),
        ("[[row]]\nname = 'a'\nhead_map = 'random'\nretrieval_ratio = 0.5", "no seed"),
        ("[[row]]\nname = 'a'\nhead_map = 'random:1'", "needs a retrieval_ratio"),
        ("[[row]]\nname = 'a'\nhead_map = 'inverted'", "names no map"),
        ("[[row]]\nname = 'a'\nretrieval_ratio = 0.5", "nothing to choose"),
        ("[[row]]\nname = 'a'\nsink_size = 4", "full has no streaming heads"),
        ("[[row]]\nname = 'a'\nchunk_size = 0", "chunk_size 0 must be at least 1"),
        ("[[row]]\nname = 'a'\nchunk_size = '1K'", "wrong type"),
        ("[[row]]\nname = 'a'\neviction = 'h2o:5'\nkv = 'bf16'", "eviction 'h2o:5' is unknown"),
        ("[[row]]\nname = 'a'\neviction = 'tova:5@document'\nkv = 'bf16'", "is unknown"),
        ("[[row]]\nname = 'a'\neviction = 'tova:2.5'\nkv = 'bf16'", "no whole number"),
        ("[[row]]\nname = 'a'\neviction = 'tova:5'", "use kv bf16"),
        ("[[row]]\nname = 'a'\nhead_map = 'streaming'\neviction = 'tova:5'\nkv = 'bf16'", "use head_map full"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, said):
    path = tmp_path / "rows.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_rows(path)


def test_the_shipped_settings_can_be_read():
    rows = read_rows(ROOT / "scripts" / "compare_settings.toml")
    assert {"full int4", "all streaming", "SnapKV 25%", "TOVA 50%"} <= {row.name for row in rows}
    assert rows[:2] == (Row("reference again", kv="bf16", chunk_size=1000), Row("full int4"))
    evicts = {row.name: row.evicts for row in rows}["SnapKV 25%"]
    assert evicts.keep_tokens(4096) == 1024 and not evicts.at_document
    assert Row("a", kv="bf16", eviction="snapkv:7@document").evicts.keep_tokens(9999) == 7
    assert REFERENCE_ROW.kv == "bf16" and REFERENCE_ROW.head_map == "full" and REFERENCE_ROW.evicts is None


def test_maps_of_rows(planted):
    own = HeadMap.load(planted.head_map)
    assert Row("a", str(planted.head_map)).make_map(2, 4) == own
    assert Row("a", f"inverted:{planted.head_map}").make_map(2, 4).scores[0][0] == 1 - own.scores[0][0]
    made = Row("a", "random:3", 0.5, sink_size=5, recent_size=70).make_map(2, 4)
    assert (made.sink_size, made.recent_size) == (5, 70)
    assert Row("a").make_map(2, 4) == "full"
    other = Row("a", str(planted.head_map), sink_size=5, recent_size=70)
    assert other.make_map(2, 4) == own.with_window(5, 70) != own
    assert Row("a", f"inverted:{planted.head_map}", recent_size=70).make_map(2, 4).sink_size == own.sink_size
    assert (Row("a", "x", 0.5).method, Row("a", "x", 0.5, sink_size=5).method) == (
        "map x, int4", "map x, int4, varied window"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--items", "0"], "--items 0"),
        (["--tasks", "poems"], "'poems' is unknown"),
        (["--score-tokens", "700"], "leaves nothing to read"),
        (["--text", "no-such-file.txt"], "no-such-file.txt is not a file"),
        (["--adapter", "no-such-folder"], "no-such-folder is not a folder"),
    ],
)
def test_bad_arguments(script, planted, settings_file, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        script.main(options(planted, settings_file, tmp_path / "out", *more))


def test_the_adapter_reaches_every_row_and_decides_the_settings(script, planted, settings_file, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    given = []

    def load(*_, **named):
        given.append(named["adapter"])
        raise KeyboardInterrupt

    monkeypatch.setattr(longrun, "load", load)
    arguments = options(planted, settings_file, tmp_path / "out", "--adapter", str(adapter))
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments)
    assert given == [adapter]
    before = script._folder_checksum(adapter)
    (adapter / "adapter_config.json").write_text("{ }")
    assert script._folder_checksum(adapter) != before
