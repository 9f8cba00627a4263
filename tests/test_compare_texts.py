"""Code and chats to be predicted: their length, their turns, and a comparison that has all kinds."""

from __future__ import annotations

import json
import re

import pytest
from chat_tokenizers import CHATML, END, byte_tokenizer

from longrun.errors import InputError
from longrun.lab.quality import report
from longrun.lab.quality.code_source import SourceFile, standard_library
from longrun.lab.quality.texts import TEXT_TASKS, chat_texts, code_texts
from scripts.quality import compare


def test_code_is_whole_modules_in_an_order_of_its_own():
    tokenizer, files = byte_tokenizer(None), standard_library()[:30]
    one, other = code_texts(tokenizer, files, 9000, 2, seed=0)
    assert len(one) == len(other) == 9000 and one != other
    assert (
        code_texts(tokenizer, files, 9000, 2, seed=0) == [one, other] != code_texts(tokenizer, files, 9000, 2, seed=1)
    )
    name = re.match(r"# file: (\S+)\n", tokenizer.decode(one)).group(1)
    text = next(file.text for file in files if file.name == name)
    assert tokenizer.decode(one).startswith(f"# file: {name}\n{text[:500]}")
    with pytest.raises(InputError, match=r"text-code has .* leave the task out"):
        code_texts(tokenizer, [SourceFile("a.py", "x = 1\n")], 900, 1, seed=0)


def test_chats_repeat_what_was_said_in_the_template():
    tokenizer = byte_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids(END)
    one, other = chat_texts(tokenizer, end, 12_000, 2, seed=0)
    assert len(one) == len(other) == 12_000 and one != other
    turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n",
                       tokenizer.decode(one))  # fmt: skip
    said, again = {}, 0
    for question, answer in turns:
        if asked := re.fullmatch(r"What does the language reference say about (.*), paragraph (\d+)\?", question):
            said[asked[2], asked[1]] = answer
        else:
            asked = re.fullmatch(r"Say once more what paragraph (\d+) about (.*) was\.", question)
            assert said[asked[1], asked[2]] == answer
            again += 1
    assert len(said) > 5 and again > 1


def test_a_comparison_has_a_table_of_all_kinds(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_draw", lambda *_, **__: tmp_path / "no picture")  # takes seconds; see test_compare.py
    settings, out = tmp_path / "rows.toml", tmp_path / "out"
    settings.write_text("[[row]]\nname = 'streaming'\nhead_map = 'streaming'\n")
    assert compare.main([
        "--model", str(planted.path), "--settings", str(settings), "--lengths", "500", "--texts", "1",
        "--score-tokens", "32", "--tasks", ",".join(TEXT_TASKS), "--device", "cpu", "--out", str(out),
    ]) == 0  # fmt: skip
    found = json.loads((out / "results.json").read_text())
    assert [(r["row"], r["group"]) for r in found["records"]] == [
        (row, kind) for row in ("reference", "streaming") for kind in TEXT_TASKS
    ]
    assert found["settings"]["code"]["modules"] > 200
    for record in found["records"]:
        assert all(item["document"] == f"{record['group']}/0" for item in record["items"])
        lost = sum(item["kl"] for item in record["items"])  # prose may lose nothing: nothing in it is repeated
        assert lost == 0 if record["row"] == "reference" else lost > 0.1 or record["group"] == "text"
    assert "| row | text, KL | text, top-1 | text-code, KL |" in (out / "report.md").read_text()
    assert set(found["summary"][1]["texts"]) == set(TEXT_TASKS)
