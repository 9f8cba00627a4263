"""The hot pool under selected decode: no answer depends on it, what it counts, and how it is asked for and planned."""

from dataclasses import replace

import pytest
import torch
from test_gpu_backend import SHAPE, engines
from test_hot_pages import Lru
from test_selected_gpu_backend import IDS, REACHES, by_number, decoded
from tiny_models import save_tiny, tiny_model

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

import longrun
from longrun.errors import ConfigError, InputError
from longrun.kernels.gpu_kernels import reference_kernels
from longrun.machine.speeds import Speeds
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.hot_pool import parse_hot_pool
from longrun.plan.plan import NoFitError, make_plan
from longrun.plan.shapes import config_of
from longrun.plan.times import predict
from longrun.session.session import Session
from longrun.specs.hot_counts import HotCounts

SELECT, PAYLOAD = 5, 8448


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hot")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    return path


def engine_of(folder, slots, scores="full", share=0.2, kernels=None, **changes):
    if slots:
        changes["hot_slots"] = slots
    return engines(folder, scores, share, select=SELECT, kernels=kernels, **changes)[0]


@pytest.mark.parametrize(("scores", "changes"), [("full", {}), ("mixed", {}), ("mixed", {"reaches": REACHES})])
@pytest.mark.parametrize("slots", [SELECT, SELECT + 2, 12])
def test_no_answer_depends_on_it(folder, scores, changes, slots):
    plain, hot = (engine_of(folder, n, scores, **changes) for n in (0, slots))
    assert torch.equal(decoded(plain), decoded(hot))
    hot.cache.check()
    counts = hot.cache.hot.counts()
    assert 0 < sum(counts.missed) < sum(counts.pages) and counts.link_bytes == sum(counts.missed) * 4352


def recording(found):
    """The references; `found` gets every lookup's host pages by head."""
    kernels = reference_kernels()

    def lookup(view, hot):
        lists = [row[:count].long() for row, count in zip(view.pages, view.counts.tolist(), strict=True)]
        found.append([p[t[p] >= view.other_slot].tolist() for p, t in zip(lists, view.table, strict=True)])
        kernels.hot_lookup(view, hot)

    return replace(kernels, hot_lookup=lookup, score_pages=by_number)


def test_it_counts_the_steps_of_the_sequence(folder):
    """Every layer's host pages and misses are those of plain LRU models of its heads."""
    found, slots = [], SELECT + 2
    engine = engine_of(folder, slots, kernels=recording(found))
    engine.run(IDS[:520])
    before = engine.cache.hot.counts()
    assert sum(before.pages) == 0  # neither those of trial runs nor of chunks
    found.clear()
    models = [[Lru(slots) for _ in range(3)] for _ in range(3)]
    expected = [[0, 0] for _ in range(3)]
    for token in IDS[520:580].tolist():
        engine.run_one(token)
        for layer_idx, heads in enumerate(found):
            for model, pages in zip(models[layer_idx], heads, strict=True):
                expected[layer_idx][0] += len(pages)
                expected[layer_idx][1] += len(model.step(pages))
        found.clear()
    counts = engine.cache.hot.counts()
    assert [list(pair) for pair in zip(counts.pages, counts.missed, strict=True)] == expected
    assert all(0 < missed < pages for pages, missed in expected)
    assert counts.since(counts).pages == (0, 0, 0) and counts.since(before) == counts


@pytest.mark.parametrize("right", [True, False])
def test_a_step_thrown_away_counts_nothing_and_changes_no_answer(folder, right):
    plain, ahead = (engine_of(folder, SELECT + 1) for _ in range(2))
    token = 5
    for engine in (plain, ahead):
        engine.run(IDS[:500])
    for step in range(40):
        expected, found = plain.run_one(token), ahead.run_one(token, ahead=True)
        assert torch.equal(expected, found)
        token = int(expected.argmax()) if right or step % 3 else (token + 1) % 97
    counts, others = plain.cache.hot.counts(), ahead.cache.hot.counts()
    assert counts.pages == others.pages and (counts.missed == others.missed) == right
    ahead.cache.check()


@pytest.mark.parametrize("ahead", [False, True])
def test_an_estimate_of_what_pages_hold_counts_nothing_and_changes_no_answer(folder, ahead):
    plain, asked = (engine_of(folder, SELECT + 1) for _ in range(2))
    for engine in (plain, asked):
        engine.run(IDS[:505])
    for token in IDS[505:535].tolist():
        shares = asked.caught_mass(token)
        assert (shares is None) == (asked.cache.seq_len % 64 == 0)
        assert shares is None or all(0 < share < 1 for heads in shares for share in heads)
        assert torch.equal(plain.run_one(token), asked.run_one(token, ahead))
    assert plain.cache.hot.counts().pages == asked.cache.hot.counts().pages
    asked.cache.check()


