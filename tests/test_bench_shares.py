"""A share below its floor is a red light: status 1, and a line that names it. No GPU is needed."""

import json
from types import SimpleNamespace

import pytest
import torch

from longrun.errors import InputError
from scripts.bench import bench_common, bench_shares
from scripts.bench import command as bench
from scripts.bench.bench_shares import Reached, Share

FINE = Share("fine thing", "a copy", 0.8, lambda: Reached(8.1, 10.0, "TB/s"))
SLOW = Share("slow thing", "a product", 0.8, lambda: Reached(417.0, 550.0, "TFLOP/s"))


@pytest.fixture
def shares(monkeypatch):
    monkeypatch.setattr(bench_shares, "check_device", lambda name: torch.device("cpu"))

    def use(*chosen):
        monkeypatch.setattr(bench_shares, "SHARES", chosen)

    return use


def test_a_share_below_its_floor_is_told_and_is_the_status(shares, capsys, tmp_path):
    shares(FINE, SLOW)
    file = tmp_path / "shares.json"
    assert bench.main(["shares", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "TOO SLOW: slow thing: 75.8% of a product, and 80% is the floor" in out and "TOO SLOW: fine" not in out
    fine, slow = json.loads(file.read_text())["rows"]
    assert fine["sound"] and not slow["sound"] and slow["share"] == pytest.approx(417 / 550)
    assert bench.main(["shares", "--only", "fine"]) == 0


def test_an_unknown_share_is_an_error(shares):
    shares(FINE)
    with pytest.raises(InputError, match="fine thing"):
        bench.main(["shares", "--only", "nothing"])


def test_every_floor_is_above_the_next_slower_road():
    """What FlashAttention-2 reaches of cuDNN's speed on an H100 (0.6 to 0.65) must be below attention's floors."""
    floors = {share.name: share.floor for share in bench_shares.SHARES}
    assert len(floors) == len(bench_shares.SHARES)
    assert all(0.5 < floor < 1 for floor in floors.values())
    assert min(floor for name, floor in floors.items() if name.startswith("attention")) >= 0.8


def test_a_benchmark_without_a_share_of_a_ceiling_does_not_finish(tmp_path):
    args = SimpleNamespace(json=None)
    rows = [{"runner": "transformers"}, {"runner": "longrun", "error": "out of memory"}, {"share": 0.9}]
    assert bench_common.finish_timed({"rows": rows}, args) == 0
    with pytest.raises(AssertionError):
        bench_common.finish_timed({"rows": [{"runner": "longrun", "seconds": 3.0}]}, args)


def test_a_value_that_is_enough_is_sound_where_memory_is_faster():
    def row(value):
        return Share("slow thing", "a copy", 0.8, lambda: Reached(value, 4.2, "TB/s"), 3.1).row()

    assert row(3.2)["sound"] and row(3.2)["share"] < 0.8 and not row(3.0)["sound"]
