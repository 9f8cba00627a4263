"""Heads of finite reaches in a head split and in a plan: order, hash, and every byte."""

import hashlib
import random
from dataclasses import replace

import pytest
import torch
from planned_models import LLAMA, SMALL

from longrun.attention.window import WindowAttention
from longrun.errors import HeadMapError
from longrun.kernels import banded_attention
from longrun.patterns.head_split import HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.plan import NoFitError, make_plan
from longrun.plan.report import heads_line
from longrun.specs import attention_spec
from longrun.specs.cache_spec import head_bytes, ring_bytes
from longrun.specs.reach import Reach
from longrun.units import ALL_TOKENS

RING = 32
ROWS = ((RING, 100, ALL_TOKENS, 100), (64, RING, 100, 200), (RING,) * 4)
BUDGET = Budget(device_bytes=4 * 10**9, host_bytes=4 * 10**9, weight_format="int8")


def small_split(seed=0):
    rng = random.Random(seed)
    rows = [[rng.choice((RING, 300, 900, ALL_TOKENS)) for _ in range(4)] for _ in range(6)]
    return HeadSplit.of_reaches(rows, 8, RING)


def test_a_split_knows_its_reaches():
    split = HeadSplit.of_reaches(ROWS, 8, RING)
    assert split.retrieval == ((False, True, True, True), (True, False, True, True), (False,) * 4)
    assert split.permutation(0) == [2, 1, 3, 0]
    assert split.permutation(1) == [3, 2, 0, 1]
    assert split.permutation(2) == [0, 1, 2, 3]
    assert split.retrieval_reaches == ((ALL_TOKENS, 100, 100), (200, 100, 64), ())
    text = f"3x4 011110110000 8 {RING} " + " ".join(str(reach) for row in ROWS for reach in row)
    assert split.hash == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert split.hash != replace(split, reaches=()).hash
    full = HeadSplit.of_reaches(((100, ALL_TOKENS),), 8, RING)
    assert all(map(all, full.retrieval)) and not full.is_full


def test_all_or_the_window_is_a_split_without_reaches():
    rows = ((RING, ALL_TOKENS), (ALL_TOKENS, ALL_TOKENS))
    split = HeadSplit.of_reaches(rows, 8, RING)
    assert split == HeadSplit(((False, True), (True, True)), 8, RING)
    assert split.reaches == split.retrieval_reaches == ()


@pytest.mark.parametrize(
    ("reaches", "words"),
    [
        (((RING, 100),), "of 1 layers of 2 KV heads and not of 2 of 2"),
        (((RING, 100), (RING,)), "row 2 has 1 columns"),
        (((RING, 100), (100, RING)), "layer 1, KV head 0: reach 100 is not a streaming head's with a window of 32"),
        (((RING, RING), (RING, 100)), "layer 0, KV head 1: reach 32 is not a retrieval head's"),
        (((RING, 100), (31, 100)), "too small: it must be at least 32"),
        (((RING, 100), (RING, 100.5)), "is not an integer"),
    ],
)
def test_impossible_reaches(reaches, words):
    with pytest.raises(HeadMapError, match=words):
        HeadSplit(((False, True), (False, True)), 8, RING, reaches)


