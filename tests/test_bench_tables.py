"""The benchmarks' tables come from result files, and the project's are current."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longrun.errors import InputError
from scripts.bench import bench_tables

ENVIRONMENT = {"device": "NVIDIA H100", "torch": "2.11.0", "commit": "0123456789ab", "commit_given": True}
SETTINGS = {
    "retrieval_heads": 128, "kv_heads": 256, "weight_format": "nf4", "kv_format": "int4", "split_note": "a head map",
    "note": None,
}  # fmt: skip
MEMORY = {"used_bytes": 68_000_000_000, "ratio_to_plan": 0.99}
RESULTS = {
    "decode": {
        "settings": SETTINGS, "ceilings": {"memory_tb_s": 3.015}, "rows": [
            {"runner": "longrun", "length": 96_000, "synthetic": True,
             "ms": {"median": 5.0, "min": 0.5, "max": 7.0, "mean": 5.1},
             "ms_repeats": [4.2, 4.0], "ms_tokens": [0.6, 4.9, 7.0, 0.5, 5.0, 5.0],
             "bytes_total": 7_500_000_000, "floor_ms": 2.5, "floor_over_measured": 0.5, "host_overhead_ms": 0.25,
             "memory": MEMORY},
            {"runner": "transformers bf16", "length": 96_000, "synthetic": True,
             "ms": {"median": 30.0, "min": 29.0, "max": 31.0, "mean": 30.1}, "ms_tokens": [29.0, 30.0, 31.0]},
            {"runner": "transformers bf16", "length": 1_000_000, "synthetic": True, "error": "out of memory"},
        ],
    },
    "prefill": {
        "settings": SETTINGS, "ceilings": {"matmul_tflops": 700.0, "attention_tflops": 500.0}, "rows": [
            {"runner": "longrun", "length": 128_000, "seconds": 16.04, "tokens_per_s": 7980.0, "tflops": 300.0,
             "of_matmul": 0.43, "of_matmul_and_attention": 0.51, "needles": [{}, {}, {}], "exact": 3, "memory": MEMORY},
        ],
    },
    "offload": {
        "settings": SETTINGS, "ceilings": {"host_to_device_gb_s": 55.0},
        "agreement": {"equal_tokens": 200, "tokens": 200},
        "rows": [
            {"runner": name, "length": 10**6, "synthetic": True, "ms": {"median": 200.0}, "memory": MEMORY,
             "host_bytes_per_token": count, "link_ms": 180.0, "link_over_measured": 0.9}
            for name, count in (("offloaded", 10**10), ("all resident", 0))
        ],
    },
    "kernels": {
        "rows": [
            {"kernel": "int4 decode", "shape": "4x4x128", "microseconds": 111.2, "bytes": 293_000_000, "flops": None,
             "fraction_of_ceiling": 0.876, "ceiling": "copy"},
            {"kernel": "banded", "shape": "a|b", "microseconds": 50.0, "bytes": None, "flops": 2.5e10,
             "fraction_of_ceiling": 0.3, "ceiling": "matrix product"},
        ],
    },
}  # fmt: skip
EXPECTED = {
    "decode": "| longrun | 96K, synthetic | 5.00 (4.90 to 7.00) | 5.47 | 7.50 GB | 2.50 | 50.0% | 45.7% | 0.25 | "
    "6.00 | 68.0 GB | 99% |",
    "prefill": "| longrun | 128K | 16.0 | 7,980 | 300 | 43.0% | 51.0% | 3 of 3 | 68.0 GB | 99% |",
    "offload": "| all resident | 1M, synthetic | 200.00 | 0 B | 180.00 | 90.0% | 68.0 GB | 99% | 200 of 200 |",
    "kernels": "| banded | a\\|b | 50.0 | 25.0 GFLOP | 30.0% | matrix product |",
}


@pytest.fixture
def document(tmp_path) -> Path:
    """A document with one table of every kind, still empty, and the result files next to it."""
    (tmp_path / "results").mkdir()
    parts = ["# Benchmarks"]
    for kind, result in RESULTS.items():
        file = tmp_path / "results" / f"h100-{kind}.json"
        file.write_text(json.dumps({"benchmark": kind, "environment": ENVIRONMENT, **result}))
        parts.append(f"## {kind}\n\n<!-- table: {kind} results/{file.name} -->\n<!-- /table -->\n\nText after it.")
    page = tmp_path / "page.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def test_tables_are_rendered_from_result_files_and_checked(document, capsys):
    def tables(*more: str) -> int:
        return bench_tables.main(["--document", str(document), *more])

    assert tables("--check") == 1
    assert "python scripts/bench/bench_tables.py" in capsys.readouterr().out
    assert tables() == 0
    text = document.read_text()
    for kind, line in EXPECTED.items():
        assert line in text.splitlines()
        assert f"From [h100-{kind}.json](results/h100-{kind}.json): NVIDIA H100; torch 2.11.0" in text
    assert "commit 0123456789ab (as given)" in text and "3.02 TB/s copied" in text
    assert "| transformers bf16 | 1M, synthetic | out of memory |" in text
    assert "| transformers bf16 | 96K, synthetic | 30.00 (29.00 to 31.00) | 30.00 |" in text
    assert text.count("Text after it.") == 4
    assert tables("--check") == tables() == tables("--check") == 0
    assert document.read_text() == text
    document.write_text(text.replace("5.00 (4.90", "4.00 (4.90"))  # a figure that no file gives
    assert tables("--check") == 1


def test_decode_rows_of_several_formats_name_theirs():
    """Rows of both files stand next to the one peer; a row without its tokens has a range and no mean."""
    rows = [{"runner": "longrun", "length": 96_000, "ms": {"median": 4.0, "min": 3.9, "max": 6.0, "mean": 4.1},
             "bytes_total": 7_500_000_000, "floor_ms": 2.5, "floor_over_measured": 0.625,
             "host_overhead_ms": -0.004}]  # fmt: skip
    other = {"settings": SETTINGS | {"weight_format": "int4"}, "rows": rows}
    first, _, _, last = bench_tables.decode([RESULTS["decode"], other])[1:]
    assert first[0] == "longrun, nf4 weights" and last[0] == "longrun, int4 weights"
    assert last[2:] == ["4.00 (3.90 to 6.00)", "", "7.50 GB", "2.50", "62.5%", "", "0.00", "7.50", "", ""]


def test_rows_of_unlike_pages_name_them_and_turns_of_pages_are_a_table():
    both = [{**RESULTS["decode"], "settings": SETTINGS | {"kv_format": kv}} for kv in ("k5v3", "int4")]
    assert {row[0] for row in bench_tables.decode(both)[1:]} >= {"longrun, k5v3 pages", "longrun, int4 pages"}
    chosen = {**both[0], "settings": SETTINGS | {"kv_format": "k5v3", "selection": {"pages_per_head": 512}}}
    said = {row[0] for row in bench_tables.decode([both[0], chosen])[1:]}
    assert said >= {"longrun, all pages a head", "longrun, 512 pages a head"}
    turns = {
        "length": 64_000,
        "rows": [
            {"kv_format": "int4", "median_seconds": 3.1, "over_int4": 1.0},
            {"kv_format": "k5v3", "median_seconds": 3.1124, "over_int4": 1.003, "of_matmul_and_attention": 0.871},
        ],
    }
    head, *rows = bench_tables.formats([turns])
    assert head == ["pages", "tokens", "seconds, median of turns", "time against int4", "of product and attention"]
    assert rows == [["int4", "64K", "3.100", "100.0%", ""], ["k5v3", "64K", "3.112", "100.3%", "87.1%"]]
    with pytest.raises(InputError, match="two tables"):
        bench_tables.formats([turns, {"length": 1, "rows": [{"weight_format": "nf4", "over_bf16": 1.0}]}])


def test_a_clock_that_runs_through_counts_every_token():
    row = {"ms_repeats": [2.0, 3.0], "ms_tokens": [1.0, 2.0, 3.0, 4.0]}
    assert bench_tables.timed_tokens(row) == [2.0, 4.0]
    assert bench_tables.timed_tokens({**row, "clock_runs_through": True}) == row["ms_tokens"]
    assert bench_tables.timed_tokens({}) == []


def test_tables_that_cannot_be_made(document):
    text = document.read_text()
    for old, new, message in (
        ("table: decode", "table: dances", "'dances'"),
        ("results/h100-decode.json", "results/h100-prefill.json", "of benchmark 'prefill'"),
        ("results/h100-decode.json", "results/nowhere.json", "cannot be read"),
        ("-->\n<!-- /table -->", "-->\n", "not closed"),
    ):
        document.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=message):
            bench_tables.main(["--document", str(document)])


def test_the_projects_tables_are_current():
    assert bench_tables.main(["--check"]) == 0


def least_share(kind: str, row: dict) -> float | None:
    """The share of its ceiling that a row must have; None for other libraries, for selected pages, whose bytes are few,
    and for lengths at which no ceiling is near."""
    if kind == "decode" and "page_digests" in row.get("bytes", {}):
        return None
    if row.get("runner") == "longrun" and "error" not in row:
        if kind == "prefill":
            return 0.9 if row["length"] >= 1_000_000 else 0.75
        if kind == "decode" and row["length"] >= 1_000_000:
            return 0.85
    return row["floor"] if kind == "shares" else None


def test_quoted_results_keep_their_shares():
    """A result with a speed lost is not what a table shows: measure again, or find out what was lost."""
    document, seen = bench_tables.ROOT / "docs" / "benchmarks.md", 0
    for kind, names in re.findall(r"<!-- table: (\w+) (.+?) -->", document.read_text()):
        for name in names.split():
            for row in json.loads((document.parent / name).read_text())["rows"]:
                least = least_share(kind, row)
                if least is None:
                    continue
                (share,) = (
                    row[key] for key in ("of_matmul_and_attention", "floor_over_measured", "share") if key in row
                )
                assert share >= least, (name, row.get("length"), share)
                seen += 1
    assert seen > 15
