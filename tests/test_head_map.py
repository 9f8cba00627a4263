"""Head maps: the files, the faults they can have, and the split."""

import hashlib
import json
import random

import pytest

from longrun.errors import HeadMapError
from longrun.patterns import head_map_folder
from longrun.patterns.head_map import HeadMap, HeadSplit, spread_retrieval_heads


def write_map(folder, rows, config='{"sink_size": 128, "recent_size": 256}'):
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text(rows)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def random_map(layers=6, heads=5, seed=0):
    rng = random.Random(seed)
    return HeadMap(tuple(tuple(rng.random() for _ in range(heads)) for _ in range(layers)), 3, 7)


def test_reads_the_duo_attention_format(tmp_path):
    config = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": None, "lr": 0.02}
    folder = write_map(tmp_path / "map", "1.000000e+00\t2.5e-1\n0\t0.75\n", json.dumps(config))
    head_map = HeadMap.load(folder)
    assert head_map.scores == ((1.0, 0.25), (0.0, 0.75))
    assert (head_map.sink_size, head_map.recent_size) == (128, 256)
    assert head_map.notes == ()


def test_round_trip_is_exact(tmp_path):
    head_map = random_map()
    head_map.save(tmp_path / "deep" / "map")
    assert HeadMap.load(tmp_path / "deep" / "map") == head_map
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["map"]


def test_scores_outside_the_range_are_clipped_with_a_note(tmp_path):
    head_map = HeadMap.load(write_map(tmp_path / "map", "-0.01\t1.5\n-2\t0.5\n"))
    assert head_map.scores == ((0.0, 1.0), (0.0, 0.5))
    assert head_map.notes == ("clipped 2 scores below 0", "clipped 1 score above 1")


@pytest.mark.parametrize(
    ("config", "window", "notes"),
    [
        (None, (64, 256), 1),
        ("{}", (64, 256), 2),
        ('{"sink_size": null, "recent_size": 512}', (64, 512), 1),
    ],
)
def test_missing_window_is_assumed_with_a_note(tmp_path, config, window, notes):
    head_map = HeadMap.load(write_map(tmp_path / "map", "1\t0\n", config))
    assert (head_map.sink_size, head_map.recent_size) == window
    assert len(head_map.notes) == notes


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("1\t0\n1\n", ["full_attention_heads.tsv", "row 2 has 1 columns", "row 1 has 2"]),
        ("1\t0\n\n1\t0\n", ["row 2, column 1 is ''"]),
        ("1\t0\n0.5\tabc\n", ["row 2, column 2 is 'abc'", "not a number"]),
        ("1\t0_5\n", ["row 1, column 2 is '0_5'", "not a number"]),
        ("1\t0\n0.5\tnan\n", ["row 2, column 2", "layer 1, KV head 1", "nan", "finite"]),
        ("1\t-inf\n", ["row 1, column 2", "-inf"]),
        ("", ["is empty"]),
    ],
)
def test_damaged_scores_name_file_row_and_column(tmp_path, rows, words):
    with pytest.raises(HeadMapError) as error:
        HeadMap.load(write_map(tmp_path / "map", rows))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("[]", "no JSON object"),
        ('{"sink_size": ', "line 1"),
        ('{"sink_size": -1, "recent_size": 256}', "sink_size -1"),
        ('{"sink_size": 0, "recent_size": 0}', "recent_size 0"),
        ('{"sink_size": 1.5, "recent_size": 256}', "sink_size 1.5"),
        ('{"sink_size": true, "recent_size": 256}', "sink_size True"),
    ],
)
def test_damaged_config_names_the_key(tmp_path, config, word):
    folder = write_map(tmp_path / "map", "1\t0\n", config)
    with pytest.raises(HeadMapError, match=r"config\.json") as error:
        HeadMap.load(folder)
    assert word in str(error.value)


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(HeadMapError, match="not a folder"):
        HeadMap.load(tmp_path / "nowhere")
    with pytest.raises(HeadMapError, match=r"has no full_attention_heads\.tsv"):
        HeadMap.load(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HeadMapError, match="UTF-8"):
        HeadMap.load(tmp_path)


def test_save_never_overwrites_another_map_without_force(tmp_path):
    first, second = random_map(seed=1), random_map(seed=2)
    first.save(tmp_path / "map")
    (tmp_path / "map" / "heads.png").write_bytes(b"kept")
    first.save(tmp_path / "map")  # the same again: nothing to do
    with pytest.raises(HeadMapError, match="another head map"):
        second.save(tmp_path / "map")
    assert HeadMap.load(tmp_path / "map") == first
    second.save(tmp_path / "map", force=True)
    assert HeadMap.load(tmp_path / "map") == second
    assert (tmp_path / "map" / "heads.png").read_bytes() == b"kept"
    assert [p.name for p in tmp_path.iterdir()] == ["map"]


def test_save_leaves_a_models_config_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(HeadMapError, match="not a head map's"):
        random_map().save(tmp_path, force=True)
    assert "LlamaForCausalLM" in (tmp_path / "config.json").read_text()