@pytest.mark.parametrize("capacity", [200, 1000, 4000])
@pytest.mark.parametrize("device_share", [1.0, 0.25])
def test_the_plan_holds_every_head_as_far_as_it_reaches(capacity, device_share):
    split = small_split()
    cache = make_plan(SMALL, BUDGET, capacity, split=split, device_type="cpu", device_share=device_share).cache
    assert cache.reaches == split.retrieval_reaches
    fmt, flat = cache.page_format, [reach for row in split.reaches for reach in row]
    by_hand = 0
    for reach in flat:
        if reach == RING:
            by_hand += min(8 + RING, capacity) * 2 * 32 * 2
            continue
        pooled = max(0, -(-capacity // 64) - 2)  # a sink page, and the newest are in the tail
        window = pooled if reach == ALL_TOKENS else min(pooled, 3 * (-(-(reach - 1) // 64) + 1))
        by_hand += window * fmt.payload_bytes + pooled * fmt.index_bytes + 2 * 64 * 2 * 32 * 2
    assert cache.kv_bytes == by_hand
    one_by_one = [
        ring_bytes(fmt, cache.ring_slots) if reach == RING else head_bytes(Reach(reach, 8, fmt), capacity)
        for reach in flat
    ]
    assert sum(one_by_one) == by_hand
    others = ("marks", "page tables", "fetch buffer")
    assert cache.total_bytes - sum(cache.device_bytes()[name] for name in others) == by_hand
    keeping = flat.count(ALL_TOKENS)
    assert cache.keeping_heads == keeping
    assert cache.host_pages == keeping * (cache.pages_per_head - int(cache.pages_per_head * device_share))


def test_pages_of_heads_that_keep_all_go_to_the_host_and_no_others():
    split = HeadSplit.of_reaches([[ALL_TOKENS, 4096, 256, 256, ALL_TOKENS, 4096, 256, 256]] * 32, 64, 256)
    ctx = 8_000_000
    whole = make_plan(LLAMA, replace(BUDGET, device_bytes=10**12), ctx, split=split)
    assert whole.cache.host_pages == 0
    budget = replace(BUDGET, device_bytes=32 * 10**9, host_bytes=10**12)
    plan = make_plan(LLAMA, budget, ctx, split=split)
    assert plan.cache.host_pages == 64 * plan.cache.host_pages_per_head > 0
    left = budget.device_bytes - plan.device_bytes
    assert 0 <= left < 64 * plan.cache.page_format.payload_bytes
    none = HeadSplit.of_reaches([[4096] * 8] * 32, 64, 256)
    for share in (1.0, 0.0):
        cache = make_plan(LLAMA, budget, ctx, split=none, device_share=share).cache
        assert (cache.host_pages, cache.fetch_pages, cache.keeping_heads) == (0, 0, 0)
    with pytest.raises(NoFitError) as error:
        make_plan(LLAMA, replace(budget, device_bytes=10**10), ctx, split=none)
    assert error.value.host_short == 0
    assert all(suggestion.setting != "retrieval_ratio" for suggestion in error.value.suggestions)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("reach", "heads"), [(300, 1), (60_000, 1), (200_000, 2), (200_000, 8)])
def test_scratch_has_room_for_a_head(device_type, reach, heads):
    split = HeadSplit.of_reaches([[reach] * heads + [256] * (8 - heads)] * 32, 64, 256)
    for capacity in (256, 5000, 10**6):
        plan = make_plan(LLAMA, replace(BUDGET, device_bytes=10**12), capacity, split=split, device_type=device_type)
        spec = plan.attention
        assert heads * spec.scratch_tokens >= min(64 + reach, capacity)
        assert spec.scratch_tokens % 64 == 0
        assert spec.reaches == (min(reach, capacity),)


def test_activations_count_the_masks_of_torch():
    assert attention_spec.BAND_TILE == banded_attention.TILE
    split = HeadSplit.of_reaches([[1000, 600, RING, ALL_TOKENS]] * 6, 8, RING)
    spec = make_plan(SMALL, replace(BUDGET, chunk_size=512), 4000, split=split, device_type="cpu").attention
    plain = replace(spec, reaches=())
    window = WindowAttention()
    for start in (0, 700, 3000):
        bands = [window._plan(start, 512, 8, reach, torch.float32, "cpu") for reach in (1000, 600)]
        masks = sum(tile.mask.nbytes for tile in {id(t.mask): t for band in bands for t in band.tiles}.values())
        assert 0 < masks <= spec.activation_bytes() - plain.activation_bytes()


def test_the_head_line():
    cache = make_plan(SMALL, BUDGET, 1000, split=small_split(), device_type="cpu").cache
    counts = [sum(row.count(reach) for row in small_split().reaches) for reach in (ALL_TOKENS, 900, 300, RING)]
    whole, long, short, ring = counts
    assert min(counts) > 0
    assert heads_line(cache) == (
        f"reaches: {whole} of 24 KV heads all, {long} of 900, {short} of 300; 8 + 32 for the {ring} others"
    )
    few = f"{whole + long + short} of 24 KV heads keep all tokens, the others 8 + {RING}"
    assert heads_line(replace(cache, reaches=())) == few


def test_predicted_times_count_what_heads_see():
    split = small_split()
    cache = make_plan(SMALL, BUDGET, 4000, split=split, device_type="cpu").cache
    for seq_len in (10, 500, 4000):
        flat = [reach for row in split.reaches for reach in row]
        assert cache.paged_tokens(seq_len) == sum(min(seq_len, 8 + reach) for reach in flat if reach > RING)
        assert cache.ring_tokens(seq_len) == flat.count(RING) * min(seq_len, 8 + RING)
