"""`bench.py chunks` on a CPU: what it times and counts, and that nothing of bench.py's commands needs Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_case import fixed_ceilings, run, save_bench_model

from longrun.errors import InputError
from scripts.bench import bench_chunks
from scripts.bench import command as bench

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_bench_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def quick(monkeypatch):
    with fixed_ceilings(monkeypatch):
        yield


def test_chunks_are_timed_exact_and_sparse_behind_random_content(model, capsys, tmp_path, quick):
    argv = ("--device", "cpu", "--chunk-size", "256", "--lengths", "4K,8K", "--shares", "all,20%,50%", "--chunks", "2")
    (tmp_path / "b.toml").write_text('[memory]\ngpu = "2 GB"\nhost = "1 GB"\n[weights]\nformat = "fp32"\n')
    argv = (*argv, "--budget", str(tmp_path / "b.toml"))
    result = run(capsys, tmp_path, "chunks", "--model", model, *argv, "--device-share", "1,0.5")
    rows = {(row["share"], row["length"]): row for row in result["rows"] if row["device_share"] == 1}
    hosted = {(row["share"], row["length"]): row for row in result["rows"] if row["device_share"] == 0.5}
    assert len(rows) == len(hosted) == 6 and len(result["rows"]) == 12
    assert all(len(row["chunk_seconds"]) == 2 and row["synthetic"] for row in result["rows"])
    assert rows["all", 4000]["read_share"] is None and rows["all", 4000]["against_exact"] == 1
    pages = (8000 + 256) // 64
    assert rows[0.2, 8000]["read_share"] == pytest.approx(0.2, abs=2 / pages)
    assert rows[0.5, 8000]["read_share"] == pytest.approx(0.5, abs=2 / pages)
    assert 0 < rows[0.2, 8000]["caught_share"] < rows[0.5, 8000]["caught_share"] < 1
    exact, sparse = rows["all", 8000], rows[0.2, 8000]
    assert sparse["against_exact"] == pytest.approx(exact["seconds"] / sparse["seconds"])
    assert "estimated_seconds_of_text" in exact and "estimated_seconds_of_text" not in rows["all", 4000]
    # 9 heads of 32 with 2 query heads each: every token of two chunks sees all before it, one chunk included
    pairs = sum(range(8000 + 256 + 1, 8000 + 3 * 256 + 1))
    assert exact["flops"]["retrieval_attention"] == pytest.approx(4 * 32 * 18 * pairs, rel=0.01)
    assert sparse["dense_flops"] == exact["flops"] and sparse["flops"]["choosing"] > 0
    # what is left are the chunk's own pairs, those of the sink page and the tail, and a fifth of the others
    own = 4 * 32 * 18 * 2 * (256**2 / 2 + 256 * 96)
    past = exact["flops"]["retrieval_attention"] - own
    assert sparse["flops"]["retrieval_attention"] == pytest.approx(own + past / 5, rel=0.05)
    for row in (exact, sparse):
        flops = row["flops"]
        attention = sum(count for name, count in flops.items() if name != "linear")
        ideal = flops["linear"] / 0.1e12 + attention / 0.05e12
        assert row["of_matmul_and_attention"] == pytest.approx(ideal / row["seconds"])
    for key, row in hosted.items():
        assert row["host_pages"] > 0 == rows[key]["host_pages"] and rows[key]["against_resident"] == 1
        assert row["against_resident"] == pytest.approx(row["seconds"] / rows[key]["seconds"])
        assert row["against_exact"] == pytest.approx(hosted["all", key[1]]["seconds"] / row["seconds"])
    with pytest.raises(InputError, match="--prefill sparse says nothing: leave it out"):
        bench.main(["chunks", "--model", str(model), *argv, "--prefill", "sparse"])
    for shares in ("0", "120%", "few"):
        with pytest.raises(InputError, match=f"--shares '{shares}' is no share"):
            bench.main(["chunks", "--model", str(model), *argv, "--shares", shares])


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(model, capsys, tmp_path, quick, monkeypatch):
    (tmp_path / "b.toml").write_text('[memory]\ngpu = "2 GB"\nhost = 0\n[weights]\nformat = "fp32"\n')
    saved = []
    monkeypatch.setattr(bench_chunks, "save", lambda result, args: saved.append(json.loads(json.dumps(result["rows"]))))
    argv = ("--device", "cpu", "--chunk-size", "128", "--lengths", "1K", "--shares", "all", "--chunks", "1")
    argv = (*argv, "--budget", str(tmp_path / "b.toml"), "--device-share", "1,0.5")
    rows = run(capsys, tmp_path, "chunks", "--model", model, *argv, printed="out of memory: ")["rows"]
    assert rows[0]["error"].startswith("out of memory: ") and "seconds" not in rows[0]
    assert (rows[1]["device_share"], rows[1]["host_pages"]) == (1, 0) and rows[1]["tokens_per_s"] > 0
    assert saved == [rows[:1], rows]
    with pytest.raises(InputError, match="device-share"):
        bench.main(["chunks", "--model", str(model), *argv, "--device-share", "1,2"])


def test_what_a_text_takes_is_the_sum_over_its_chunks():
    """Chunks of 10 tokens behind n take 1 + n / 100 seconds: 200 tokens take 20 chunks, 2 seconds each on average."""
    rows = [
        {"share": share, "length": length, "chunk_size": 10, "tokens_per_s": 10 / x, "device_share": 1, "host_pages": 0}
        for share, length, x in (("all", 100, 2.0), ("all", 200, 3.0), (0.5, 100, 1.0), (0.5, 200, 1.5))
    ]
    # half as many pages on the device, in chunks of half as many tokens; and what did not fit
    hosted = {**rows[3], "device_share": 0.5, "host_pages": 9, "chunk_size": 5, "tokens_per_s": 5 / 1.5}
    failed = {"share": "all", "length": 200, "device_share": 0.5, "error": "out of memory"}
    bench_chunks.with_ratios([*rows, hosted, failed])
    assert [row["against_exact"] for row in rows] == [1, 1, 2, 2]
    assert [row["against_resident"] for row in rows] == [1, 1, 1, 1]
    assert (hosted["against_exact"], hosted["against_resident"]) == (None, pytest.approx(2))
    assert "estimated_seconds_of_text" not in hosted and len(failed) == 4
    assert [row.get("estimated_seconds_of_text") for row in rows] == [None, pytest.approx(40), None, pytest.approx(20)]
    twice = [dict(rows[0]), dict(rows[0])]  # a length that was given twice
    bench_chunks.with_ratios(twice)
    assert "estimated_seconds_of_text" not in twice[1]


def test_a_machine_without_triton_has_the_commands(tmp_path):
    """As the README's first command leaves it on a CPU."""
    argv = ["chunks", "--device", "cpu", "--lengths", "1K", "--model", str(tmp_path / "none")]
    code = f"import sys; sys.modules['triton'] = None; from scripts.bench.command import main; main({argv})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "longrun.errors." in done.stderr.splitlines()[-1], done.stderr