def test_steps_that_read_all_pages_count_nothing(folder):
    """Up to 512 tokens heads have six pages: below the seven from which on steps select."""
    engine = engine_of(folder, SELECT + 2, select_from=7)
    session = Session(engine, None, None, frozenset())
    session.prefill(IDS[:480])
    mark = session.mark()
    session.score(IDS[480:512], one_by_one=True)
    assert sum(session.hot_counts.pages) == 0
    session.score(IDS[512:530], one_by_one=True)
    counts = session.hot_counts
    assert sum(counts.pages) > 0
    session.rewind(mark)
    session.score(IDS[480:500], one_by_one=True)
    assert session.hot_counts == counts
    engine.cache.check()


def test_rewinds_and_other_pages_behind_them(folder):
    """Pages that were dropped come again with another content, on the host as well."""
    found = []
    for slots in (0, SELECT, 12):
        engine = engine_of(folder, slots, share=0.0)
        session = Session(engine, None, None, frozenset())
        session.prefill(IDS[:330])
        marks, rows = [session.mark()], []
        for first, stop in ((330, 520), (60, 300), (400, 600)):
            session.prefill(IDS[first:stop])
            rows += [session.score(IDS[:20], one_by_one=True), session.prefill(IDS[600:622])[None]]
            rows.append(session.score(IDS[622:640], one_by_one=True))
            engine.cache.check()
            session.rewind(marks[0])
            rows.append(session.score(IDS[:9], one_by_one=True))
            session.rewind(marks[0])
        found.append(torch.cat(rows))
    assert all(torch.equal(found[0], rows) for rows in found[1:])


def test_the_check_finds_a_page_that_is_not_its_own(folder):
    engine = engine_of(folder, SELECT)
    decoded(engine, (520, 530))
    hot = engine.cache.hot
    hot.check(0, engine.cache.layers[0][0].places.table, (engine.cache.device_pool, engine.cache.host_pool))
    hot._memory.fill_(7)
    with pytest.raises(AssertionError, match="a page in the hot pool is not what it is"):
        engine.cache.check()


def test_what_a_person_and_a_program_are_told():
    earlier, counts = HotCounts((10, 0), (10, 0), 100), HotCounts((20, 10), (12, 4), 100)
    assert counts.line() == "46.7% of 30 chosen host pages in the hot pool, 1.60 KB fetched"
    found = counts.since(earlier)
    assert (found.pages, found.missed) == ((10, 10), (2, 4))
    expected = {"host_pages_chosen": 20, "hits": 14, "hit_rate": 0.7, "link_bytes": 600}
    assert {name: found.to_dict()[name] for name in expected} == expected
    assert found.since(found).line() == "no host page chosen" and found.since(found).to_dict()["hit_rate"] is None


def test_an_answer_has_its_own_counts(folder):
    """In a report of the chat: those of its steps, neither of the trial runs nor of what was read before."""
    engine = engine_of(folder, SELECT + 1)
    session = Session(engine, None, None, frozenset())
    session.prefill(IDS[:500])
    session.prefill(IDS[500:503], one_by_one=True)
    before = session.hot_counts
    found = list(session.generate(10, eos=False))
    counts = session.hot_counts.since(before)
    again = engine_of(folder, SELECT + 1)
    again.run(IDS[:500])
    for token in (*IDS[500:503].tolist(), *found[:9]):
        again.run_one(token)
    assert sum(before.pages) > 0 and session.hot_counts.pages == again.cache.hot.counts().pages
    assert 0 < sum(counts.missed) < sum(counts.pages)
    assert engine_of(folder, 0).cache.hot is None


def budget(**fields):
    return Budget(80 * 10**9, 100 * 2**30, pages_per_head=512, chunk_size=4096, weight_format="int4").override(**fields)


def plan_8b(capacity=6_000_000, **fields):
    config = config_of("llama-3-8b")[0]
    split = HeadMap.from_scores([[1.0] * 4 + [0.0] * 4] * 32, sink_size=128, recent_size=1024).split(0.5)
    return make_plan(config, budget(**fields), capacity, split=split)


def test_its_bytes_are_planned():
    without, with_pool = plan_8b(), plan_8b(hot_pool=2 * 10**9)
    heads, slots = 128, 2 * 10**9 // (128 * PAYLOAD)
    assert with_pool.cache.hot_slots == slots == 1849 and without.cache.hot_slots == 0
    sizes = {item.name: item.bytes for item in with_pool.items}
    pages = with_pool.cache.pages_per_head
    assert sizes["hot pool"] == heads * slots * PAYLOAD <= 2 * 10**9
    # a place of every page; of a slot its page, its place in the order, of one layer's what is fetched; counts
    assert sizes["hot pool tables"] == 4 * heads * pages + 8 * heads * slots + 8 * 4 * slots + 32 * 4 * (8 + 16)
    assert "hot pool" not in {item.name for item in without.items}
    moved = without.cache.device_pages - with_pool.cache.device_pages
    assert moved * PAYLOAD >= sizes["hot pool"] and with_pool.cache.host_pages == without.cache.host_pages + moved
    assert with_pool.cache.kv_bytes == without.cache.kv_bytes and with_pool.to_dict()["pages"]["hot_per_head"] == slots
    assert with_pool.device_bytes <= 80 * 10**9 and not with_pool.notes


