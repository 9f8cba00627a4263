"""Quality comparisons on a real GPU, against the CPU's: `pytest -m gpu`. Collected only where there is one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.lab.planted import PlantedModel, make_planted_model
from longrun.lab.quality.eviction import end_prompt, make_session
from longrun.lab.quality.row import REFERENCE_ROW, Row
from scripts.quality import compare, compare_runtimes

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cuda")
# Three query heads a KV head, as the demo model has: neither a power of two nor one.
SHAPE = {"head_dim": 64, "hidden_size": 288, "intermediate_size": 320, "num_attention_heads": 9}
SERVED = {**SHAPE, "hidden_size": 576}  # the fused kernels for one token take multiples of 64 channels
LENGTH = 700

ROWS = """
[[row]]
name = "full int4"

[[row]]
name = "map"
head_map = "{map}"
retrieval_ratio = 0.125

[[row]]
name = "map, other window"
head_map = "{map}"
retrieval_ratio = 0.125
sink_size = 16
recent_size = 128

[[row]]
name = "inverted"
head_map = "inverted:{map}"
retrieval_ratio = 0.5

[[row]]
name = "streaming"
head_map = "streaming"

[[row]]
name = "random"
head_map = "random:{misses}"
retrieval_ratio = 0.25

[[row]]
name = "simulated"
kv = "sim:k4-channel-rot/v4"

[[row]]
name = "SnapKV 25%"
kv = "bf16"
eviction = "snapkv:25%"

[[row]]
name = "SnapKV 100%"
kv = "bf16"
eviction = "snapkv:100%@document"

[[row]]
name = "TOVA 100%"
kv = "bf16"
eviction = "tova:100%"

[[row]]
name = "TOVA 10%"
kv = "bf16"
eviction = "tova:10%"

