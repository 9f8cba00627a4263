"""Distances at which an adapted model reads: what is moved, what is counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from long_text import save_all

from longrun.errors import InputError
from scripts.training import evaluate_positions
from scripts.training.long_lora import LoraModel
from scripts.training.long_samples import Sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A tiny model, texts, and an adapter that changes its answers."""
    folder = tmp_path_factory.mktemp("positions")
    (model, data, settings), adapter = save_all(folder), folder / "adapter"
    lora = LoraModel(model, settings, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    lora.save_adapter(adapter, "random")
    return model, data, adapter


def command(trained, *more: object) -> list[str]:
    model, data, adapter = trained
    parts = ["--model", model, "--adapter", adapter, "--data", data, "--length", 700, "--samples", 2, "--device", "cpu"]
    return [str(part) for part in (*parts, *more)]


def test_every_base_part_and_distance_is_measured(trained, tmp_path, capsys):
    out = tmp_path / "results.json"
    more = ("--distances", "1K,5K", "--rope-theta", "5e3,8e4", "--out", out)
    assert evaluate_positions.main(command(trained, *more)) == 0
    results = json.loads(out.read_text())
    assert [(r["rope_theta"], r["moved"], r["by"]) for r in results["records"]] == [
        (base, what, by)
        for base in (5000.0, 80_000.0)
        for what, by in ((None, 0), ("document", 1000), ("document", 5000), ("questions", 1000), ("questions", 5000))
    ]
    asked = {record["asked"] for record in results["records"]}
    assert len(asked) == 1 and asked.pop() >= 2
    assert all(0 <= r["exact"] <= r["first"] <= r["asked"] for r in results["records"])
    assert "commit" in results["environment"] and "rope_theta 80000, questions by 5K" in capsys.readouterr().out


def test_what_is_moved():
    sample = Sample(tuple(range(40)), (0.0,) * 40, ((36, 36, 38),), (5, 30), ("f",))
    plain = torch.arange(40)[None]
    assert evaluate_positions.moved(sample, None, 0).equal(plain)
    document = evaluate_positions.moved(sample, "document", 100)
    assert document[0, :16].equal(plain[0, :16]) and document[0, 16:].equal(plain[0, 16:] + 100)
    questions = evaluate_positions.moved(sample, "questions", 100)
    assert questions[0, :30].equal(plain[0, :30]) and questions[0, 30:].equal(plain[0, 30:] + 100)


def test_right_values_are_counted_at_the_positions_given(trained):
    """Against the whole model's logits; and positions matter to what is counted."""
    model, _, adapter = trained
    lora = LoraModel.from_adapter(model, adapter, torch.float32, torch.device("cpu"))
    lora.model.eval()
    ids = torch.randint(5, 60, (1, 50), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(50)[None].clone()
    positions[:, 25:] += 900
    with torch.no_grad(), lora.at_positions(positions):
        best = lora.model(ids).logits[0].argmax(dim=-1).tolist()
    told = ids[0].tolist()
    told[31:34] = best[30], 3, 4  # its first token right for sure, whatever the rest is
    values = ((31, 31, 34),)
    sample = Sample(tuple(told), (0.0,) * 50, values, (25,), ("f",))
    exact, first, asked = evaluate_positions.count_right(lora, sample, positions)
    with torch.no_grad(), lora.at_positions(positions):
        again = lora.model(torch.tensor([told])).logits[0].argmax(dim=-1).tolist()
    assert (exact, first, asked) == (int(again[30:33] == told[31:34]), 1, 1)
    with torch.no_grad():
        elsewhere = lora.model(torch.tensor([told])).logits[0]
    with torch.no_grad(), lora.at_positions(positions):
        assert (lora.model(torch.tensor([told])).logits[0, 25:] - elsewhere[25:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rope-theta", "4e6,x"), "--rope-theta 4e6,x"),
        (("--rope-theta", "0.5"), "numbers above 1"),
        (("--length", "100"), "at least 512"),
        (("--samples", "0"), "--samples: value 0 is too small"),
        (("--adapter", "none"), "no adapter"),
        (("--adapter", "nowhere"), "there is no such file"),
    ],
)
def test_bad_input_is_one_sentence(trained, more, said):
    with pytest.raises(InputError, match=said):
        evaluate_positions.main(command(trained, *more))
