"""What a document read sparsely keeps: settings' words, and the script over the product's own steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from readable_model import save_readable

import longrun
from longrun.errors import InputError
from longrun.lab.quality.answered import AnsweredText
from longrun.specs.prefill_spec import PrefillSpec
from scripts.quality import prefill_answers
from scripts.quality.prefill_answers import SETTINGS, Setting, rows_of

BASE = PrefillSpec(dense_tokens=0)


def test_settings_by_hand():
    assert Setting.of("exact", BASE) == Setting("exact", None)
    assert Setting.of("exact bf16", BASE) == Setting("exact bf16", None, "bf16")
    assert Setting.of("exact + select 26%", BASE) == Setting("exact + select 26%", None, None, "26%")
    assert Setting.of("8%", BASE).prefill == replace(BASE, cap=0.08)
    several = Setting.of("5-25% mass 0.9 rows 4 correct + select 128", BASE)
    assert several.prefill == replace(BASE, least=0.05, cap=0.25, mass=0.9, rows=4, correct=True)
    assert several.select == "128" and several.kv_format is None
    assert len({Setting.of(name, BASE) for name in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize(
    "name",
    ["", "8", "x%", "8% mass", "8% mass x", "8% rows 1.5", "8% quickly", "exact fp8", "exact bf16 8%", "8% + 26%",
     "8% + select", "+ select 26%", "-8%", "8% mass 0.9", "5-25%", "25-5% mass 0.9"],
)  # fmt: skip
def test_words_that_are_no_setting(name):
    with pytest.raises(InputError, match=r"the setting .* is none"):
        Setting.of(name, BASE)


@pytest.mark.parametrize(
    ("name", "said"),
    [("5-25% mass 1", "mass 1.0 is outside"), ("8% rows 3", "rows '3' is unknown"), ("0%", "cap 0.0 is")],
)
def test_values_that_prefill_refuses(name, said):
    with pytest.raises(InputError, match=said):
        Setting.of(name, BASE)


def test_what_a_random_model_loses(tmp_path):
    """Reading all is lossless by every way, more pages lose less, and every word changes something."""
    base = longrun.load(
        save_readable(tmp_path, max_position_embeddings=4096, head_dim=64), kv_format="k5v3", device="cpu", ctx=2000
    )
    draw = torch.Generator().manual_seed(0)
    text = AnsweredText(
        torch.randint(1, 96, (1900,), generator=draw), torch.arange(1500, 1560),
        (("a", torch.arange(1700, 1710)), ("b", torch.arange(1800, 1803))), 1600,
    )  # fmt: skip
    names = (
        "100%", "100% correct", "20%", "20% correct", "20% rows 8", "50%", "20-100% mass 0.9", "exact fp32",
        "exact + select 12", "20% + select 12",
    )  # fmt: skip
    spec = PrefillSpec(dense_tokens=0, dense_end=50, newest=1, floor=2)
    exact, *rows = rows_of(base, [text], [Setting.of(name, spec) for name in names], 256, spec, 600)
    row = dict(zip(names, rows, strict=True))
    assert exact["known"] == 0 and [one["setting"] for one in rows] == list(names)
    for name in names[:2]:
        assert abs(row[name]["kl_text"]) < 1e-6 and row[name]["read_share"] == 1
        assert row[name]["caught_share"] == pytest.approx(1, abs=1e-4) and row[name]["same_text"] == 1
    lost = {name: row[name]["kl_text"] for name in names}
    assert 1e-6 < lost["50%"] < lost["20%"] and len(set(lost.values())) == len(names)
    assert abs(lost["20-100% mass 0.9"]) < lost["50%"]
    assert lost["20% + select 12"] > lost["exact + select 12"] > 1e-6
    # behind the first chunk, those of two tiles have 2, 6, 10, 14 and 18 pages before them beside the sink page
    assert row["20%"]["read_share"] == pytest.approx((2 + 2 + 2 + 2 + 3) / (2 + 6 + 10 + 14 + 18))
    assert row["20%"]["sparse_tokens"] == 1501 - 50 - 256 and row["20%"]["prefill"]["cap"] == 0.2
    assert row["exact fp32"]["kv_format"] == "fp32" and "prefill" not in row["exact fp32"]
    assert row["20% + select 12"]["selection"]["pages_per_head"] == 12


@pytest.fixture(scope="module")
def options(planted):
    return [
        "--model", str(planted.path), "--device", "cpu", "--lengths", "4500", "--tokens", "24", "--chunk", "600",
        "--dense-end", "64", "--floor", "4", "--kv", "k5v3",
    ]  # fmt: skip


def test_script_runs(options, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert prefill_answers.main([*options, "--settings", "exact; 10% correct", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    exact, few = found["lengths"][0]["rows"]
    assert found["chunk"] == 512 and found["prose"] == 1 and len(found["lengths"][0]["text_tokens"]) == 2
    assert exact["setting"] == "exact" and few["known"] == exact["known"] >= 8 and few["kept"] <= few["known"]
    assert few["prefill"]["correct"] and 0.1 < few["read_share"] < 0.25 and few["caught_share"] < 0.9
    assert few["sparse_tokens"] > 5000 and len(few["read_seconds"]) == len(exact["read_seconds"]) == 2
    assert "10% correct" in capsys.readouterr().out


def test_the_time_is_over(options, tmp_path):
    out = tmp_path / "out.json"
    given = [*options, "--prose", "0", "--settings", "10%; 20%", "--seconds", "0", "--json", str(out)]
    assert prefill_answers.main(given) == 0
    exact, *rest = json.loads(out.read_text())["lengths"][0]["rows"]
    assert exact["known"] and rest == [{"setting": name, "left_out": True} for name in ("10%", "20%")]


def test_nothing_is_read_sparsely(options):
    with pytest.raises(InputError, match=r"'10%' reads all of .* tokens in full"):
        prefill_answers.main([*options, "--prose", "0", "--settings", "10%", "--dense", "4300"])
    with pytest.raises(InputError, match="--chunk 127 is less than a tile: give at least 128"):
        prefill_answers.main([*options, "--chunk", "127"])