[[row]]
name = "reference again"
kv = "bf16"
chunk_size = 100
"""


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.isfinite(actual).all()
    return ((actual - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, "llama", **SHAPE)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_tiny(path, "llama", **SERVED)
    return path


def load(folder: Path, device: str, kv: str, weights: str):
    budget = "cpu" if device == "cpu" else "rtx4090-24g"
    return longrun.load(folder, budget, "full", kv, weights, device, ctx=900, chunk_size=150)


def text(count: int, seed: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def kept_positions(session) -> list[list[torch.Tensor]]:
    """A copy of every head's kept positions: TOVA's next step overwrites them, and on a CPU `cpu()` copies nothing."""
    return [[row.clone().cpu() for row in layer.kept_positions()] for layer in session.cache.layers]


def shares_kept(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> list[float]:
    """Of each layer: the share of kept positions that are the same."""
    return [
        sum(len({*a.tolist()} & {*b.tolist()}) / len(a) for a, b in zip(x, y, strict=True)) / len(x)
        for x, y in zip(one, other, strict=True)
    ]


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streamingllm", "pyramidkv", "adakv", "random-1", "tova"])
def test_evicting_sessions_keep_and_say_what_the_cpus_do(folder, method):
    """In float32: the same tokens kept but for rounding, the same logits, the same after a rewind.

    Hardly any two scores of this model are within a thousandth where the line is drawn: rounding moves a token at most.
    """
    rows, kept, later, chosen = {}, {}, {}, {}
    for device in DEVICES:
        session = make_session(load(folder, device, "fp32", "fp32"), method, 120, 800)
        session.prefill(text(500, 1))
        mark = session.mark()
        for seed in (2, 3):  # the second question finds what the first one dropped
            session.rewind(mark)
            session.prefill(text(25, seed))
            end_prompt(session)
        layers, kept[device] = session.cache.layers, kept_positions(session)
        assert sum(sum(layer.counts) for layer in layers) == len(layers) * 3 * (120 if method == "tova" else 120 + 32)
        rows[device] = session.score(text(60, 4)).cpu()
        later[device] = kept_positions(session)
        chosen[device] = list(session.generate(8, eos=False))
        assert session.cache.used_bytes == sum(sum(layer.counts) for layer in layers) * (2 * 64 * 4 + 4)
    for found in (kept, later):
        assert min(shares_kept(found["cpu"], found["cuda"])) > 0.98
    if method == "tova":  # the failing side: tokens read in between change what is kept
        assert max(shares_kept(kept["cpu"], later["cuda"])) < 0.9
    assert rms_ratio(rows["cuda"], rows["cpu"]) < 2e-2
    assert (rows["cuda"].argmax(-1) == rows["cpu"].argmax(-1)).float().mean() > 0.95
    assert len(chosen["cuda"]) == len(chosen["cpu"]) == 8


@pytest.mark.parametrize("method", ["snapkv", "h2o", "adakv", "tova"])
def test_with_room_for_all_tokens_it_is_full_attention_in_bf16(folder, method):
    """The 16-bit attention kernels: key heads shared by three query heads, short questions, single tokens."""
    runtime = load(folder, "cuda", "bf16", "bf16")
    sessions = runtime.new_session(800), make_session(runtime, method, 800, 800, chunk_size=130)
    found = []
    for session in sessions:
        session.prefill(text(500, 1))
        end_prompt(session)
        one_by_one = [session.prefill([token]) for token in text(20, 2)]
        found.append(torch.cat((torch.stack(one_by_one), session.score(text(60, 3)))))
    assert rms_ratio(found[1], found[0]) < 5e-2  # chunks of another size round elsewhere
    cut = make_session(runtime, method, 40, 800)
    cut.prefill(text(500, 1))
    end_prompt(cut)
    assert rms_ratio(cut.score(text(60, 3)), found[0][20:]) > 0.2  # the failing side


def test_a_runtime_over_shared_weights_is_the_loaded_one(served):
    budget = compare_runtimes.comparison_budget("rtx4090-24g", "cuda", 150)
    shared = compare_runtimes.Runtimes(served, None, budget, "cuda", capacity=900)
    reference = shared.get(replace(REFERENCE_ROW, weights="bf16"))  # the budget's own weights are quantized
    row = Row("a", "random:3", 0.4, weights="bf16")
    own = shared.get(row)
    loaded = longrun.load(
        served, budget, row.make_map(3, 3), row.kv, "bf16", "cuda", ctx=900, retrieval_ratio=row.retrieval_ratio
    )  # fmt: skip
    assert own.parts.decoder.layers[0].down is reference.parts.decoder.layers[0].down
    found = []
    for runtime in (own, loaded):
        session = runtime.new_session()
        session.prefill(text(400, 1))
        assert session._engine.decode_step is not None
        found.append(torch.stack([session.prefill([token]) for token in text(30, 2)]))
    assert rms_ratio(found[0], found[1]) < 1e-3
    other = reference.new_session()
    other.prefill(text(400, 1))
    apart = torch.stack([other.prefill([token]) for token in text(30, 2)])
    assert rms_ratio(apart, found[1]) > 1e-2  # the map drops something


def test_an_unnamed_budget_is_of_the_gpu_with_exact_weights(served):
    budget = compare_runtimes.comparison_budget(None, "cuda", None)
    found = compare_runtimes.Runtimes(served, None, budget, None, capacity=900).get(Row("s", "streaming"))
    assert found.plan.device_type == "cuda" and found.plan.weight_format == "bf16"
    assert found.split.total_retrieval == 0
    session = found.new_session()
    session.prefill(text(400, 1))
    assert len(list(session.generate(5, eos=False))) == 5


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("compare") / "planted")


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory) -> dict[str, dict]:
    """results.json of every device: the same rows and questions."""
    from longrun.patterns.baseline_maps import random_map

    layer, head = planted.retrieval_head
    shape = planted.shape.num_layers, planted.shape.num_kv_heads
    misses = next(s for s in range(99) if not random_map(*shape, s).split(retrieval_ratio=0.25).retrieval[layer][head])
    folder = tmp_path_factory.mktemp("out")
    (folder / "rows.toml").write_text(ROWS.format(map=planted.head_map, misses=misses))
    results = {}
    for device in DEVICES:
        out = folder / device
        arguments = [
            "--model", str(planted.path), "--settings", str(folder / "rows.toml"), "--lengths", f"500,{LENGTH}",
            "--depths", "3", "--items", "1", "--texts", "1", "--score-tokens", "48", "--chunk-size", "256",
            "--device", device, "--logits", str(folder / "logits"), "--out", str(out),
        ]  # fmt: skip
        assert compare.main(arguments) == 0
        results[device] = json.loads((out / "results.json").read_text())
        assert (out / "report.md").exists() and not (out / "reference").exists()
    return results


def test_compare_answers_on_the_gpu_as_on_the_cpu(found):
    records = {device: {(r["row"], r["length"], r["group"]): r for r in found[device]["records"]} for device in DEVICES}
    assert records["cpu"].keys() == records["cuda"].keys() and len(records["cpu"]) == 13 * 2 * 4
    for key, cpu in records["cpu"].items():
        cuda = records["cuda"][key]
        assert cuda["kv"]["used"] == cpu["kv"]["used"], key
        if key[2] == "text" or key[0] == "TOVA 10%":  # what TOVA kept of a planted text hangs on rounding
            continue
        exact = [
            [(item["task"], item["depth"], item["expected"], item["exact"]) for item in r["items"]] for r in (cpu, cuda)
        ]
        assert exact[0] == exact[1], key
    answers = [item for r in found["cuda"]["records"] for item in r["items"] if r["row"] == "map" and "exact" in item]
    assert len(answers) == 2 * 12 and all(item["exact"] for item in answers)
    missed = [
        item for r in found["cuda"]["records"] for item in r["items"] if r["row"] == "streaming" and "exact" in item
    ]
    assert not all(item["exact"] for item in missed)


def test_compare_predicts_text_on_the_gpu_as_on_the_cpu(found):
    blocks = {
        device: {(r["row"], r["length"]): r["items"] for r in found[device]["records"] if r["group"] == "text"}
        for device in DEVICES
    }
    for length in (500, LENGTH):
        assert all(block["kl"] == 0 for block in blocks["cuda"]["reference", length])
        for row in ("SnapKV 100%", "TOVA 100%", "reference again"):
            assert all(block["kl"] < 1e-2 for block in blocks["cuda"][row, length]), row
    nll = {
        device: sum(block["nll"] for block in blocks[device]["reference", LENGTH]) / 2 for device in DEVICES
    }  # fmt: skip
    assert nll["cuda"] == pytest.approx(nll["cpu"], rel=0.05)
    assert found["cuda"]["described"]["map"]["weight_format"] == "bf16"
    assert {one["device"] for one in found["cuda"]["described"].values()} == {"cuda"}
