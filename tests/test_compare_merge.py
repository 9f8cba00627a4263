"""Comparisons of different lengths become one, or are refused with what does not fit; the window's picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from longrun.errors import InputError
from longrun.lab.quality.report import BYTES_PICTURE, RATIO_PICTURE, _lines, write_report
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE_ROW, Row
from longrun.lab.quality.summary import summarize
from longrun.lab.quality.window_picture import WINDOW_PICTURE, windows
from scripts.quality import compare_merge as script

SETTINGS = Path(__file__).resolve().parents[1] / "scripts" / "quality"
ROWS = (REFERENCE_ROW, Row("full int4", kv="int4"), Row("half", "maps/gates", 0.5, "int4"))
ENVIRONMENT = {"commit": "c0ffee", "device": "a GPU", "command": "python compare.py"}


def described(row: Row, chunk_size: int) -> dict:
    full = row.head_map == "full"
    return {
        "method": row.method,
        "split_hash": row.head_map,
        "retrieval_ratio": 1.0 if full else row.retrieval_ratio or 0.0,
        "retrieval_heads": 90 if full else 45,
        "kv_heads": 90,
        "sink_size": row.sink_size or 64,
        "recent_size": row.recent_size or 256,
        "chunk_size": chunk_size,
    }


def record(row: Row, length: int, group: str, items: int, right: int, task: str | None = None) -> dict:
    if group == "text":
        found = [
            {"document": "text/0", "block": i, "tokens": 32, "nll": 2.0, "kl": 0.1, "top1": 0.9} for i in range(items)
        ]
    else:
        found = [
            {"task": task or group, "document": f"{group}/{i}", "depth": 0.5, "expected": str(i), "exact": i < right,
             "token_accuracy": float(i < right)} for i in range(items)
        ]  # fmt: skip
    kv = {"used": length * (50 if row.kv == "bf16" else 15), "peak": length * 60}
    return {"row": row.name, "length": length, "group": group, "items": found, "kv": kv, "commit": "c0ffee"}


def comparison(folder: Path, lengths, items: int, rows=ROWS, chunk_size: int = 1000, **changes) -> Path:
    settings = {
        "lengths": list(lengths), "depths": [0.5], "items": items, "texts": 1, "score_tokens": 64,
        "tasks": ["several", "text"], "text": "docs", "haystack": "generated", "seed": 0, "model_fingerprint": "m",
    }  # fmt: skip
    results = QualityResults.open(folder, settings | changes, [row.to_dict() for row in rows])
    results.head |= {"model": "tiny", "environment": ENVIRONMENT, "notes": []}
    results.head["described"] = {row.name: described(row, chunk_size) for row in rows}
    for row in rows:
        for length in lengths:
            results.add(record(row, length, "several", items, items if row.kv == "bf16" else items - 1))
            results.add(record(row, length, "text", 2, 0))
    write_report(results)
    return folder


def test_a_run_that_went_on_elsewhere_names_every_machine(tmp_path, capsys):
    """Another command alone is no other origin; another machine or commit is, also where parts are merged."""
    folder = comparison(tmp_path / "short", (4000,), 6)
    results = QualityResults.read(folder)
    results.measured_in({**ENVIRONMENT, "command": "again"})
    assert results.environments == [{**ENVIRONMENT, "command": "again"}]
    results.measured_in({**ENVIRONMENT, "device": "another"})
    results.measured_in({**ENVIRONMENT, "device": "another", "commit": "later"})
    assert [(one["device"], one["commit"]) for one in results.environments] == [
        (ENVIRONMENT["device"], ENVIRONMENT["commit"]), ("another", ENVIRONMENT["commit"]), ("another", "later"),
    ]  # fmt: skip
    write_report(results)
    assert (
        script.main([str(folder), str(comparison(tmp_path / "long", (64000,), 3)), "--out", str(tmp_path / "all")]) == 0
    )
    merged = QualityResults.read(tmp_path / "all").head["merged"]
    assert [(part["folder"], part["device"]) for part in merged] == [
        ("short", ENVIRONMENT["device"]), ("short", "another"), ("short", "another"), ("long", ENVIRONMENT["device"]),
    ]  # fmt: skip
    fresh = QualityResults.open(tmp_path / "fresh", {"lengths": [4000]}, [])
    fresh.measured_in(ENVIRONMENT)
    fresh.measured_in({**ENVIRONMENT, "device": "another"})  # nothing was measured before
    assert fresh.environments == [{**ENVIRONMENT, "device": "another"}]


def test_runs_of_different_lengths_become_one(tmp_path, capsys):
    short = comparison(tmp_path / "short", (4000, 8000), 6)
    long = comparison(tmp_path / "long", (64000,), 3, (*ROWS, Row("new", "streaming")), chunk_size=2000, texts=2)
    out = tmp_path / "all"
    assert script.main([str(long), str(short), "--out", str(out)]) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert "new was not measured at 4K (several), 4K (text), 8K (several), 8K (text)" in told
    found, parts = QualityResults.read(out), [QualityResults.read(folder) for folder in (short, long)]
    assert found.records == [*sorted(parts[0].records, key=lambda one: one["length"]), *parts[1].records]
    assert len(found.records) == 2 * 2 * 3 + 2 * 4
    assert found.head["settings"]["lengths"] == [4000, 8000, 64000]
    assert (found.settings_at(8000)["items"], found.settings_at(64000)["items"]) == (6, 3)
    assert found.settings_at(64000)["texts"] == 2 and found.head["settings"]["seed"] == 0
    assert [row["name"] for row in found.head["rows"]] == ["reference", "full int4", "half", "new"]
    assert found.head["described"]["half"] == described(ROWS[2], 2000)
    assert [part["folder"] for part in found.head["merged"]] == ["long", "short"]
    for length in (4000, 64000):  # every number is that of the single run
        part = parts[length == 64000]
        assert summarize(found, ["half"], "half", length) == summarize(part, ["half"], "half", length)
    report = (out / "report.md").read_text()
    assert "4K, 8K: 6 question(s)" in report and "64K: 3 question(s)" in report and "2 text(s)" in report
    assert "Items of a row: 6 several needles, 2 text (blocks)." in report
    assert "Items of a row: 3 several needles, 2 text (blocks)." in report
    for name in (BYTES_PICTURE, RATIO_PICTURE):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not (out / WINDOW_PICTURE).exists()
    again = comparison(tmp_path / "longer", (128000,), 2)
    assert script.main([str(out), str(again), "--out", str(out)]) == 0  # a joint result grows
    grown = QualityResults.read(out)
    assert grown.head["settings"]["lengths"] == [4000, 8000, 64000, 128000]
    assert grown.settings_at(4000)["items"] == 6 and grown.settings_at(128000)["items"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": (4000, 16000)}, r"short and .*other both hold 4K tokens"),
        ({"seed": 1}, r'other was run with seed = 1 and .*short with 0'),
        ({"model_fingerprint": "n"}, r'model_fingerprint = "n"'),
        ({"chunk_size_setting": 5}, r"chunk_size_setting = 5 and .* null"),
        ({"rows": (*ROWS[:2], Row("half", "maps/gates", 0.25))}, r"row half = .*0.25"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named(tmp_path, change, said):
    short = comparison(tmp_path / "short", (4000,), 3)
    other = comparison(tmp_path / "other", **({"lengths": (8000,), "items": 3} | change))
    with pytest.raises(InputError, match=said):
        script.main([str(short), str(other), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_another_map_in_the_same_folder_is_seen(tmp_path):
    short, long = comparison(tmp_path / "short", (4000,), 3), comparison(tmp_path / "long", (8000,), 3)
    found = json.loads((long / "results.json").read_text())
    found["described"]["half"]["split_hash"] = "other"
    (long / "results.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r'row half with split_hash = "other"'):
        script.main([str(short), str(long), "--out", str(tmp_path / "out")])


def test_folders_without_results_or_with_their_own_are_refused(tmp_path):
    short, long = comparison(tmp_path / "short", (4000,), 3), comparison(tmp_path / "long", (8000,), 3)
    with pytest.raises(InputError, match=r"nowhere.results.json cannot be read"):
        script.main([str(short), str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    before = (long / "results.json").read_text()
    with pytest.raises(InputError, match="is a comparison of its own"):
        script.main([str(short), str(long), "--out", str(long)])
    assert (long / "results.json").read_text() == before
    damaged = json.loads(before)
    damaged["records"].append(damaged["records"][0])
    (long / "results.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="damaged or of another version"):
        script.main([str(short), str(long), "--out", str(tmp_path / "out")])


def test_rows_that_differ_by_their_window_are_drawn_together(tmp_path):
    rows = [Row(f"{s}+{r}", "maps/gates", 0.5, sink_size=s, recent_size=r) for s in (16, 64) for r in (64, 512)]
    others = [Row("all streaming", "streaming"), Row("quarter", "maps/gates", 0.25)]
    folder = comparison(tmp_path / "own", (4000,), 3, (REFERENCE_ROW, *rows, *others))
    results = QualityResults.read(folder)
    assert windows(results) == {row.name: ("gates 50%", row.sink_size, row.recent_size) for row in rows}
    assert (folder / WINDOW_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert any(path.name == WINDOW_PICTURE for path in write_report(results))


def test_the_curve_of_a_map_ends_at_full_attention(tmp_path):
    folder = comparison(
        tmp_path / "own",
        (4000,),
        4,
        (*ROWS, Row("less", "maps/gates", 0.15, "int4"), Row("r", "random:0", 0.5, "int4")),
    )
    results = QualityResults.read(folder)
    rows = [summarize(results, [row["name"]], row["name"], 4000) for row in results.head["rows"]]

    class Panel:
        def __init__(self):
            self.curves, self.colours, self.label = {}, {}, ""

        def errorbar(self, x, y, **_):
            pass

        def plot(self, x, y, color, label=None, **_):
            if label is None:
                self.curves[self.label] = list(x)
            else:
                self.label, self.colours[label] = label, color

    panel = Panel()
    methods = list(dict.fromkeys(row.method for row in rows))
    _lines(panel, rows, methods, lambda row: row.retrieval_ratio, lambda row: row.tasks["all"].exact)
    assert panel.curves["map gates, int4"] == [0.15, 0.5, 1.0]
    assert panel.curves["random map, int4"] == [0.5]
    assert asdict(rows[0])["retrieval_ratio"] == 1.0
    other = Panel()  # a length at which some rows are missing
    _lines(other, rows[-1:], methods, lambda row: row.retrieval_ratio, lambda row: row.tasks["all"].exact)
    assert other.colours == {"random map, int4": panel.colours["random map, int4"]}
    assert 3 < len(set(panel.colours.values())) == len(methods) < 8


def test_the_shipped_tables_are_those_of_the_pages():
    from longrun.lab.quality.settings import read_rows

    split = {row.name: row for row in read_rows(SETTINGS / "compare_split.toml")}
    for name in ("gates", "reconstruction"):
        ratios = [row.retrieval_ratio for row in split.values() if row.method == f"map {name}, int4"]
        assert ratios == [0.75, 0.5, 0.35, 0.25, 0.15]
        assert split[f"inverted {name} 50%"].head_map.startswith("inverted:")
    assert sum(row.method == "random map, int4" for row in split.values()) == 3
    assert [row.evicts.keep for row in split.values() if row.evicts] == [50, 25, 50, 25]
    window = [row for row in read_rows(SETTINGS / "compare_window.toml") if row.sink_size is not None]
    assert {(row.sink_size, row.recent_size) for row in window} == {
        *((sinks, recent) for sinks in (16, 32, 64, 128) for recent in (64, 128, 256, 512)), (64, 1024), (64, 4096),
    }  # fmt: skip
    assert len({row.head_map for row in window}) == len({row.retrieval_ratio for row in window}) == 1
    single = read_rows(SETTINGS / "compare_single.toml")
    assert len(single) < len(split) and all(split[row.name] == row for row in single)
