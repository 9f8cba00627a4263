"""Questions answered within a text, and the script that judges reaches by them."""

from __future__ import annotations

import json

import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer

from longrun.lab.quality.answered import NEEDLES, answered_texts
from longrun.lab.quality.asked import CODE_TASKS
from longrun.lab.quality.code_source import standard_library
from longrun.units import ALL_TOKENS
from scripts.quality import reach_answers
from scripts.quality.reach_cuts import RandomCuts


@pytest.mark.parametrize("template", [None, CHATML])
def test_answers_stand_behind_their_questions(template):
    tokenizer = byte_tokenizer(template)
    one, other = answered_texts(tokenizer, standard_library()[:120], 30_000, 2, seed=0, num_needles=3)
    assert not torch.equal(one.ids, other.ids)
    again = next(answered_texts(tokenizer, standard_library()[:120], 30_000, 1, seed=0, num_needles=3))
    assert torch.equal(again.ids, one.ids) and torch.equal(again.rows, one.rows)
    for text in (one, other):
        assert len(text.ids) <= 30_000 and {task for task, _ in text.answers} <= {NEEDLES, *CODE_TASKS}
        document = tokenizer.decode(text.ids[: text.document_length])
        assert text.text_rows.max() < text.document_length - 1 and len(text.text_rows) == 256
        for task, rows in text.answers:
            answer = tokenizer.decode(text.ids[rows + 1]).strip()
            before = tokenizer.decode(text.ids[: rows[0] + 1])[-300:]
            if task == NEEDLES:
                name = before.rsplit("The magic number of ", 1)[1].removesuffix(" is:")
                assert f"# The magic number of {name} is: {answer}.\n" in document
            elif task == "which file":
                assert f"# file: {answer}\n" in document
            after = text.ids[rows[-1] + 2 :][:1].tolist()
            assert template is None or not after or tokenizer.decode(after) == "<|im_end|>"


def test_an_answer_is_kept_where_all_its_tokens_are_likeliest():
    text = next(answered_texts(byte_tokenizer(None), standard_library()[:120], 30_000, 1, seed=0))
    likeliest = text.ids[text.rows + 1]
    assert text.kept(likeliest) == [True] * len(text.answers)
    likeliest[-1] += 1  # the last token of the last answer
    likeliest[0] += 1  # running code, no answer
    assert text.kept(likeliest) == [True] * (len(text.answers) - 1) + [False]


def test_reaches_are_judged_by_answers(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(reach_answers, "MIXTURES", {"needles": (0, 0, 0, 1), "none": (0, 0, 0, 0)})
    monkeypatch.setattr(reach_answers, "RANKED", ("needles",))
    out = tmp_path / "out.json"
    assert reach_answers.main([
        "--model", str(planted.path), "--length", "4500", "--texts", "1", "--measured", "1", "--weighing", "4000",
        "--budgets", "0.4", "--windows", "1024", "--json", str(out),
    ]) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert found["reaches"] == [256, 1024] and found["known"]["needle"] >= 4
    control, by_needles, by_nothing, windows = found["rows"]
    known = sum(found["known"].values())
    assert control["kept"] == by_needles["kept"] == by_needles["known"] == known > by_nothing["kept"]
    assert by_nothing["held"] < by_needles["held"] <= 0.4 and windows["rule"] == "window 1024 by needles"


def test_random_cuts_find_what_each_head_costs():
    text = next(answered_texts(byte_tokenizer(None), standard_library()[:120], 30_000, 1, seed=0))
    costs = torch.tensor([[0.02, 0.0], [0.001, 0.1], [0.0, 0.005]], dtype=torch.float64)

    class Sum:  # a model whose answers suffer by the sum of their heads' costs
        shape = tuple(costs.shape)

        def log_probs(self, text, reaches):
            cut = torch.zeros_like(costs) if reaches is None else torch.tensor(reaches) != ALL_TOKENS
            right = torch.full((len(text.rows),), -0.01) - (cut * costs).sum() / len(text.answer_rows)
            found = torch.full((len(text.rows), 256), -9.0)
            return found.scatter(1, text.ids[text.rows + 1, None], right.float()[:, None])

    longer = torch.tensor([len(rows) for _, rows in text.answers]) / len(text.answer_rows)
    cuts = RandomCuts(Sum(), [text, text], 1024)
    first, facts = cuts.fit(200)
    second, _ = cuts.fit(200, first)
    torch.testing.assert_close(second, costs * longer.mean(), rtol=0.05, atol=1e-4)
    assert facts["unexplained"] < 0.1 * facts["spread"]
