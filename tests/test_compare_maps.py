"""`compare` and `show`: rank correlation and overlap by hand, pictures, and no torch for looking at maps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import longrun.patterns.compare_maps as compare_maps_module
from longrun.errors import HeadMapError
from longrun.patterns import __main__ as command
from longrun.patterns.compare_maps import compare_maps, spearman
from longrun.patterns.head_map import HeadMap


def test_rank_correlation_by_hand() -> None:
    # ranks of a: 1, 2.5, 2.5, 4; of b: 2, 1, 3, 4. Deviations from 2.5: (-1.5, 0, 0, 1.5) and (-.5, -1.5, .5, 1.5).
    # Products: 0.75 + 2.25 = 3; norms: sqrt(4.5 * 5).
    assert spearman([0.1, 0.5, 0.5, 0.9], [0.3, 0.2, 0.4, 0.6]) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [10, 20, 21]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert math.isnan(spearman([1, 1, 1], [3, 2, 1]))


A = HeadMap(((0.9, 0.8, 0.1, 0.2), (0.7, 0.3, 0.4, 0.6)), 4, 16)
B = HeadMap(((0.9, 0.1, 0.8, 0.2), (0.7, 0.3, 0.4, 0.6)), 4, 16)


def test_overlap_beside_chance() -> None:
    correlation, (quarter, half) = compare_maps(A, B, (0.25, 0.5))
    # two ranks of eight differ by six places: 1 - 6 * (36 + 36) / (8 * 63)
    assert correlation == pytest.approx(1 - 6 * 72 / (8 * 63))
    assert (quarter.num_retrieval, quarter.shared, quarter.share) == (2, 1, 0.5)
    assert (half.num_retrieval, half.shared, half.share) == (4, 3, 0.75)
    # hypergeometric: 4 draws from 8 of which 4 count; variance 4 * 1/2 * 1/2 * 4/7
    assert half.chance == pytest.approx(2.0)
    assert half.deviation == pytest.approx(math.sqrt(4 / 7))
    assert quarter.chance == pytest.approx(0.5)


def test_maps_of_unlike_shapes_are_refused() -> None:
    with pytest.raises(HeadMapError, match="2 layers of 4 KV heads and 3 of 4: compare maps of one model"):
        compare_maps(A, HeadMap.full(3, 4))


def test_looking_and_comparing_load_no_torch(tmp_path: Path) -> None:
    A.save(tmp_path / "a")
    arguments = [["compare", str(tmp_path / "a"), str(tmp_path / "a")], ["show", str(tmp_path / "a")]]
    code = f"import sys\nfrom longrun.patterns.__main__ import main\nfor a in {arguments!r}: main(a)\n"
    code += "print(sorted(set(sys.modules) & {'torch', 'transformers', 'safetensors'}))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "heads: 1.000" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_compares_and_draws(tmp_path: Path, capsys, monkeypatch) -> None:
    framed = []
    monkeypatch.setattr(compare_maps_module, "outline_head", lambda *head, dotted: framed.append(dotted))
    A.save(tmp_path / "a")
    B.save(tmp_path / "b")
    HeadMap.full(2, 4).save(tmp_path / "full")
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    png = tmp_path / "maps.png"
    assert command.main(["compare", *pair, "--retrieval-ratio", "0.5", "0", "--png", str(png)]) == 0
    out = capsys.readouterr().out
    assert "Spearman rank correlation over 8 heads: 0.143" in out
    assert "ratio 0.5: 3 of A's 4 retrieval heads are B's (75%); chance gives 2.0 +- 0.8 (50%)" in out
    assert "ratio 0: no retrieval head" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (len(framed), sum(framed)) == (8, 6), "four heads a map, three of them of both"
    assert command.main(["compare", *pair, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["retrieval_ratio"] for one in facts["overlaps"]] == [0.1, 0.25, 0.5, 0.75]
    assert facts["overlaps"][2]["shared"] == 3
    assert command.main(["compare", pair[0], str(tmp_path / "full")]) == 0
    assert "none, since all scores of one map are equal" in capsys.readouterr().out
