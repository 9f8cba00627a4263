"""How often selected pages give the token that all pages give: the numbers, and the script over the product's decode
steps."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.quality import selection_acceptance
from scripts.quality.selection_acceptance import mean_run


def test_runs_by_hand():
    same = torch.ones(12, dtype=torch.bool)
    assert mean_run(same) == 8
    same[9] = False  # places 0 to 4: the eight of places 0 and 1 all agree, then 7, 6 and 5 do
    assert mean_run(same) == pytest.approx((8 + 8 + 7 + 6 + 5) / 5)


def test_script_runs(planted, tmp_path):
    out = tmp_path / "out.json"
    base = ["--model", str(planted.path), "--device", "cpu", "--lengths", "4500", "--tokens", "16", "--json", str(out)]
    assert selection_acceptance.main([*base, "--budgets", "60,6"]) == 0
    every, most, few = json.loads(out.read_text())["lengths"][0]["rows"]
    assert every["budget"] == "all" and most["selection"]["pages_per_head"] == 60 and few["pages"] == 6
    assert most["known"] == few["known"] >= 4
    for name in ("written", "text", "answers"):
        assert few[f"same_{name}"] < most[f"same_{name}"] == 1  # all pages are chosen, and so read
    assert most["kl_text"] == most["kl_answers"] == 0 and most["kept"] == most["known"] > few["kept"]
    assert selection_acceptance.main([*base, "--budgets", "1000,6", "--select-question"]) == 0
    rows = json.loads(out.read_text())["lengths"][0]["rows"]
    assert [row["pages"] for row in rows[1:]] == [6] and rows[1]["kept"] <= few["kept"]  # no more pages than there are
