"""The benchmarks run on a CPU with tiny models, count what they say they count, and their tables come from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_case import fixed_ceilings, run, save_bench_model

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.lab import report_env
from longrun.lab.planted import make_planted_model
from longrun.lab.synthetic_session import make_synthetic
from longrun.patterns.head_map import HeadMap
from scripts.bench import (
    bench_common,
    bench_decode,
    bench_kernel_table,
    bench_llama_cpp,
    bench_offload,
    bench_prefill,
    bench_transformers,
    kernel_rows,
)
from scripts.bench import command as bench
from scripts.bench.gpu_timer import Times


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_bench_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def quick(monkeypatch):
    with fixed_ceilings(monkeypatch):
        yield


DECODE = ("--device", "cpu", "--new-tokens", "3", "--repeats", "2")


def test_decode_over_synthetic_caches_beside_transformers(model, capsys, tmp_path, quick):
    lengths = ("--lengths", "1K,2K", "--peer-lengths", "1K", "--retrieval-ratio", "0.5", "--synthetic-cache")
    result = run(capsys, tmp_path, "decode", "--model", model, *DECODE, *lengths)
    assert [(row["runner"].split()[0], row["length"], row["synthetic"]) for row in result["rows"]] == [
        ("longrun", 1000, True), ("longrun", 2000, True), ("transformers", 1000, True),
    ]  # fmt: skip
    for row in result["rows"]:
        assert len(row["ms_tokens"]) == 6 and 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
    first, second, peer = result["rows"]
    assert first["floor_ms"] == pytest.approx(first["bytes_total"] / 10e9 * 1e3)
    assert first["floor_over_measured"] == pytest.approx(first["floor_ms"] / first["ms"]["median"])
    assert second["bytes_total"] > first["bytes_total"] and first["bytes"]["rings"] > 0
    assert first["memory"]["plan_device_bytes"] > first["cache_bytes"]
    assert peer["kv_bytes"] == 2 * 3 * 3 * 32 * 1000 * 4
    settings = result["settings"]
    assert (settings["retrieval_heads"], settings["kv_heads"]) == (4, 9) and "arbitrary" in settings["split_note"]
    assert str(model.parent) not in json.dumps(result)  # folders mean nothing elsewhere


def test_decode_after_a_real_prefill(model, capsys, tmp_path, quick):
    row = run(capsys, tmp_path, "decode", "--model", model, *DECODE, "--lengths", "300")["rows"][0]
    assert row["synthetic"] is False and row["bytes"]["rings"] == 0


def test_the_bytes_of_a_token_are_those_that_the_tensors_hold(model):
    head_map = HeadMap.uniform(3, 3, 0.5, sink_size=8, recent_size=32)
    runtime = longrun.load(model, "cpu", head_map, device="cpu", ctx=1000, retrieval_ratio=0.5)
    session = runtime.new_session()
    make_synthetic(session, 900)
    parts = bench_decode.token_bytes(runtime.config, "fp32", "cpu", session.cache.spec, 900)
    decoder, cache = session._engine.decoder, session.cache
    row = decoder._embedding[0].nbytes
    assert parts["weights"] == decoder.weight_bytes - decoder._embedding.nbytes + row
    rings = pages = index = exact = 0
    for paged, ring in cache.layers:
        rings += ring.k.nbytes + ring.v.nbytes if ring is not None else 0
        if paged is not None:
            pages += paged.num_pages() * cache.spec.page_format.payload_bytes
            index += paged.index[:, : paged.num_pooled].nbytes
            exact += paged.sink_k.nbytes * 2 + 2 * paged.tail_k[:, : paged.fmt.tail_tokens(900)].nbytes
    assert [parts[name] for name in ("page_payloads", "page_index", "sinks_and_tails", "rings")] == [
        pages, index, exact, rings,
    ]  # fmt: skip
    short = bench_decode.token_bytes(runtime.config, "fp32", "cpu", session.cache.spec, 10)
    assert short["page_payloads"] == 0 and short["sinks_and_tails"] == 4 * 10 * 2 * 32 * 2


def test_operations_are_those_of_the_model(model):
    config = ModelConfig.from_dir(model)
    split = HeadMap.uniform(3, 3, 0.5, sink_size=2, recent_size=6).split(0.5)
    found = bench_prefill.prefill_flops(config, split, 500)
    weights = 96 * (6 + 2 * 3) * 32 + 6 * 32 * 96 + 3 * 136 * 96
    assert found["linear"] == 2 * 3 * weights * 500
    pairs = sum(position + 1 for position in range(500))  # what a causal head sees
    heads = split.total_retrieval * 2
    assert found["retrieval_attention"] == pytest.approx(4 * 32 * heads * pairs, rel=0.01)
    window = sum(min(position + 1, 8) for position in range(500))
    assert found["streaming_attention"] == pytest.approx(4 * 32 * (18 - heads) * window, rel=0.01)


def test_prefill_answers_needles_in_the_run_that_is_timed(capsys, tmp_path, quick):
    planted = make_planted_model(tmp_path / "planted")
    result = run(
        capsys, tmp_path, "prefill", "--model", planted.path, "--head-map", planted.head_map, "--retrieval-ratio",
        "0.125", "--device", "cpu", "--lengths", "900", "--chunk-size", "256", "--needles", "2", "--depth", "spread",
    )  # fmt: skip
    row = result["rows"][0]
    assert (row["exact"], len(row["needles"])) == (2, 2)
    assert row["depth"] == [needle["depth"] for needle in row["needles"]] == [0.0, 1.0]
    assert 700 < row["tokens"] <= 900 and len(row["chunk_seconds"]) == -(-row["tokens"] // 256)
    assert sum(row["chunk_seconds"]) == pytest.approx(row["seconds"])
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    assert "planted" in result["settings"]["note"]


@pytest.mark.parametrize(
    ("text", "needles", "expected"),
    [("0.5", 3, 0.5), ("spread", 3, [0.0, 0.5, 1.0]), ("spread", 1, 0.5), ("1,0.25", 2, [1.0, 0.25])],
)
def test_depths_of_needles(text, needles, expected):
    assert bench_prefill.parse_depths(text, needles) == expected


@pytest.mark.parametrize(("text", "said"), [("0,1", "2 depths for 3"), ("1.5", "leaves 0..1"), ("end", "not a depth")])
def test_bad_depths_of_needles(text, said):
    with pytest.raises(bench_prefill.InputError, match=said):
        bench_prefill.parse_depths(text, 3)


def test_prefill_of_random_tokens_beside_transformers(model, capsys, tmp_path, quick):
    argv = ("--device", "cpu", "--lengths", "700", "--peer-lengths", "700", "--chunk-size", "256")
    own, peer = run(capsys, tmp_path, "prefill", "--model", model, *argv)["rows"]
    assert own["tokens"] == 700 and len(own["chunk_seconds"]) == 3 and "needles" not in own
    ideal = own["flops"]["linear"] / 0.1e12 / own["seconds"]
    assert 0 < ideal < own["of_matmul_and_attention"]
    assert own["of_matmul"] == pytest.approx(sum(own["flops"].values()) / own["seconds"] / 0.1e12)
    assert peer["tokens_per_s"] > 0 and "error" not in peer


def test_an_offloaded_session_is_compared_with_a_resident_one(model, capsys, tmp_path, quick):
    argv = ("--length", "60K", "--gpu-budget", "482 MB", "--chunk-size", "64", "--synthetic-cache")
    result = run(capsys, tmp_path, "offload", "--model", model, *DECODE, *argv, "--compare-resident")
    offloaded, resident = result["rows"]
    assert offloaded["host_bytes_per_token"] > 0 == resident["host_bytes_per_token"]
    assert offloaded["host_bytes_per_token"] == pytest.approx(offloaded["host_pool_bytes"], rel=0.05)
    rate = result["ceilings"]["host_to_device_gb_s"] * 1e9
    assert offloaded["link_ms"] == pytest.approx(1e3 * offloaded["host_bytes_per_token"] / rate)
    assert result["agreement"]["all_equal"] and result["agreement"]["tokens"] == 8 + 2 * 3
    with pytest.raises(InputError, match="nothing would be offloaded"):
        bench.main(["offload", "--model", str(model), "--device", "cpu", "--length", "1K", "--gpu-budget", "2 GB"])


def test_page_formats_take_turns(model, capsys, tmp_path, quick):
    argv = ("--device", "cpu", "--length", "200", "--repeats", "2")
    result = run(capsys, tmp_path, "formats", "--model", model, *argv, "--kv-formats", "int4,k5v3")
    assert [row["kv_format"] for row in result["rows"]] == ["int4", "k5v3"]
    assert result["rows"][0]["over_int4"] == 1.0 and all(len(row["seconds"]) == 2 for row in result["rows"])
    for formats in ("int4", "int4,int4", "int4,k6v2"):
        with pytest.raises(InputError, match="--kv-formats"):
            bench.main(["formats", "--model", str(model), *argv, "--kv-formats", formats])


def test_weight_formats_take_turns(model, capsys, tmp_path, quick):
    argv = ("--device", "cpu", "--length", "200", "--weight-formats", "int8,fp32", "--repeats", "2")
    result = run(capsys, tmp_path, "formats", "--model", model, *argv)
    assert [row["weight_format"] for row in result["rows"]] == ["bf16", "int8", "fp32"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    assert result["rows"][0]["over_bf16"] == 1
    for formats in ("bf16", "int8,int8", ""):
        with pytest.raises(InputError, match="--weight-formats"):
            bench.main(["formats", "--model", str(model), *argv[:4], "--weight-formats", formats])


def test_comparing_finds_a_difference():
    logits = torch.tensor([1.0, 2.0])
    found = bench_offload.compare([1, 2, 3, 4], [1, 2, 5, 4], logits, logits + 0.5)
    assert (found["equal_tokens"], found["all_equal"], found["logits_max_difference"]) == (2, False, 0.5)


def test_peer_still_runs(model, capsys, tmp_path, quick):
    result = run(capsys, tmp_path, "peer", "--model", model, "--lengths", "600", "--repeats", "1", "--new-tokens", "2")
    assert result["rows"][0]["runner"] == "transformers"
    assert len(result["rows"]) == 3 and all(row["prefill_ratio"] for row in result["rows"][1:])


def test_a_peer_without_memory_is_a_row(model, capsys, tmp_path, quick, monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 15.9 GiB.\nmore")

    monkeypatch.setattr(bench_transformers.TransformersPeer, "_decode", too_much)
    argv = ("--lengths", "300", "--peer-lengths", "300")
    rows = run(capsys, tmp_path, "decode", "--model", model, *DECODE, *argv)["rows"]
    assert "Tried to allocate 15.9 GiB." in rows[1]["error"] and "error" not in rows[0]

    def defect(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(bench_transformers.TransformersPeer, "_decode", defect)
    file = tmp_path / "broken.json"
    with pytest.raises(RuntimeError, match="shapes"):
        bench.main(["decode", "--model", str(model), *DECODE, *argv, "--json", str(file)])
    left = json.loads(file.read_text())  # what was measured before is not lost
    assert left["complete"] is False and left["rows"][0]["ms"]["median"] > 0 and len(left["rows"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["decode"],
        ["prefill"],
        ["chunks"],
        ["offload", "--gpu-budget", "20 GiB"],
        ["formats"],
        ["real"],
        ["kernels"],
        ["pinning"],
        ["shares"],
    ],
)
def test_without_a_gpu_one_sentence_says_so(command, model):
    argv = command if command[0] in ("kernels", "pinning", "shares") else [*command, "--model", str(model)]
    with pytest.raises(InputError, match="no GPU") as caught:
        bench.main(argv)
    assert "\n" not in str(caught.value)


def test_host_overhead_takes_the_steps_own_time_first():
    assert bench_decode.busy_ms([(0, 1000), (500, 2000), (3000, 4000), (3100, 3200)]) == 3.0
    by_graph = bench_decode.host_overhead(10.0, 8.0, 6.0)
    assert (by_graph["host_overhead_ms"], by_graph["host_overhead_by"]) == (2.0, "replays of the graph")
    by_profiler = bench_decode.host_overhead(10.0, None, 6.0)
    assert (by_profiler["host_overhead_ms"], by_profiler["host_overhead_by"]) == (4.0, "profiler")
    assert bench_decode.host_overhead(10.0, None, None)["host_overhead_ms"] is None


def test_memory_is_counted_from_before_this_process(monkeypatch):
    plan = SimpleNamespace(device_bytes=1000, host_bytes=5, total_bytes=1005)
    watch = bench_common.MemoryWatch(torch.device("cpu"))
    assert watch.measure(plan)["used_bytes"] > 10**7
    watch.device, watch.before = torch.device("cuda"), 300
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4000, 5500))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 900)
    found = watch.measure(plan)
    assert (found["used_bytes"], found["ratio_to_plan"], found["torch_peak_reserved_bytes"]) == (1200, 1.2, 900)


def test_a_kernel_benchmark_that_fails_leaves_the_others(capsys, tmp_path, quick, monkeypatch):
    def fine():
        yield kernel_rows.kernel_row("store", "8 heads", Times(5e-6, 4e-6, 6e-6), num_bytes=25_000)

    def broken():
        yield from fine()
        raise AssertionError("the timed kernel computes [something] else")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_kernel_table, "BENCHMARKS", {"broken": broken, "fine": fine})
    monkeypatch.setattr(bench_kernel_table, "release", lambda device: None)
    monkeypatch.setattr(bench_common, "environment", lambda: {"command": "", "commit": "", "torch": "", "device": ""})
    failed = "AssertionError: the timed kernel computes [something] else"
    result = run(capsys, tmp_path, "kernels", status=1, printed=f"FAILED: broken: {failed}")
    assert [row["benchmark"] for row in result["rows"]] == ["broken", "fine"]  # what was measured before stays
    for row in result["rows"]:
        assert (row["ceiling"], row["fraction_of_ceiling"]) == ("copy", pytest.approx(0.5))
    assert result["ceilings"]["memory_tb_s"] == 0.01
    assert result["problems"] == {"broken": failed}
    assert run(capsys, tmp_path, "kernels", "--only", "fine")["problems"] == {}
    with pytest.raises(InputError, match="nothing is no kernel benchmark"):
        bench.main(["kernels", "--only", "nothing"])


def test_a_given_commit_goes_before_history_and_is_marked(monkeypatch):
    monkeypatch.setenv("LONGRUN_COMMIT", "0123456789ab")
    monkeypatch.setattr(report_env, "_commit", lambda: "fedcba987654")
    found = report_env.environment()
    assert found["commit"] == "0123456789ab" and found["commit_given"] is True
    monkeypatch.delenv("LONGRUN_COMMIT")
    found = report_env.environment()
    assert found["commit"] == "fedcba987654" and "commit_given" not in found
    monkeypatch.setattr(report_env, "_commit", lambda: None)
    found = report_env.environment()
    assert found["commit"] is None and "commit_given" not in found


def test_the_command_is_recorded_without_folders(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", "decode", "--model", "/home/me/a model", "--lengths", "1K"])
    assert report_env.environment()["command"].endswith("scripts/bench.py decode --model 'a model' --lengths 1K")


def test_llama_cpp_beside_longrun(model, capsys, tmp_path, quick, monkeypatch):
    """Its process is played by one that answers in the same way, with the times that it was told."""
    child, gguf = tmp_path / "child.py", tmp_path / "model.gguf"
    child.write_text(
        "import json, sys\n"
        "print(json.dumps({'version': '1', 'system': sys.argv[2:]}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    ids, new_tokens = json.loads(line)\n"
        "    print(json.dumps({'prefill': len(ids), 'decode': new_tokens}), flush=True)\n"
    )
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(bench_llama_cpp, "_CHILD", child)
    load = longrun.load
    monkeypatch.setattr(longrun, "load", lambda found, **options: load(model if found == gguf else found, **options))
    options = ("--lengths", "300,600", "--repeats", "2", "--new-tokens", "4", "--weight-formats", "int4,fp32")
    command = ("llama-cpp", "--model", gguf, "--python", sys.executable, *options)
    result = run(capsys, tmp_path, *command)
    assert result["llama_cpp"]["system"] == [str(torch.get_num_threads()), str(600 + 4 + 8)]
    assert [row["length"] for row in result["rows"]] == [300] * 3 + [600] * 3
    other, packed, exact = result["rows"][:3]
    assert other["prefill_tokens_per_s"] == 1 and other["decode_ms"] == other["best_decode_ms"] == 4000
    for row, name in ((packed, "longrun int4 weights, k5v3, full map"), (exact, "longrun k5v3, full map")):
        assert row["runner"] == name and len(row["decode_runs"]) == 2
        assert row["decode_ratio"] == pytest.approx(sum(4 / seconds for seconds in row["decode_runs"]) / 2)
        assert row["prefill_ratio"] == pytest.approx(sum(300 / seconds for seconds in row["prefill_runs"]) / 2)
    assert packed["decode_of_memory"] > 0

    child.write_text("raise SystemExit('cannot read it')")
    with pytest.raises(InputError, match="cannot read it"):
        bench.main([*map(str, command)])
    with pytest.raises(InputError, match=r"--model .*no GGUF file"):
        bench.main([*map(str, ("llama-cpp", "--model", model, *command[3:]))])
