"""The evaluation of long-text adapters: what it counts, and what it writes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from long_text import save_all

from longrun.errors import InputError
from scripts.training import evaluate_long, long_ability
from scripts.training.long_lora import LoraModel


def test_evaluation_of_recall_perplexity_and_chat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_ability, "WINDOW", 600)
    (model, data, settings), adapter = save_all(tmp_path), tmp_path / "adapter"
    LoraModel(model, settings, torch.float32, torch.device("cpu")).save_adapter(adapter, "untrained")
    out = tmp_path / "results.json"
    command = ["--model", model, "--adapter", adapter, "--data", data, "--lengths", "1K,2K", "--depths", 3]
    command += ["--per-depth", "2,1", "--trials", "1,2", "--windows", 2, "--chat-tokens", 4, "--device", "cpu"]
    command += ["--out", out]
    assert evaluate_long.main([str(part) for part in command]) == 0
    results = json.loads(out.read_text())
    assert results["perplexity_4k"]["original"] > 1 and results["perplexity_4k"]["ratio"] > 0
    assert len(results["chat"]) == len(long_ability.TEST_PROMPTS)
    assert {"torch", "commit", "command"} <= set(results["environment"])
    assert [(record["length"], record["facts"]) for record in results["recall"]] == [
        (1000, 6), (1000, 3), (2000, 6), (2000, 3),
    ]  # fmt: skip
    for record, per_depth in zip(results["recall"], (2, 2, 2, 2), strict=True):
        assert record["exact"]["all"][1] == record["first"]["all"][1] == 3 * per_depth
        assert record["exact"]["depth 0.5"][1] == per_depth
        assert all(record["canonical"][key][0] <= record["first"][key][0] for key in record["exact"])
    assert "perplexity at 4K" in capsys.readouterr().out


class Letters:
    """A tokenizer whose token ids are code points."""

    def decode(self, ids):
        return "".join(map(chr, ids)) if isinstance(ids, list) else chr(ids)


class Parrot:
    """A session whose greedy continuation of each question is known: teacher forcing finds its letters."""

    def __init__(self, goes_on: dict[str, str]) -> None:
        self.goes_on, self.read, self.generated = goes_on, [], 0

    def prefill(self, ids):
        self.read += ids

    def mark(self):
        return len(self.read)

    def rewind(self, mark):
        del self.read[mark:]

    def _next(self, text: str) -> str:
        asked = text[text.index("?") - 1 :]
        said = self.goes_on[asked[0]]
        return said[len(asked) - 2] if said.startswith(asked[2:]) and len(said) > len(asked) - 2 else "#"

    def score(self, ids):
        rows = torch.zeros(len(ids), 300)
        for place, token in enumerate(ids):
            rows[place, ord(self._next("".join(map(chr, self.read))))] = 1.0
            self.read.append(token)
        return rows

    def generate(self, count):
        for _ in range(count):
            self.generated += 1
            self.read.append(ord(self._next("".join(map(chr, self.read)))))
            yield self.read[-1]


def test_an_answer_counts_as_the_text_that_generation_gives(monkeypatch):
    """Other tokens may spell the value; more of it, or less, is wrong."""
    values = {"a": " ab1", "b": " ab1", "c": " ab1", "d": " ab1", "e": "ab1"}
    goes_on = {"a": " ab1.", "b": " ab17", "c": " ax1.", "d": " xb1.", "e": " ab1 "}
    session = Parrot(goes_on)
    runtime = SimpleNamespace(tokenizer=Letters(), new_session=lambda _: session)
    questions = [
        SimpleNamespace(
            form="f", depth=0.5, value=value.strip(), value_ids=tuple(map(ord, value)), token_ids=[ord(key), ord("?")]
        )
        for key, value in values.items()
    ]
    document = SimpleNamespace(token_ids=[ord("t")] * 5, questions=questions)
    told = {chr(q.token_ids[0]): one for q, one in evaluate_long.answer(runtime, document, 5)}
    assert {key: (one.exact, one.first, one.canonical) for key, one in told.items()} == {
        "a": (True, True, True),
        "b": (False, True, True),  # a digit goes on
        "c": (False, True, False),
        "d": (False, False, False),
        "e": (True, False, False),  # a space before it, which the tokenizer would not have put there
    }
    assert told["a"].text == " ab1." and told["c"].text.startswith(" ax1")
    assert session.generated == 2 * (4 + evaluate_long.MORE) + 3 + evaluate_long.MORE
    monkeypatch.setattr(evaluate_long, "answer", lambda *_: iter(zip(questions, told.values(), strict=True)))
    monkeypatch.setattr(evaluate_long, "TaskWriter", lambda _: SimpleNamespace(test_document=lambda *_, **__: None))
    (record,) = evaluate_long.recall(runtime, None, [1000], 1, [(5, 1)], 0)
    assert [record[name]["all"] for name in ("exact", "first", "canonical")] == [[2, 5], [3, 5], [2, 5]]
    assert [one[2] for one in record["wrong"]] == ["ab1"] * 3 and record["wrong"][0][3] == " ab17"


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 1234.", True), ("1234", True), (" 12345", False), (" 123", False), (" 1234a", False), (" of 1234", False)],
)
def test_what_says_a_value(text, right):
    assert evaluate_long.says(text, "1234") is right


def test_bad_densities_are_refused():
    for lists in (("6,1", "2"), ("6,x", "2,1"), ("6,0", "2,1")):
        with pytest.raises(InputError, match="--per-depth"):
            evaluate_long.read_densities(*lists)
