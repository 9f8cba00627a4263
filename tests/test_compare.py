"""A comparison from its settings to its report, on a model that retrieves by construction; stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted_maps import maps_that_miss

import longrun
from longrun.errors import InputError
from longrun.lab.planted import NOTE
from longrun.lab.quality.report import BYTES_PICTURE, RATIO_PICTURE
from longrun.lab.quality.results import QualityResults
from scripts.quality import compare as script

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 700

ROWS = """
[[row]]
name = "map"
head_map = "{map}"
retrieval_ratio = 0.125

[[row]]
name = "inverted"
head_map = "inverted:{map}"
retrieval_ratio = 0.5

[[row]]
name = "streaming"
head_map = "streaming"

[[row]]
name = "random a"
head_map = "random:{misses[0]}"
retrieval_ratio = 0.25

[[row]]
name = "random b"
head_map = "random:{misses[1]}"
retrieval_ratio = 0.25

[[row]]
name = "SnapKV all"
kv = "bf16"
eviction = "snapkv:100%"

[[row]]
name = "TOVA 10%"
kv = "bf16"
eviction = "tova:10%"

[[row]]
name = "again"
kv = "bf16"
chunk_size = 100
"""


@pytest.fixture(scope="module")
def settings_file(planted, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "rows.toml"
    path.write_text(ROWS.format(map=planted.head_map, misses=maps_that_miss(planted)))
    return path


def options(planted, settings_file, out, *more) -> list[str]:
    return [
        "--model", str(planted.path), "--settings", str(settings_file), "--lengths", str(LENGTH), "--depths", "3",
        "--items", "1", "--texts", "1", "--score-tokens", "48", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(planted, settings_file, tmp_path_factory) -> Path:
    """One run of everything."""
    out = tmp_path_factory.mktemp("whole")
    assert script.main(options(planted, settings_file, out)) == 0
    return out


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def items(found: dict, row: str, task: str) -> list[dict]:
    return [item for r in found["records"] if r["row"] == row for item in r["items"] if item.get("task") == task]


def test_the_right_map_keeps_everything_and_the_others_miss_what_is_beyond_the_window(whole):
    found = read(whole)
    for task in ("passkey", "needle", "several", "keyvalue"):
        for row in ("reference", "map", "SnapKV all"):
            asked = items(found, row, task)
            assert sorted(item["depth"] for item in asked) == [0.0, 0.5, 1.0]
            assert all(item["exact"] and item["token_accuracy"] == 1 for item in asked), (row, task)
        for row in ("inverted", "streaming", "random a", "random b"):
            by_depth = {item["depth"]: item["exact"] for item in items(found, row, task)}
            assert by_depth == {0.0: True, 0.5: False, 1.0: True}, (row, task)  # sinks and window see the ends
        assert not any(item["exact"] for item in items(found, "TOVA 10%", task) if item["depth"] == 0.5)
        questions = [[item["expected"] for item in items(found, row["name"], task)] for row in found["rows"]]
        assert all(one == questions[0] for one in questions)  # the same for every row
    described = found["described"]
    assert (described["map"]["retrieval_heads"], described["streaming"]["retrieval_heads"]) == (1, 0)
    assert described["reference"]["kv_format"] == "bf16" and described["map"]["kv_format"] == "k5v3"


def test_the_report_says_so(whole):
    report = (whole / "report.md").read_text()
    assert NOTE in report
    lines = {line[2:].split(":")[0]: line for line in report.splitlines() if line.startswith("- ")}
    assert "exact 100%" in lines["map"] and "no difference to the reference seen" in lines["map"]
    for name in ("inverted", "streaming", "random a", "TOVA 10%", "random map, k5v3, 25% of heads (2 rows)"):
        assert "worse than the reference" in lines[name], lines[name]
    assert "exact 67%" in lines["streaming"]
    assert "-33.3 [" in lines["streaming"]
    for name in (BYTES_PICTURE, RATIO_PICTURE):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    summary = {row["name"]: row for row in read(whole)["summary"]}
    assert summary["streaming"]["tasks"]["needle"]["by_depth"]["0.5"]["value"] == 0
    assert summary["map"]["kv_used"] < 0.6 * summary["reference"]["kv_used"]
    assert summary["TOVA 10%"]["kv_peak"] < 0.25 * summary["reference"]["kv_used"]
    assert summary["SnapKV all"]["kv_peak"] >= summary["SnapKV all"]["kv_used"] > 0.9 * summary["reference"]["kv_used"]


def test_text_is_compared_with_the_reference_distribution(whole):
    found = read(whole)
    blocks = {
        r["row"]: r["items"] for r in found["records"] if r["group"] == "text"
    }  # fmt: skip
    for row, measured in blocks.items():
        assert [block["tokens"] for block in measured] == [32, 16], row
    assert all(block["kl"] == 0 and block["top1"] == 1 for block in blocks["reference"])
    for row in ("SnapKV all", "again"):
        assert all(block["kl"] < 1e-5 and block["top1"] == 1 for block in blocks[row])
    described = found["described"]
    assert described["again"]["chunk_size"] == 100 < described["reference"]["chunk_size"]
    assert described["again"]["method"] == "full, bf16, chunks of 100"
    assert max(block["kl"] for block in blocks["TOVA 10%"]) > 1e-3
    assert (whole / "reference" / f"{LENGTH}-0.npy").stat().st_size == 48 * 4096 * 4 + 128


def untimed(record: dict) -> dict:
    return {key: value for key, value in record.items() if "seconds" not in key and "per_s" not in key}


def test_a_stopped_run_goes_on_and_only_new_rows_are_measured(planted, settings_file, whole, tmp_path, monkeypatch):
    rows = settings_file.read_text().split("[[row]]")
    two, three = tmp_path / "two.toml", tmp_path / "three.toml"
    two.write_text("[[row]]".join(rows[:3]))
    three.write_text("[[row]]".join(rows[:4]))
    more = ["--tasks", "several,text"]
    arguments = options(planted, two, tmp_path / "out", *more)
    monkeypatch.setattr("longrun.lab.quality.report._draw", lambda *given, **named: Path("picture"))
    add = QualityResults.add

    def stopping(self, record):
        add(self, record)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QualityResults, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    before = read(tmp_path / "out")["records"]
    assert [(r["row"], r["group"]) for r in before][-1] == ("map", "several")
    # begun by a version whose pages were others: half a row of each would be no row
    path = tmp_path / "out" / "results.json"
    held = path.read_text()
    other = json.loads(held)
    assert other["described"]["map"].pop("kv_rotated") == "keys and values"
    path.write_text(json.dumps(other))
    with pytest.raises(
        InputError, match=r'row map measured with kv_rotated = null, now it is "keys and values": .* --force'
    ):
        script.main(arguments)
    path.write_text(held)
    assert script.main(arguments) == 0
    assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    found = read(tmp_path / "out")
    assert found["records"][:3] == before
    expected = [untimed(record) for record in read(whole)["records"] if record["group"] in ("several", "text")]
    assert [untimed(record) for record in found["records"]] == expected[:8]
    # nothing is missing: only the report is written again
    (tmp_path / "out" / "report.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(script, "measure_retrieval", None)
        assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    assert (tmp_path / "out" / "report.md").exists()
    with pytest.raises(InputError, match=r"row streaming = .* --force"):
        script.main(arguments)
    with pytest.raises(InputError, match="seed = 0, now it is 1"):
        script.main(options(planted, three, tmp_path / "out", *more, "--seed", "1"))
    # the reference's distributions were deleted: its text is measured again for the next row
    measured = []

    def noting(self, record):
        measured.append((record["row"], record["group"]))
        add(self, record)

    monkeypatch.setattr(QualityResults, "add", noting)
    (tmp_path / "out" / "reference" / f"{LENGTH}-0.npy").unlink()
    assert script.main(options(planted, three, tmp_path / "out", *more)) == 0
    assert measured == [("reference", "text")]


def test_a_row_is_described_the_same_after_sessions_of_any_length(planted, settings_file, tmp_path):
    """A prompt shorter than the longest is read in smaller chunks; its row has still not been run otherwise."""
    rows = tmp_path / "rows.toml"
    rows.write_text("[[row]]".join(settings_file.read_text().split("[[row]]")[:2]))
    arguments = options(planted, rows, tmp_path / "out", "--tasks", "several,text")
    arguments[arguments.index("--lengths") + 1] = f"{LENGTH // 2},{LENGTH}"
    assert script.main(arguments) == 0
    found = read(tmp_path / "out")
    assert len(found["records"]) == 2 * 2 * 2
    assert all(one["chunk_size"] > LENGTH for one in found["described"].values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--items", "0"], "--items 0"),
        (["--tasks", "poems"], "'poems' is unknown"),
        (["--score-tokens", "700"], "leaves nothing to read"),
        (["--text", "no-such-file.txt"], "no-such-file.txt is not a file"),
        (["--adapter", "no-such-folder"], "no-such-folder is not a folder"),
        (["--rows", "no-such-row"], "'no-such-row' is in no row's name"),
    ],
)
def test_bad_arguments(planted, settings_file, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        script.main(options(planted, settings_file, tmp_path / "out", *more))


def test_the_adapter_reaches_every_row_and_decides_the_settings(planted, settings_file, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    given = []

    def load(*_, **named):
        given.append(named["adapter"])
        raise KeyboardInterrupt

    monkeypatch.setattr(longrun, "load", load)
    arguments = options(planted, settings_file, tmp_path / "out", "--adapter", str(adapter))
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments)
    assert given == [adapter]
    before = script._folder_checksum(adapter)
    (adapter / "adapter_config.json").write_text("{ }")
    assert script._folder_checksum(adapter) != before
