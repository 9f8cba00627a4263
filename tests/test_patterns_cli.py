"""`python -m longrun.patterns show`: the table, the picture, the JSON and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

from longrun.patterns.head_map import HeadMap
from longrun.patterns.reach_losses import ReachLosses

ROOT = Path(__file__).resolve().parent.parent
SCORES = ((0.125, 1.0, 0.75), (0.5, 0.0, 0.25))


@pytest.fixture
def folder(tmp_path):
    HeadMap(SCORES, 128, 256).save(tmp_path / "map")
    return tmp_path / "map"


def show(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "longrun.patterns", "show", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def rows(text):
    """The table's rows as {layer: (count, rest of the row)}."""
    cells = [line.split(maxsplit=2) for line in text.splitlines()]
    return {
        int(row[0]): (int(row[1]), row[2].rstrip())
        for row in cells
        if len(row) == 3 and row[0].isdigit() and row[1].isdigit()
    }


def test_table_counts_and_marks_the_retrieval_heads_of_each_layer(folder):
    result = show(folder, "--threshold", "0.5")
    assert result.returncode == 0, result.stderr
    assert "128 sinks and the last 256 tokens" in result.stdout
    assert "3 of 6 heads are retrieval heads (50.0%) by a score of at least 0.5" in result.stdout
    assert HeadMap(SCORES, 128, 256).split(threshold=0.5).hash in result.stdout
    assert rows(result.stdout) == {0: (2, "0.12 [1.00][0.75]"), 1: (1, "[0.50] 0.00  0.25")}


def test_many_heads_become_shades_with_marks(tmp_path):
    scores = tuple(i / 31 for i in range(32))
    HeadMap((scores, scores)).save(tmp_path / "map")
    result = show(tmp_path / "map", "--retrieval-ratio", "0.25")
    assert result.returncode == 0, result.stderr
    assert {layer: count for layer, (count, _) in rows(result.stdout).items()} == {0: 8, 1: 8}
    assert result.stdout.count("." * 24 + "R" * 8) == 2
    assert max(map(len, result.stdout.splitlines()[2:])) <= 80


def test_json_holds_split_and_scores_exactly(folder):
    result = show(folder, "--retrieval-ratio", "0.5", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    split = HeadMap(SCORES, 128, 256).split(retrieval_ratio=0.5)
    assert tuple(map(tuple, facts["scores"])) == SCORES
    assert facts["num_retrieval"] == [2, 1]
    assert facts["retrieval_heads"] == [[1, 2], [0]]
    assert facts["hash"] == split.hash
    assert facts["rule"] == "retrieval ratio 0.5"


def test_picture_shows_every_head_and_outlines_the_split(folder, tmp_path):
    full, half = tmp_path / "full.png", tmp_path / "half.png"
    result = show(folder, "--retrieval-ratio", "1", "--png", full)
    assert result.returncode == 0, result.stderr
    assert f"picture: {full}" in result.stdout
    assert show(folder, "--retrieval-ratio", "0.5", "--png", half, "--json").returncode == 0
    bars = [_share(image.imread(path), [0.35] * 3) for path in (full, half)]
    assert bars[0] > 1.5 * bars[1] > 0.0
    # cividis at score 1: the cell of layer 0, KV head 1
    assert _share(image.imread(half), [0.996, 0.909, 0.218]) > 0.02


def _share(pixels, colour):
    """Share of the pixels that have this colour, nearly."""
    return (abs(pixels[..., :3] - colour).max(axis=-1) < 0.02).mean()


def test_notes_are_shown(folder):
    (folder / "full_attention_heads.tsv").write_text("-0.01\t1\n0\t0.5\n")
    (folder / "config.json").unlink()
    result = show(folder)
    assert "note: clipped 1 score below 0" in result.stdout
    assert "note: no config.json: assumed sink_size 64 and recent_size 256" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retrieval-ratio", "1.5"], "--retrieval-ratio: value 1.5 is outside the range: give a number from 0 to 1"),
        (["--threshold", "-1"], "--threshold: value -1.0 is outside the range: give a number from 0 to 1"),
        (["--retrieval-ratio", "0.5", "--threshold", "0.5"], "not allowed with"),
        (["--png", "/no/such/folder/map.png"], "/no/such/folder/map.png cannot be written"),
    ],
)
def test_bad_arguments_leave_with_status_2(folder, arguments, words):
    result = show(folder, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_damaged_map_leaves_with_status_2(folder):
    (folder / "full_attention_heads.tsv").write_text("1\tnan\n")
    result = show(folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "row 1, column 2" in result.stderr


def test_a_map_that_scored_nothing_is_told_with_its_rule(folder):
    (folder / "full_attention_heads.tsv").write_text("0.1\t0.2\n0\t0.3\n")
    assert "note: no head scores enough to keep all tokens (the highest score is 0.3)" in show(folder).stdout
    assert json.loads(show(folder, "--json").stdout)["notes"][0].startswith("no head scores enough")
    assert "no head scores enough" not in show(folder, "--retrieval-ratio", "0.5").stdout


def test_how_far_each_head_needs_to_reach(tmp_path):
    first = ((9.0, 0.08, 0.0), (5.0, 4.0, 1.0), (0.0, 0.0, 0.0))
    second = ((1.0, 0.001, 0.02), (1.0, 0.5, 0.01), (2.0, 1.0, 0.5))
    losses = ReachLosses(64, 16384, (256, 1024, 4096), (first, second))
    HeadMap(SCORES, 64, 256, reach_losses=losses).save(tmp_path / "map")
    result = show(tmp_path / "map")
    assert result.returncode == 0, result.stderr
    assert "loses at most 1% of its largest loss; measured on 16,384 tokens with 64 sinks" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "1024", "all", "256"] in lines
    assert ["1", "all", "4096", "all"] in lines
    facts = json.loads(show(tmp_path / "map", "--json").stdout)
    assert ReachLosses.from_dict(facts["reach_losses"], "json") == losses
