"""`python -m longrun.patterns show`: the table, the picture, the JSON and its errors."""

import json

import pytest
from matplotlib import image
from run_here import run_here

from longrun.patterns.__main__ import main
from longrun.patterns.head_map import HeadMap
from longrun.patterns.reach_losses import ReachLosses

SCORES = ((0.125, 1.0, 0.75), (0.5, 0.0, 0.25))


@pytest.fixture
def folder(tmp_path):
    HeadMap(SCORES, 128, 256).save(tmp_path / "map")
    return tmp_path / "map"


@pytest.fixture
def show(capsys):
    return lambda *arguments: run_here(lambda: main(["show", *map(str, arguments)]), capsys)


def rows(text):
    """The table's rows as {layer: (count, rest of the row)}."""
    cells = [line.split(maxsplit=2) for line in text.splitlines()]
    return {
        int(row[0]): (int(row[1]), row[2].rstrip())
        for row in cells
        if len(row) == 3 and row[0].isdigit() and row[1].isdigit()
    }


def test_table_counts_and_marks_the_retrieval_heads_of_each_layer(folder, show):
    result = show(folder, "--threshold", "0.5")
    assert result.status == 0, result.err
    assert "128 sinks and the last 256 tokens" in result.out
    assert "3 of 6 heads are retrieval heads (50.0%) by a score of at least 0.5" in result.out
    assert HeadMap(SCORES, 128, 256).split(threshold=0.5).hash in result.out
    assert rows(result.out) == {0: (2, "0.12 [1.00][0.75]"), 1: (1, "[0.50] 0.00  0.25")}


def test_many_heads_become_shades_with_marks(tmp_path, show):
    scores = tuple(i / 31 for i in range(32))
    HeadMap((scores, scores)).save(tmp_path / "map")
    result = show(tmp_path / "map", "--retrieval-ratio", "0.25")
    assert result.status == 0, result.err
    assert {layer: count for layer, (count, _) in rows(result.out).items()} == {0: 8, 1: 8}
    assert result.out.count("." * 24 + "R" * 8) == 2
    assert max(map(len, result.out.splitlines()[2:])) <= 80


def test_json_holds_split_and_scores_exactly(folder, show):
    result = show(folder, "--retrieval-ratio", "0.5", "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    split = HeadMap(SCORES, 128, 256).split(retrieval_ratio=0.5)
    assert tuple(map(tuple, facts["scores"])) == SCORES
    assert facts["num_retrieval"] == [2, 1]
    assert facts["retrieval_heads"] == [[1, 2], [0]]
    assert facts["hash"] == split.hash
    assert facts["rule"] == "retrieval ratio 0.5"


def test_picture_shows_every_head_and_outlines_the_split(folder, tmp_path, show):
    full, half = tmp_path / "full.png", tmp_path / "half.png"
    result = show(folder, "--retrieval-ratio", "1", "--png", full)
    assert result.status == 0, result.err
    assert f"picture: {full}" in result.out
    assert show(folder, "--retrieval-ratio", "0.5", "--png", half, "--json").status == 0
    bars = [_share(image.imread(path), [0.35] * 3) for path in (full, half)]
    assert bars[0] > 1.5 * bars[1] > 0.0
    # cividis at score 1: the cell of layer 0, KV head 1
    assert _share(image.imread(half), [0.996, 0.909, 0.218]) > 0.02


def _share(pixels, colour):
    """Share of the pixels that have this colour, nearly."""
    return (abs(pixels[..., :3] - colour).max(axis=-1) < 0.02).mean()


def test_notes_are_shown(folder, show):
    (folder / "full_attention_heads.tsv").write_text("-0.01\t1\n0\t0.5\n")
    (folder / "config.json").unlink()
    result = show(folder)
    assert "note: clipped 1 score below 0" in result.out
    assert "note: no config.json: assumed sink_size 64 and recent_size 256" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retrieval-ratio", "1.5"], "--retrieval-ratio: value 1.5 is outside the range: give a number from 0 to 1"),
        (["--threshold", "-1"], "--threshold: value -1.0 is outside the range: give a number from 0 to 1"),
        (["--retrieval-ratio", "0.5", "--threshold", "0.5"], "not allowed with"),
        (["--png", "/no/such/folder/map.png"], "/no/such/folder/map.png cannot be written"),
    ],
)
def test_bad_arguments_leave_with_status_2(folder, arguments, words, show):
    result = show(folder, *arguments)
    assert result.status == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_damaged_map_leaves_with_status_2(folder, show):
    (folder / "full_attention_heads.tsv").write_text("1\tnan\n")
    result = show(folder)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert "row 1, column 2" in result.err


def test_a_map_that_scored_nothing_is_told_with_its_rule(folder, show):
    (folder / "full_attention_heads.tsv").write_text("0.1\t0.2\n0\t0.3\n")
    assert "note: no head scores enough to keep all tokens (the highest score is 0.3)" in show(folder).out
    assert json.loads(show(folder, "--json").out)["notes"][0].startswith("no head scores enough")
    assert "no head scores enough" not in show(folder, "--retrieval-ratio", "0.5").out


def test_how_far_each_head_needs_to_reach(tmp_path, show):
    first = ((9.0, 0.08, 0.0), (5.0, 4.0, 1.0), (0.0, 0.0, 0.0))
    second = ((1.0, 0.001, 0.02), (1.0, 0.5, 0.01), (2.0, 1.0, 0.5))
    losses = ReachLosses(64, 16384, (256, 1024, 4096), (first, second))
    HeadMap(SCORES, 64, 256, reach_losses=losses).save(tmp_path / "map")
    result = show(tmp_path / "map")
    assert result.status == 0, result.err
    assert "loses at most 1% of its largest loss; measured on 16,384 tokens with 64 sinks" in result.out
    lines = [line.split() for line in result.out.splitlines()]
    assert ["0", "1024", "all", "256"] in lines
    assert ["1", "all", "4096", "all"] in lines
    facts = json.loads(show(tmp_path / "map", "--json").out)
    assert ReachLosses.from_dict(facts["reach_losses"], "json") == losses