def test_failed_save_keeps_the_old_map(tmp_path, monkeypatch):
    first = random_map(seed=1)
    first.save(tmp_path / "map")

    def full_disk(path, text):
        path.write_text(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(head_map_folder, "_write_synced", full_disk)
    with pytest.raises(HeadMapError, match="No space left on device"):
        random_map(seed=2).save(tmp_path / "map", force=True)
    assert HeadMap.load(tmp_path / "map") == first
    assert [p.name for p in tmp_path.iterdir()] == ["map"]


def test_shape_check_names_both_shapes():
    head_map = random_map(6, 5)
    head_map.check_shape(6, 5)
    with pytest.raises(HeadMapError, match="my map has 6 layers of 5 KV heads, but the model has 32 of 8"):
        head_map.check_shape(32, 8, "my map")


def test_maps_built_by_hand_are_checked():
    with pytest.raises(HeadMapError, match="layer 0, KV head 1: score nan is not a finite number"):
        HeadMap(((0.5, float("nan")),))
    with pytest.raises(HeadMapError, match="row 2"):
        HeadMap(((0.5, 0.5), (1.0,)))
    with pytest.raises(HeadMapError, match="empty"):
        HeadMap(())


def test_ratio_split_keeps_the_highest_and_breaks_ties_by_layer_and_head():
    head_map = HeadMap(((0.2, 1.0, 1.0), (1.0, 0.9, 1.0)))
    assert head_map.split(retrieval_ratio=0.5).retrieval == ((False, True, True), (True, False, False))
    assert head_map.split(retrieval_ratio=5 / 6).retrieval == ((False, True, True), (True, True, True))
    assert head_map.split(retrieval_ratio=0.0).total_retrieval == 0
    assert head_map.split(retrieval_ratio=1.0).is_full


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.33, 0.5, 0.99, 1.0])
def test_ratio_split_has_the_rounded_count_and_no_dropped_head_scores_higher(ratio):
    head_map = random_map(7, 4, seed=3)
    split = head_map.split(retrieval_ratio=ratio)
    pairs = list(zip(sum(head_map.scores, ()), sum(split.retrieval, ()), strict=True))
    assert split.total_retrieval == round(ratio * 28) == sum(split.num_retrieval)
    assert min([s for s, keep in pairs if keep], default=1.0) >= max([s for s, keep in pairs if not keep], default=0.0)


def test_threshold_split_keeps_scores_at_the_threshold():
    head_map = HeadMap(((0.2, 0.5), (0.49, 1.0)))
    assert head_map.split(threshold=0.2).retrieval == ((True, True), (True, True))
    assert head_map.split(threshold=0.5).retrieval == ((False, True), (False, True))
    assert head_map.split() == head_map.split(threshold=0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"retrieval_ratio": 1.01},
        {"retrieval_ratio": -0.1},
        {"retrieval_ratio": float("nan")},
        {"threshold": 2.0},
        {"threshold": float("nan")},
        {"retrieval_ratio": 0.5, "threshold": 0.5},
    ],
)
def test_impossible_splits_are_refused(arguments):
    with pytest.raises(HeadMapError):
        random_map().split(**arguments)


def test_permutation_puts_retrieval_heads_first_each_kind_ascending():
    split = HeadSplit(((False, True, False, True), (True,) * 4, (False,) * 4))
    assert split.permutation(0) == [1, 3, 0, 2]
    assert split.permutation(1) == split.permutation(2) == [0, 1, 2, 3]
    assert split.num_retrieval == (2, 4, 0)
    assert split.retrieval_heads(0) == [1, 3]
    assert split.streaming_heads(0) == [0, 2]
    assert split.retrieval_ratio == 0.5
    assert not split.is_full


def test_hash_covers_shape_bits_and_window():
    base = HeadSplit(((True, False), (False, True)), 64, 256)
    assert base.hash == hashlib.sha256(b"2x2 1001 64 256").hexdigest()[:16]
    others = [
        HeadSplit(((True, False, False, True),), 64, 256),
        HeadSplit(((True, False), (True, True)), 64, 256),
        HeadSplit(((True, False), (False, True)), 65, 256),
        HeadSplit(((True, False), (False, True)), 64, 255),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 5


def test_full_uniform_and_window():
    assert HeadMap.full(3, 2).split().is_full
    counts = spread_retrieval_heads(32, 8, 0.3)
    assert sum(counts) == round(0.3 * 256)
    assert max(counts) - min(counts) <= 1
    assert HeadMap.uniform(32, 8, 0.3, 1, 2).split().num_retrieval == counts
    assert spread_retrieval_heads(32, 8, 0.5) == (4,) * 32
    widened = random_map().with_window(recent_size=99)
    assert (widened.sink_size, widened.recent_size) == (3, 99)
    with pytest.raises(HeadMapError, match="recent_size"):
        random_map().with_window(recent_size=0)


def test_a_map_that_scored_nothing_is_doubted():
    nothing, flat = HeadMap(((0.1, 0.2), (0.3, 0.0))), HeadMap(((1.0, 1.0), (1.0, 1.0)))
    doubt = nothing.doubts(nothing.split(), by_ratio=False)
    assert len(doubt) == 1 and "no head scores enough" in doubt[0] and "the highest score is 0.3" in doubt[0]
    assert nothing.doubts(nothing.split(0.5), by_ratio=True) == ()
    doubt = flat.doubts(flat.split(0.5), by_ratio=True)
    assert len(doubt) == 1 and "all scores are 1, so they rank nothing" in doubt[0]
    assert flat.doubts(flat.split(), by_ratio=False) == () == flat.doubts(flat.split(1.0), by_ratio=True)
