"""From which length on selecting pages saves time: the figures are those of the results, the arithmetic is that of a
hand, and short texts are read whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan_times import QWEN_1_5B, measured_there, plan_of

from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.machine.speeds import DATA_SHEETS
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.crossover import CPU_SCORE, SELECT_LAYER_SECONDS, crossover_pages, data_sheet, select_seconds
from longrun.plan.pages_read import pages_read
from longrun.plan.plan import make_plan
from longrun.plan.report import selection_lines
from longrun.plan.selection import parse_select_from
from longrun.plan.shapes import SHAPES
from longrun.plan.times import token_seconds
from longrun.specs.selection_spec import NEVER, Selection

RESULTS = Path(__file__).parent.parent / "docs" / "results"
H100 = DATA_SHEETS["H100"]


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def plan_8b(capacity=1_000_000, **fields):
    config = ModelConfig.from_dict(SHAPES["Llama-3-8B"], "Llama-3-8B")
    budget = Budget.load("h100-80g").override(**{"pages_per_head": 512, **fields})
    return make_plan(config, budget, capacity, split=HeadMap.uniform(32, 8, 0.5).split(0.5))


def plan_1_5b(capacity, **fields):
    budget = Budget.load("h100-80g").override(**{"pages_per_head": "26%", **fields})
    return make_plan(ModelConfig.from_dict(QWEN_1_5B, "1.5B"), budget, capacity)


def test_choosing_takes_what_the_kernels_take():
    """One layer of 4 or 8 heads of 128 channels."""
    found = results("h200-select-kernels")
    cache, copy = plan_8b().cache, 1e3 * found["ceilings"]["memory_tb_s"]
    rows = [row for row in found["rows"] if row["kernel"] == "score and choose" and "4 bits, lam 0.25" in row["shape"]]
    assert len(rows) == 6
    for row in rows:
        heads, millions = re.match(r"(\d)x4x128, ([\d.]+)M", row["shape"]).groups()
        layer = replace(cache, retrieval_heads=(int(heads),))
        pages = int(heads) * int(float(millions) * 1e6 / 64)
        assert select_seconds(layer, pages, copy) == pytest.approx(1e-6 * row["microseconds"], rel=0.06)


def test_reading_pages_takes_what_the_kernel_takes():
    found, cache = results("h200-kernels"), plan_8b().cache
    rows = [row for row in found["rows"] if row["kernel"] == "k5v3 decode, cuda" and "4x4x128" in row["shape"]]
    (short, long) = (row for row in rows if re.search(r" [\d.]+M", row["shape"]))  # what a launch costs is in both
    by_byte = (long["microseconds"] - short["microseconds"]) / (long["bytes"] - short["bytes"]) / 1e6
    assert 1 / (0.87e9 * 1e3 * found["ceilings"]["memory_tb_s"]) == pytest.approx(by_byte, rel=0.02)
    assert long["bytes"] / (4 * 3_300_000 // 64) == pytest.approx(cache.page_format.page_bytes, rel=0.001)


def test_scoring_on_a_cpu_takes_what_was_measured():
    found = results("cpu-selected-decode-64k-smollm2-135m")
    every, few, some = (row["median_cpu_ms"] for row in found["rows"])
    pages = found["pages"]
    reading = (some - few) / (256 - 64)
    scoring = (few - (every - (pages - 64) * reading)) / pages
    assert scoring / reading == pytest.approx(CPU_SCORE, rel=0.03)


def test_selected_tokens_take_what_a_plan_says():
    for name in ("h200-select-decode-512", "h200-select-decode-512-6m"):
        found = results(name)
        for row in found["rows"]:
            plan = plan_of(found["settings"], row["length"] + 512, pages_per_head=512)
            away = row["pages_on_host"] // plan.cache.keeping_heads
            held = plan.cache.page_format.pooled_pages(row["length"])
            plan = replace(plan, cache=replace(plan.cache, device_pages_per_head=held - away))
            predicted = 1e3 * token_seconds(plan, measured_there(found), row["length"])
            assert predicted == pytest.approx(row["ms"]["median"], rel=0.2)


@pytest.mark.parametrize("pages", [64, 512, 2000])
def test_a_gpu_selects_where_it_saves_more_than_it_costs(pages):
    plan = plan_8b(pages_per_head=pages)
    page, digest = plan.cache.page_format.page_bytes, plan.cache.digest.page_bytes
    reading, scoring = (128 * size / (share * 1e9 * H100.memory_gb_s) for size, share in ((page, 0.87), (digest, 0.74)))
    by_hand = (32 * SELECT_LAYER_SECONDS + pages * reading) / (reading - scoring)
    select_from = plan.attention.selection.select_from
    assert by_hand <= select_from < by_hand + 1
    assert select_from == crossover_pages(plan.cache, Selection(pages), "cuda", H100)
    for seq_len, selects in (((select_from + 1) * 64, False), ((select_from + 1) * 64 + 1, True)):
        read = pages_read(plan, seq_len)
        assert (read.read, bool(read.why_all)) == ((pages, False) if selects else (select_from - 1, True))
    assert pages_read(plan, 1000).line() == (
        f"14 of 14 pages a head read (100.0% of its tokens): steps select from {select_from:,} pages a head on"
    )


def test_a_model_that_reads_all_pages_faster_reads_all_of_them():
    """Qwen2.5-Coder-1.5B on an H200, at both lengths and every budget slower with selection."""
    for length in (30_000, 120_000):
        (found,) = results(f"h200-select-acceptance-{length // 1000}k-qwen2.5-coder-1.5b")["lengths"]
        times = {row["budget"]: min(row["ms"]) for row in found["rows"]}
        assert min(times, key=times.get) == "all"
        plan = plan_1_5b(length)
        assert plan.cache.digest is None and not plan.attention.selects and not plan.attention.selection_bytes()
        assert not selection_lines(plan.attention)
        (line,) = (note for note in plan.notes if note.startswith("select"))
        assert re.fullmatch(
            r"select 26% has no effect: a decoded token reads all pages, as no head has more than [\d,]+, and steps "
            r"select from [\d,]+ pages a head on \(select_from 0: always\)",
            line,
        )
        assert plan.to_dict()["selection"]["select_from"] > plan.attention.listed_pages
        forced = plan_1_5b(length, select_from=0)
        assert not any(note.startswith("select") for note in forced.notes)
        assert forced.attention.selects and forced.cache.digest and forced.device_bytes > plan.device_bytes
        (line,) = selection_lines(forced.attention)
        assert "digests" in line and "select from" not in line
    assert plan_1_5b(1_000_000).attention.selects


def test_pages_on_the_host_are_left_out_sooner():
    """They come over the link, at a few percent of the memory's speed."""
    plan = plan_8b()
    selection, resident = Selection(512), plan.attention.selection.select_from
    away = replace(plan.cache, device_pages_per_head=600, fetch_pages=1)
    assert 600 < crossover_pages(away, selection, "cuda", H100) < 800 < resident
    some = replace(plan.cache, device_pages_per_head=resident + 10, fetch_pages=1)
    assert resident <= crossover_pages(some, selection, "cuda", H100) < resident + 100


