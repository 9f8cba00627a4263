"""The evaluation of long-text adapters: what it counts, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from long_text import save_corpus, save_model, tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import evaluate_long
from long_lora import LoraModel

from longrun.errors import InputError
from longrun.model.checkpoint import weights_fingerprint


def test_evaluation_of_recall_perplexity_and_chat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_long, "WINDOW", 600)
    model, data, adapter = tmp_path / "model", tmp_path / "data", tmp_path / "adapter"
    save_model(model)
    tokenizer().save_pretrained(model)
    save_corpus(data)
    settings = {"r": 2, "lora_alpha": 2, "rope_theta": 5000.0, "max_position_embeddings": 4096}
    settings["base_weights"] = weights_fingerprint(model)
    LoraModel(model, settings, torch.float32, torch.device("cpu")).save_adapter(adapter, "untrained")
    out = tmp_path / "results.json"
    command = ["--model", model, "--adapter", adapter, "--data", data, "--lengths", "1K,2K", "--depths", 3]
    command += ["--per-depth", "2,1", "--trials", "1,2", "--windows", 2, "--chat-tokens", 4, "--device", "cpu"]
    command += ["--out", out]
    assert evaluate_long.main([str(part) for part in command]) == 0
    results = json.loads(out.read_text())
    assert results["perplexity_4k"]["original"] > 1 and results["perplexity_4k"]["ratio"] > 0
    assert len(results["chat"]) == len(evaluate_long.TEST_PROMPTS)
    assert {"torch", "commit", "command"} <= set(results["environment"])
    assert [(record["length"], record["facts"]) for record in results["recall"]] == [
        (1000, 6), (1000, 3), (2000, 6), (2000, 3),
    ]  # fmt: skip
    for record, per_depth in zip(results["recall"], (2, 2, 2, 2), strict=True):
        assert record["exact"]["all"][1] == record["first"]["all"][1] == 3 * per_depth
        assert record["exact"]["depth 0.5"][1] == per_depth
        assert all(record["exact"][key][0] <= record["first"][key][0] for key in record["exact"])
    assert "perplexity at 4K" in capsys.readouterr().out


def test_first_tokens_count_apart_from_whole_values(monkeypatch, capsys):
    told = {"a": ["a", "x", "c"], "b": ["x", "x", "c"], "c": ["a", "b", "c"], "d": [" ", "a", "x"]}
    value = {"a": "abc", "b": "abc", "c": "abc", "d": " ab"}

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids)) if isinstance(ids, list) else chr(ids)

    questions = [
        SimpleNamespace(form="f", depth=0.5, value=value[key], value_ids=tuple(map(ord, value[key]))) for key in told
    ]
    asked = [(question, [ord(one) for one in told[key]]) for question, key in zip(questions, told, strict=True)]
    monkeypatch.setattr(evaluate_long, "answer", lambda *_: iter(asked))
    monkeypatch.setattr(evaluate_long, "TaskWriter", lambda _: SimpleNamespace(test_document=lambda *_, **__: None))
    runtime = SimpleNamespace(tokenizer=Letters())
    (record,) = evaluate_long.recall(runtime, None, [1000], 1, [(4, 1)], 0)
    assert record["first"]["all"] == [3, 4] and record["exact"]["all"] == [1, 4]
    assert record["wrong"] == [["f", 0.5, "abc", "axc"], ["f", 0.5, "abc", "xxc"], ["f", 0.5, " ab", " ax"]]
    evaluate_long.show(record)
    assert "1/4 exact, 3/4 first tokens" in capsys.readouterr().out
    for lists in (("6,1", "2"), ("6,x", "2,1"), ("6,0", "2,1")):
        with pytest.raises(InputError, match="--per-depth"):
            evaluate_long.read_densities(*lists)
