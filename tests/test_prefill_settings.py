"""Sparse prefill asked for: in budgets, plans, their times, `longrun.load` and `derive`; and where it is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save_tiny

import longrun
from longrun.errors import InputError
from longrun.machine.speeds import Speeds
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_split import HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.plan import NoFitError, make_plan
from longrun.plan.prefill import budget_with_prefill
from longrun.plan.report import prefill_lines
from longrun.plan.shapes import config_of
from longrun.plan.times import predict, read_seconds
from longrun.specs.prefill_spec import PrefillSpec, parse_dense_tokens

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CONFIG = config_of("llama-3-8b")[0]
H100 = Budget(80 * 10**9, 100 * 2**30, chunk_size=32768, weight_format="int4")
SPEEDS = Speeds("a GPU", 700, 600, 3000, 50, True)


def plan_8b(capacity=1_000_000, prefill=None, share=None, mass=None, dense=None, **fields):
    split = HeadMap.from_scores([[1.0] * 4 + [0.0] * 4] * 32, sink_size=128, recent_size=1024).split(0.5)
    budget = budget_with_prefill(H100.override(**fields), prefill, share, mass, dense)
    return make_plan(CONFIG, budget, capacity, split=split)


def test_what_is_given_by_hand_wins_over_the_file():
    file = replace(H100, prefill_mode="sparse", prefill_mass=0.9, prefill_dense=7)
    shared = replace(file, prefill_mass=None, prefill_share=0.1)

    def spec_of(*given, file=file):
        split = HeadMap.from_scores([[1.0] * 8] * 32).split(0.5)
        return make_plan(CONFIG, budget_with_prefill(file, *given), 10**6, split=split).attention.prefill

    assert spec_of(None, None, None, None) == PrefillSpec(mass=0.9, dense_tokens=7)
    assert spec_of("sparse", None, None, "64K") == PrefillSpec(mass=0.9, dense_tokens=64_000)
    assert spec_of(None, "8%", 0.5, 0) == PrefillSpec(mass=0.5, dense_tokens=0, cap=0.08)
    assert spec_of(None, None, None, None, file=shared) == PrefillSpec(dense_tokens=7, cap=0.1)
    assert spec_of(None, 0.4, None, None, file=shared) == PrefillSpec(dense_tokens=7, cap=0.4)
    own = PrefillSpec(mass=0.8, dense_tokens=1000, dense_end=300, cap=0.5, rows=4)
    assert spec_of(own, None, None, None) == spec_of(own, None, None, None, file=shared) == own
    assert spec_of(own, None, 0.85, None) == replace(own, mass=0.85)
    assert spec_of("exact", None, None, None) is None
    named = replace(H100, prefill_mass=0.9)  # a file may say how, and leave it to an option whether
    assert budget_with_prefill(named, None, None, None, None).prefill_mode is None
    assert plan_8b(prefill="sparse", prefill_mass=0.9).attention.prefill == PrefillSpec(mass=0.9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("dense", None, None, None), "prefill 'dense' is unknown: use exact or sparse"),
        ((3, None, None, None), "prefill 3 is unknown: use exact or sparse"),
        (
            ("exact", None, 0.9, None),
            "prefill_mass 0.9 is for sparse prefill, and texts are read exactly: give prefill sparse",
        ),
        ((None, "8%", None, None), "prefill_share '8%' is for sparse prefill"),
        ((None, None, None, "64K"), "prefill_dense '64K' is for sparse prefill"),
        (("sparse", None, 1, None), "mass 1 is outside the range: give a number above 0 and below 1"),
        (("sparse", None, 0, None), "mass 0 is outside the range"),
        (("sparse", None, "much", None), "mass 'much' is not a finite number"),
        (("sparse", 0, None, None), "prefill_share 0 is outside the range"),
        (("sparse", 1.5, None, None), "prefill_share 1.5 is outside the range"),
        (("sparse", "0%", None, None), "prefill_share '0%' is no share above 0% and up to 100%"),
        (("sparse", "few", None, None), "prefill_share 'few' is no share: write it like 25%, or 0.25"),
        (("sparse", None, None, -1), "prefill_dense -1 is too small: it must be at least 0"),
        (("sparse", None, None, "many"), "prefill_dense 'many' is not a number with a known unit"),
        (("sparse", None, None, 1.5), "prefill_dense 1.5 is not an integer"),
        (("sparse", None, None, True), "prefill_dense True is not an integer"),
    ],
)
def test_what_cannot_be_used(given, said):
    with pytest.raises(InputError, match=re.escape(said)):
        budget_with_prefill(H100, *given)


def test_a_number_of_dense_tokens():
    assert [parse_dense_tokens(tokens) for tokens in (0, "0", " 0 ", "0K", 5, "128K")] == [0, 0, 0, 0, 5, 128_000]


def test_what_is_not_served():
    with pytest.raises(InputError, match="prefill sparse on a GPU needs quantized pages, and those of bf16 are exact"):
        plan_8b(prefill="sparse", kv_format="bf16")
    wide = replace(CONFIG, head_dim=96)
    sparse = replace(H100, prefill_mode="sparse")
    with pytest.raises(InputError, match="serves a head_dim of 64 or 128, and the model's is 96: use prefill exact"):
        make_plan(wide, sparse, 10**6)
    on_cpu = replace(sparse, device_bytes=10**12, kv_format="bf16")
    assert make_plan(wide, on_cpu, 10**6, device_type="cpu").attention.prefill == PrefillSpec()


def test_where_it_changes_nothing_a_note_says_why():
    plan = plan_8b(133_120, "sparse")
    assert plan.attention.prefill is None and plan.to_dict()["prefill"] is None
    assert plan.notes == (
        "prefill sparse changes nothing: chunks before token 131,072 and the last 2,048 tokens of a text read all, and "
        "the context has 133,120",
    )
    assert plan_8b(133_121, "sparse").attention.prefill == PrefillSpec() and not plan_8b(133_121, "sparse").notes
    assert not plan_8b(1000).notes
    window = HeadSplit.of_reaches(((65536,) * 4 + (256,) * 4,) * 32, 128, 256)
    plan = make_plan(CONFIG, replace(H100, prefill_mode="sparse"), 10**6, split=window)
    assert plan.attention.prefill is None
    assert "prefill sparse changes nothing: no head keeps all tokens, and only those choose pages" in plan.notes
    some = HeadSplit.of_reaches(((2**31 - 1,) + (65536,) * 3 + (256,) * 4,) * 32, 128, 256)
    assert make_plan(CONFIG, replace(H100, prefill_mode="sparse"), 10**6, split=some).attention.prefill == PrefillSpec()


def test_its_memory_is_planned_and_exact_reading_advised_where_it_is_too_much():
    exact, sparse = plan_8b(), plan_8b(prefill="sparse")
    sizes = {item.name: item.bytes for item in sparse.items}
    assert sizes["sparse prefill"] == sparse.attention.sparse_bytes() > 0
    assert sparse.device_bytes == exact.device_bytes + sizes["sparse prefill"]
    assert "sparse prefill" not in {item.name for item in exact.items}
    with pytest.raises(NoFitError) as error:
        plan_8b(prefill="sparse", device_bytes=sparse.device_bytes - 1, host_bytes=0)
    assert "documents read exactly" in str(error.value)
    assert "--prefill exact" in error.value.told_by({"--prefill"})


def test_the_time_of_reading():
    exact, sparse = plan_8b(), plan_8b(prefill="sparse")
    dense_s, sparse_s = predict(exact, SPEEDS), predict(sparse, SPEEDS)
    assert sparse_s.read_s < 0.5 * dense_s.read_s and sparse_s.token_ms == dense_s.token_ms
    assert "hold what" not in sparse_s.line() + dense_s.line()
    corrected = plan_8b(prefill=PrefillSpec(correct=True, mass=0.95, cap=0.35))
    assert 0.8 * sparse_s.read_s < read_seconds(corrected, SPEEDS, 10**6) < sparse_s.read_s
    assert "if 20% of the pages" in predict(corrected, SPEEDS).line()
    # texts that are too short for it take as long as ever
    assert read_seconds(sparse, SPEEDS, 133_000) == read_seconds(exact, SPEEDS, 133_000)
    # attention to a quarter of the pages, and to each once by a mean of 128: the chunk itself, start and end are dense
    slow = replace(SPEEDS, attention_tflops=1e-3, matmul_tflops=1e9, memory_gb_s=1e9, link_gb_s=1e9)
    n, rings = 1_000_000, (128 + 1024) * 128
    pairs = 128 * (n**2 / 2) + rings * n
    assert read_seconds(exact, slow, n) == pytest.approx(4 * 128 * 4 * pairs / 1e9, rel=0.02)
    chunk = (n - 2048) / 31
    past = sum(chunk * chunk * number for number in range(31) if chunk * number >= 131_072)
    fewer = 128 * past * (1 - 0.25 / 0.83 - 1 / 256 / 0.51 - 0.0026)
    assert read_seconds(sparse, slow, n) == pytest.approx(4 * 128 * 4 * (pairs - fewer) / 1e9, rel=0.02)


def test_the_time_is_that_of_a_measured_run():
    """A million tokens by 15% of the pages, as docs/results/h200-prefill-sparse-1m.json has them."""
    file = json.loads((RESULTS / "h200-prefill-sparse-1m.json").read_text("utf-8"))
    (row,), ceilings = file["rows"], file["ceilings"]
    speeds = Speeds("an H200", ceilings["matmul_tflops"], ceilings["attention_tflops"], 4260, 55, True)
    plan = plan_8b(prefill="sparse", share=0.15, chunk_size=row["chunk_size"])
    assert read_seconds(plan, speeds, row["tokens"]) == pytest.approx(row["seconds"], rel=0.15)


def test_host_pages_come_twice():
    slow_link = replace(SPEEDS, link_gb_s=0.1)
    plans = [plan_8b(6_000_000, prefill, chunk_size=4096) for prefill in (None, "sparse")]
    dense, sparse = (read_seconds(plan, slow_link, 6_000_000) for plan in plans)
    assert sparse == pytest.approx(2 * dense, rel=0.1)


def test_the_plan_command(capsys):
    shared = ["--model", "Llama-3-8B", "--budget", "h100-80g", "--retrieval-ratio", "0.5", "--ctx", "1M"]
    plans = []
    for more in ([], ["--prefill", "sparse"], ["--prefill", "exact"]):
        assert plan_command([*shared, *more, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    dense, sparse, exact = plans
    assert exact == dense and dense["prefill"] is None and dense["times"]["tile_share"] is None
    assert (sparse["prefill"]["mass"], sparse["times"]["tile_share"]) == (None, None)
    assert plan_command([*shared, "--prefill", "sparse", "--prefill-mass", "0.9", "--prefill-dense", "0"]) == 0
    said = capsys.readouterr().out
    assert (
        "documents are read sparsely throughout, the last 2,048 tokens excepted: heads that keep all tokens read 5% to "
        "25% of the pages, as many as hold 90% of the attention" in said
    )
    assert "sparse prefill" in said
    equal = PrefillSpec(cap=0.08, correct=True)
    assert prefill_lines(plan_8b(prefill=equal).attention) == [
        "documents are read sparsely from token 131,072 on, the last 2,048 tokens excepted: heads that keep all tokens "
        "read the 8% of the pages that hold most of the attention, corrected by each middle query"
    ]
    assert plan_command([*shared, "--prefill", "sparse"]) == 0
    assert "documents are read sparsely from token 131,072 on, the last" in capsys.readouterr().out
    for arguments, said in (
        (["--prefill-mass", "0.9"], "prefill_mass 0.9 is for sparse prefill, and texts are read exactly"),
        (["--prefill", "sparse", "--prefill-dense", "x"], "--prefill-dense 'x' is not a number with a known unit"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            plan_command([*shared, *arguments])


def test_load_and_derive(tmp_path):
    save_tiny(tmp_path, "llama")
    own = PrefillSpec(mass=0.8, dense_tokens=200, dense_end=100, newest=1, floor=1)
    runtime = longrun.load(tmp_path, device="cpu", ctx=900, prefill=own)
    assert runtime.new_session().plan.attention.prefill == own
    assert runtime.derive(chunk_size=64).plan.attention.prefill == own
    assert runtime.derive(prefill="exact").plan.attention.prefill is None
    assert runtime.derive(prefill_mass=0.9, prefill_dense="0").plan.attention.prefill == replace(
        own, mass=0.9, dense_tokens=0
    )
    exact = longrun.load(tmp_path, device="cpu", ctx=900)
    assert exact.plan.attention.prefill is None
    assert exact.derive(prefill=own).plan.attention.prefill == own
    short = longrun.load(tmp_path, device="cpu", ctx=900, prefill="sparse")
    assert short.plan.attention.prefill is None
    assert any("prefill sparse changes nothing" in notice for notice in short.notices)
    with pytest.raises(InputError, match=r"prefill_mass 0\.9 is for sparse prefill, and texts are read exactly"):
        exact.derive(prefill_mass=0.9)
    with pytest.raises(InputError, match="prefill 'yes' is unknown: use exact or sparse"):
        longrun.load(tmp_path, device="cpu", ctx=900, prefill="yes")