def test_the_times_say_that_what_it_holds_is_not_moved():
    speeds = Speeds("a GPU", 700, 600, 3000, 50, True)
    without, with_pool = (predict(plan_8b(hot_pool=size), speeds) for size in (None, 2 * 10**9))
    assert "each moves 2" in without.line() and "each moves at most 2" in with_pool.line()
    assert (
        with_pool.to_dict()["with_hot_pool"] and with_pool.host_bytes > without.host_bytes
    )  # fewer stand on the device


def test_only_heads_that_keep_every_token_have_slots():
    config, half = config_of("llama-3-8b")[0], ((2**31 - 1,) * 2 + (65536,) * 2 + (256,) * 4,) * 32
    split = longrun.patterns.head_split.HeadSplit.of_reaches(half, 128, 256)
    cache = make_plan(config, budget(hot_pool=2 * 10**9), 9_000_000, split=split).cache
    assert cache.keeping_heads == 64 and cache.hot_slots == 2 * 10**9 // (64 * PAYLOAD)


def test_where_it_is_left_out_a_note_says_why():
    plan = plan_8b(1_000_000, hot_pool=2 * 10**9)
    assert plan.cache.hot_slots == 0
    assert "the hot pool of 2.00 GB is left out: no page stands on the host" in plan.notes
    off = plan_8b(2_000_000, hot_pool=2 * 10**9, pages_per_head="off")
    assert off.cache.hot_slots == 0 and off.attention.selection is None
    assert plan_8b(hot_pool="off").cache.hot_slots == 0


def test_on_a_cpu_host_pages_are_read_in_place(tmp_path):
    save_tiny(tmp_path, "llama", **SHAPE)
    file = Budget(10**9, 10**9, weight_format="fp32", page_size=16, pages_per_head=6, select_from=0, hot_pool=10**7)
    runtime = longrun.load(tmp_path, file, device="cpu", ctx=900, device_share=0.3)
    assert runtime.plan.cache.host_pages and not runtime.plan.cache.hot_slots
    assert "the hot pool of 10.0 MB is left out: host pages are read in place here" in runtime.notices
    without = longrun.load(tmp_path, file, device="cpu", ctx=900, device_share=0.3, hot_pool="off")
    assert not any("hot pool" in notice for notice in without.notices)
    few = longrun.load(tmp_path, file, device="cpu", ctx=90, device_share=0.3)
    assert "the hot pool of 10.0 MB is left out: no step leaves out a page" in few.notices


def test_what_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"hot_pool 500 MB does not hold the 512 pages that a step reads of each of 128"
    ):
        plan_8b(hot_pool=500 * 10**6)
    with pytest.raises(InputError, match="give at least 554 MB, or hot_pool off"):
        plan_8b(hot_pool=553 * 10**6)
    assert plan_8b(hot_pool=554 * 10**6).cache.hot_slots == 512
    with pytest.raises(InputError, match=r"does not hold the 1,563 pages that a step reads of each of 128 heads"):
        plan_8b(10**6, pages_per_head="10%", hot_pool=10**9)
    config = config_of("llama-3-8b")[0]
    plain = Budget(80 * 10**9, hot_pool=10**9)
    with pytest.raises(
        InputError, match=r"hot_pool 1.00 GB is for the pages that decode steps select, and these read all"
    ):
        make_plan(config, plain, 10**5)
    with pytest.raises(NoFitError) as error:
        plan_8b(hot_pool=60 * 10**9)
    assert "--hot-pool off" in error.value.told_by({"--hot-pool"})
    assert "host pages read in place, without a hot pool" in str(error.value)


def test_how_it_is_written():
    assert [parse_hot_pool(size) for size in ("off", "2GB", "1 GiB", 10**9)] == ["off", 2 * 10**9, 2**30, 10**9]
    for size, why in (
        (True, "neither a memory size nor off"),
        ("many", "not a number with a known unit"),
        (-1, "negative"),
    ):
        with pytest.raises(InputError, match=why):
            parse_hot_pool(size)
    start = '[memory]\ngpu = "80 GB"\n[decode]\npages_per_head = 512\nhot_pool = '
    assert Budget.parse(f'{start}"2 GB"').hot_pool == 2 * 10**9 and Budget.parse(f'{start}"off"').hot_pool == "off"
    for text, why in (('"many"', "number with a known unit"), ("true", "is not a memory size"), ("0", "at least 1")):
        with pytest.raises(ConfigError, match=rf"\[decode\] hot_pool = .*{why}"):
            Budget.parse(start + text)
