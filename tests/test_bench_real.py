"""`bench.py real` in small: a tiny GGUF file read by longrun and by transformers, parts, text and questions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from child_parts import killed, refused, two_things
from tiny_models import tiny_model

from longrun.errors import InputError
from scripts.bench import bench_real, ceilings, real_parts
from scripts.bench import command as bench
from scripts.bench.real_parts import GgufPeer, in_child
from scripts.bench.real_text import QUESTIONS, CodeChat, Question, as_questions, read_code
from scripts.tiny_gguf import write_gguf

CEILINGS = {"memory_tb_s": 0.01, "matmul_tflops": 0.1, "attention_tflops": 0.05}
SHAPE = {"hidden_size": 96, "intermediate_size": 128, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    (folder / "words.txt").write_text("thewordsofthetext" * 40)
    return write_gguf(folder / "tiny.gguf", tiny_model("qwen2", **SHAPE), tokenizer="gpt2")


@pytest.fixture
def one_process(monkeypatch):
    """The parts in this process, with ceilings that nothing waits for."""
    monkeypatch.setattr(bench_real, "in_child", lambda part, *arguments: part(*arguments))
    monkeypatch.setattr(
        ceilings, "MEASURES", {name: ((lambda device, key=key: {key: CEILINGS[key]}), name)
                               for name, key in zip(("memory", "matmul", "attention"), CEILINGS, strict=True)}
    )  # fmt: skip
    ceilings.measured.cache_clear()
    yield
    ceilings.measured.cache_clear()


def run(capsys, tmp_path, gguf: Path, *argv: str) -> dict:
    file = tmp_path / "result.json"
    given = ("--model", gguf, "--text", gguf.with_name("words.txt"), "--device", "cpu", "--json", file)
    quick = ("--lengths", "100,300", "--new-tokens", "3", "--question", "Which?", "--expect", "zzz")
    assert bench.main(["real", *map(str, (*given, *quick, *argv))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text()) == result and result["complete"] is True
    return result


def test_all_of_it_in_one_run(gguf, capsys, tmp_path, one_process):
    result = run(capsys, tmp_path, gguf, "--weight-formats", "int4,fp32", "--kv", "fp32", "--yarn", "2")
    runners = ["longrun int4 weights", "longrun fp32 weights", "transformers float32, SDPA, full attention"]
    assert [load["runner"] for load in result["loads"]] == runners
    assert [(row["runner"], row["length"]) for row in result["rows"]] == [(r, n) for r in runners for n in (100, 300)]
    for load in result["loads"]:
        assert load["peak_resident_bytes"] > 10**7 and sum(load.get("phases", {0: load["seconds"]}).values()) == (
            pytest.approx(load["seconds"])
        )
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["length"] / row["seconds"])
        assert len(row["ms_tokens"]) == 3 and row["floor_over_measured"] == row["floor_ms"] / row["ms"]["median"]
        assert row["of_matmul_and_attention"] > 0
    assert result["rows"][0]["bytes"]["weights"] < result["rows"][2]["bytes"]["weights"]
    assert result["rows"][4]["bytes"]["weights"] == result["rows"][2]["bytes"]["weights"]
    assert result["rows"][0]["memory"]["plan_device_bytes"] > 0
    assert [(a["length"], a["right"]) for a in result["answers"]] == [(100, False), (300, False)] * 3
    said = [answer["answer"] for answer in result["answers"]]
    assert said[2:4] == said[4:] and said[4] != ""  # fp32 weights, and transformers
    assert all(result["settings"][name]["shape"].endswith("YaRN 2: 2,048 positions") for name in runners[:2])
    assert set(result["settings"]) == set(runners[:2]) and str(tmp_path) not in json.dumps(result)
    assert str(gguf.parent) not in json.dumps(result)


def test_a_part_that_fails_is_a_row_and_the_others_stay(gguf, capsys, tmp_path, one_process, monkeypatch):
    def failing(part, *arguments):
        yield from () if part is real_parts.transformers_part else part(*arguments)
        if part is real_parts.transformers_part:
            yield "failed", "it cannot"

    monkeypatch.setattr(bench_real, "in_child", failing)
    rows = run(capsys, tmp_path, gguf, "--weight-formats", "fp32")["rows"]
    assert [row.get("error") for row in rows] == [None, None, "it cannot"]


@pytest.mark.parametrize("yarn", [None, 2.0])
def test_transformers_own_reader_gives_the_models_logits(gguf, yarn):
    peer = GgufPeer(gguf, torch.device("cpu"), yarn=yarn)
    token_ids = torch.arange(40)[None] % 97
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": yarn, "original_max_position_embeddings": 1024}
    expected = tiny_model("qwen2", **SHAPE, **({"rope_parameters": rope} if yarn else {}))(token_ids).logits
    torch.testing.assert_close(peer.model(token_ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_parts_run_in_processes_of_their_own():
    found = list(in_child(two_things, 5))
    assert found[0] == ("row", 5) and found[1][1] != os.getpid() and len(found) == 2
    assert list(in_child(refused)) == [("row", 1), ("failed", "give another")]
    first, (kind, why) = in_child(killed)
    assert (first, kind) == (("row", 1), "failed") and "status 7" in why


def test_the_librarys_questions_can_be_answered_from_it():
    code, name = read_code(None)
    assert code.startswith("# file: textwrap.py\n") and name.startswith("standard library of Python 3.")
    places = [code.index(question.evidence) for question in QUESTIONS]
    assert places == sorted(places) and places[-1] > 100_000


def test_an_answer_is_right_where_the_string_stands_alone():
    question = Question("", "2048")
    assert [question.is_right(text) for text in ("2048", "It is 2,048.", "`_M = 2048`", "12048", "20481", "")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert Question("", "(Cmd)").is_right("'(Cmd) '")


def test_a_folder_is_read_in_order_and_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/a.py", "a.py", "notes.txt"):
        (tmp_path / name).write_text(f"at = {name!r}\n")
    assert read_code(tmp_path)[0] == "# file: a.py\nat = 'a.py'\n\n# file: b/a.py\nat = 'b/a.py'"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"without \.py files"):
        read_code(tmp_path / "empty")
    with pytest.raises(InputError, match="--question was given 2 time"):
        as_questions(["a", "b"], ["1"])
    assert as_questions(None, None) is QUESTIONS


def test_code_stands_in_the_template_and_only_what_was_read_is_asked(gguf):
    from longrun.config.model_config import ModelConfig
    from longrun.model.folder import check_folder

    tokenizer = check_folder(gguf, ModelConfig.from_dir(gguf)).tokenizer
    chat = CodeChat(tokenizer, "abcdefgh" * 10)
    early, late = Question("q", "x", "abc"), Question("r", "y", "h" + "abcdefgh" * 8 + "a")
    assert chat.asked([early, late], 30) == [early] and chat.asked([early, late], 80) == [early, late]
    assert tokenizer.decode(chat.document_ids(12)) == "[user]abcdef"
    assert tokenizer.decode(chat.question_ids(early)).endswith("</s>[a]")
    with pytest.raises(InputError, match="are to be read: name a longer one"):
        chat.document_ids(500)
