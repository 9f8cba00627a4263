"""How many selected pages stand in pools of those selected lately: by plain LRU models, and the script."""

from __future__ import annotations

import json

import numpy as np
import torch
from test_hot_pages import Lru

from scripts.quality import selection_hits
from scripts.quality.selection_hits import WARM_STEPS, Pools


def test_the_pools_of_all_sizes_are_lru_models():
    generator, sizes = np.random.default_rng(0), (5, 7, 12, 40)
    pools, models = Pools(sizes), [[Lru(size) for size in sizes] for _ in range(2)]
    asked, hits = 0, [0] * len(sizes)
    for step in range(60):
        lists = [np.sort(generator.choice(30, generator.integers(0, 6), replace=False)) for _ in models]
        pools.step(lists, 30)
        for pages, by_size in zip(lists, models, strict=True):
            missed = [len(model.step(pages.tolist())) for model in by_size]
            if step >= WARM_STEPS:
                asked += len(pages)
                hits = [n + len(pages) - m for n, m in zip(hits, missed, strict=True)]
    assert pools.asked == asked and pools.hits == hits and 0 < hits[0] < hits[1] < hits[2] < hits[3] <= asked
    assert pools.rates() == [n / asked for n in hits]


def test_script_runs(planted, tmp_path):
    out = tmp_path / "out.json"
    base = ["--model", str(planted.path), "--device", "cpu", "--lengths", "4500", "--tokens", "24", "--json", str(out)]
    assert selection_hits.main([*base, "--budgets", "20,8"]) == 0
    rows = json.loads(out.read_text())["lengths"][0]["rows"]
    assert [row["pages"] for row in rows] == [20, 8] and rows[0]["selection"]["pages_per_head"] == 20
    for row in rows:
        heads = row["text"]["asked"] / (24 - WARM_STEPS) / (row["pages"] - 4)
        assert heads == int(heads) > 0
        for kind in ("text", "answers"):
            rates = list(row[kind]["hit_rates"].values())
            assert row[kind]["asked"] == row["text"]["asked"] and rates == sorted(rates) and 0 < rates[-1] <= 1
    assert rows[0]["text"]["hit_rates"]["4"] > 0.9  # nearly all pages of the text


def test_a_page_without_a_slot_is_a_miss():
    pools = Pools([3])
    for _ in range(WARM_STEPS):
        pools.step([np.array([], dtype=np.int64)], 9)
    for pages in ([0, 1, 2], [0, 1, 2], [3], [0], [1]):  # 3 takes 0's slot, and 0 then 1's
        pools.step([torch.tensor(pages).numpy()], 9)
    assert (pools.asked, pools.hits) == (9, [3])
