"""The rows of a comparison: settings that are refused, the shipped ones, and the head maps they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrun.errors import InputError
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.settings import chosen_rows, read_rows, with_maps
from longrun.patterns.head_map import HeadMap
from scripts.quality.compare_options import named_folders

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"must hold \[\[row\]\]"),
        ("[[row]", "is not valid TOML"),
        ("x = 1\n[[row]]\nname = 'a'", r"must hold \[\[row\]\]"),
        ("[[row]]\nkv = 'int4'", "row 1 has no name"),
        ("[[row]]\nname = 'a'\nratio = 0.5", "ratio is unknown"),
        ("[[row]]\nname = 'reference'", "'reference' is taken"),
        ("[[row]]\nname = 'a'\n[[row]]\nname = 'a'", "'a' is taken"),
        ("[[row]]\nname = 'a'\nkv = 'int3'", "kv 'int3' is unknown"),
        ("[[row]]\nname = 'a'\nweights = 'int3'", "weights 'int3' is unknown"),
        ("[[row]]\nname = 'a'\nretrieval_ratio = '1'", "wrong type"),
        ("[[row]]\nname = 'a'\nhead_map = 'random'\nretrieval_ratio = 0.5", "no seed"),
        ("[[row]]\nname = 'a'\nhead_map = 'random:1'", "needs a retrieval_ratio"),
        ("[[row]]\nname = 'a'\nhead_map = 'inverted'", "names no map"),
        ("[[row]]\nname = 'a'\nretrieval_ratio = 0.5", "nothing to choose"),
        ("[[row]]\nname = 'a'\nsink_size = 4", "full has no streaming heads"),
        ("[[row]]\nname = 'a'\nchunk_size = 0", "chunk_size 0 must be at least 1"),
        ("[[row]]\nname = 'a'\nchunk_size = '1K'", "wrong type"),
        ("[[row]]\nname = 'a'\neviction = 'h3o:5'\nkv = 'bf16'", "eviction 'h3o:5' is unknown"),
        ("[[row]]\nname = 'a'\neviction = 'random:5'\nkv = 'bf16'", "'random:5' is unknown: .* random-SEED"),
        ("[[row]]\nname = 'a'\neviction = 'tova:5@document'\nkv = 'bf16'", "is unknown"),
        ("[[row]]\nname = 'a'\neviction = 'tova:2.5'\nkv = 'bf16'", "no whole number"),
        ("[[row]]\nname = 'a'\neviction = 'tova:5'", "use kv bf16"),
        ("[[row]]\nname = 'a'\nhead_map = 'streaming'\neviction = 'tova:5'\nkv = 'bf16'", "use head_map full"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, said):
    path = tmp_path / "rows.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_rows(path)


def test_the_shipped_settings_can_be_read():
    rows = read_rows(ROOT / "scripts" / "quality" / "compare_settings.toml")
    assert {"full int4", "all streaming", "SnapKV 25%", "TOVA 50%"} <= {row.name for row in rows}
    assert rows[:2] == (Row("reference again", kv="bf16", chunk_size=1000), Row("full k5v3", kv="k5v3"))
    evicts = {row.name: row.evicts for row in rows}["SnapKV 25%"]
    assert evicts.keep_tokens(4096) == 1024 and not evicts.at_document
    assert Row("a", kv="bf16", eviction="snapkv:7@document").evicts.keep_tokens(9999) == 7
    rules = [Row("a", kv="bf16", eviction=f"{name}:25%@document") for name in ("h2o", "adakv", "random-3")]
    assert [row.evicts.method for row in rules] == ["h2o", "adakv", "random-3"]
    assert rules[2].method == "random tokens before the question"
    assert REFERENCE_ROW.kv == "bf16" and REFERENCE_ROW.head_map == "full" and REFERENCE_ROW.evicts is None


def test_the_rows_that_select():
    rows = {row.name: row for row in read_rows(ROOT / "scripts" / "quality" / "compare_select.toml")}
    for name, row in rows.items():
        words = name.removesuffix(", questions too").split()
        assert (row.select if row.select else "k5v3") == words[1]
        assert row.select_question == name.endswith("questions too")


def test_maps_of_rows(planted):
    own = HeadMap.load(planted.head_map)
    assert Row("a", str(planted.head_map)).make_map(2, 4) == own
    assert Row("a", f"inverted:{planted.head_map}").make_map(2, 4).scores[0][0] == 1 - own.scores[0][0]
    made = Row("a", "random:3", 0.5, sink_size=5, recent_size=70).make_map(2, 4)
    assert (made.sink_size, made.recent_size) == (5, 70)
    assert Row("a").make_map(2, 4) == "full"
    other = Row("a", str(planted.head_map), sink_size=5, recent_size=70)
    assert other.make_map(2, 4) == own.with_window(5, 70) != own
    assert Row("a", f"inverted:{planted.head_map}", recent_size=70).make_map(2, 4).sink_size == own.sink_size
    assert (Row("a", "x", 0.5).method, Row("a", "x", 0.5, sink_size=5).method) == (
        "map x, k5v3", "map x, k5v3, varied window"
    )  # fmt: skip


def test_names_of_maps_become_folders_and_rows_without_one_are_left_out():
    rows = read_rows(ROOT / "scripts" / "quality" / "compare_reach.toml")
    kept, left_out = with_maps(rows, {"reach": "maps/mine"})
    assert {row.head_map for row in kept if row.reaches_by_share} == {"maps/mine"}
    assert left_out == ["gates 25%", "gates 50%", "reconstruction 25%", "reconstruction 50%"]
    assert len(kept) + len(left_out) == len(rows)
    assert with_maps([Row("a", "inverted:@x", 0.5)], {"x": "m"})[0][0].head_map == "inverted:m"
    with pytest.raises(InputError, match="'reaches' is in no row"):
        with_maps(rows, {"reaches": "maps/mine"})


def test_rows_are_chosen_by_words_of_their_names():
    rows = [Row(name) for name in ("SnapKV 25%", "TOVA 25%", "SnapKV 50%")]
    assert chosen_rows(rows, []) == tuple(rows)
    assert [row.name for row in chosen_rows(rows, ["50%", "TOVA"])] == ["TOVA 25%", "SnapKV 50%"]
    with pytest.raises(InputError, match="'H2O' is in no row's name: they are SnapKV 25%, TOVA 25%"):
        chosen_rows(rows, ["TOVA", "H2O"])


@pytest.mark.parametrize("given", [["reach"], ["=maps"], ["reach="], ["a=b", "a=c"]])
def test_pairs_that_name_no_folder(given):
    with pytest.raises(InputError, match="--head-map"):
        named_folders(given)
    assert named_folders(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