def test_a_cpu_has_its_own_crossover():
    cache = plan_8b().cache
    assert crossover_pages(cache, Selection(100), "cpu", H100) == 170  # 100 + 0.41 x 170 <= 170
    assert crossover_pages(cache, Selection.of_share(0.25), "cpu", H100) == 109  # 64 at least
    assert crossover_pages(cache, Selection.of_share(0.8), "cpu", H100) == NEVER
    never = plan_8b(pages_per_head="99%")
    assert never.attention.selection.select_from == NEVER or not never.attention.selects
    assert data_sheet("rtx4090-24g") is DATA_SHEETS["4090"] and data_sheet("cpu") is H100


def test_how_it_is_written():
    assert [parse_select_from(pages) for pages in (0, "0", "2000")] == [0, 0, 2000]
    for pages, words in (
        (-1, "select_from -1 is too small: it must be at least 0"),
        ("x", "select_from 'x' is no number of pages: write it like 2000, or 0"),
        (1.5, "integer"),
    ):
        with pytest.raises(InputError, match=words):
            parse_select_from(pages)
    with pytest.raises(InputError, match="select_from 9 is for decode steps that select pages, and these read all"):
        plan_8b(pages_per_head=None, select_from=9)
    assert plan_8b(pages_per_head="off", select_from=9).attention.selection is None
    assert Budget.parse('[memory]\ngpu = "80 GB"\n[decode]\npages_per_head = 9\nselect_from = 0').select_from == 0
