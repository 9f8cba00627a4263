"""The logits comparison: agrees with transformers on a tiny model, and notices and counts what differs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from longrun.lab.planted import make_planted_model
from longrun.patterns.head_map import HeadMap
from scripts.quality import compare_logits


def compare(capsys, *argv) -> dict:
    assert compare_logits.main([*map(str, argv), "--device", "cpu", "--dtype", "fp32"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tiny_model_agrees_at_every_position(tmp_path, capsys, monkeypatch, family):
    monkeypatch.setattr(compare_logits, "SLICE", 70)  # pieces that do not divide the text
    tiny_model(family).save_pretrained(tmp_path / "model")
    argv = ("--model", tmp_path / "model", "--text", "random", "--tokens", 300, "--chunk-size", 64)
    found = compare(capsys, *argv, "--kv", "fp32,int4", "--json", tmp_path / "found.json")
    exact, int4 = found["rows"]
    assert (exact["positions"], exact["top1_equal"], exact["differing"]) == (300, 300, [])
    assert exact["rms_ratio"] < 1e-4
    assert exact["kv_format"] == "fp32" and int4["kv_format"] == "int4"
    assert 1e-3 < int4["rms_ratio"] < 1
    assert int4["top1_equal"] + int4["top1_different"] == 300
    assert found["complete"] and found["environment"]["torch"]
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_needle_text_and_a_split_that_forgets(tmp_path, capsys):
    planted = make_planted_model(tmp_path / "planted")
    argv = ("--model", planted.path, "--tokens", 900, "--kv", "fp32")
    full = compare(capsys, *argv)
    assert 700 < full["settings"]["tokens"] <= 900
    assert full["rows"][0]["rms_ratio"] < 1e-4
    assert "planted" in full["settings"]["note"]
    head_map = HeadMap.load(planted.head_map)
    layer, head = planted.retrieval_head
    scores = [list(row) for row in head_map.scores]
    scores[layer][head] = 0.0
    replace(head_map, scores=tuple(map(tuple, scores))).save(tmp_path / "wrong")
    (wrong,) = compare(capsys, *argv, "--head-map", tmp_path / "wrong", "--retrieval-ratio", 0.125)["rows"]
    assert wrong["rms_ratio"] > 1e-2
    assert wrong["top1_different"] > len(wrong["differing"]) == compare_logits.LISTED


def test_differences_are_counted_and_measured_in_steps():
    reference = torch.tensor([[4.0, 3.0, 0.0], [0.0, 1.0, 1.5], [2.0, 1.0, 0.0]])
    comparison = compare_logits.Comparison(reference)
    own = reference.clone()
    own[1] = torch.tensor([2.0, 1.0, 1.5])
    comparison(0, own[:2])
    comparison(2, own[2:])
    found = comparison.result()
    assert found["rms_ratio"] == pytest.approx((4 / reference.pow(2).sum().item()) ** 0.5)
    assert (found["positions"], found["top1_different"], found["largest_difference"]) == (3, 1, 2.0)
    (one,) = found["differing"]
    assert (one["position"], one["reference_token"], one["own_token"]) == (1, 2, 0)
    assert one["gap_bf16_steps"] == 0.5 / 2**-7  # between 1 and 2 bfloat16 numbers are 2^-7 apart
    assert one["own_choice_below_top_bf16_steps"] == 1.5 / 2**-7


@pytest.mark.parametrize("value", [1.0, 1.5, 2.0, 3.99, 0.3, -17.0, 129.0])
def test_bf16_step(value):
    around = torch.tensor(abs(value), dtype=torch.bfloat16)
    above = torch.nextafter(around, torch.tensor(torch.inf, dtype=torch.bfloat16))
    assert compare_logits.bf16_step(float(around)) == float(above) - float(around)


@pytest.mark.parametrize(("more", "said"), [(["--kv", "bf16,int3"], "int3"), (["--tokens", "1"], "at least 2")])
def test_bad_arguments(tmp_path, more, said):
    with pytest.raises(compare_logits.InputError, match=said):
        compare_logits.main(["--model", str(tmp_path), "--device", "cpu", *more])
