"""Decode steps that read the best pages of every retrieval head: when that is dense attention, what is read, sessions,
what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.engine.decode_calls import DecodeCalls
from longrun.errors import ConfigError, InputError
from longrun.kernels.cpu_select import CpuSelect
from longrun.kernels.page_view import dequantize_pages
from longrun.lab.planted import make_planted_model
from longrun.needles.needles import Haystack, build_prompt, make_needles
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.pages_read import pages_read
from longrun.plan.selection import parse_select
from longrun.runtime import backend
from longrun.session.keeper import SessionKeeper
from longrun.units import ALL_TOKENS

PAGE, CTX, SINK = 16, 900, 16
SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 192}
MIXED = HeadMap(((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)), SINK, 48)
IDS = torch.randint(0, 97, (CTX,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, "llama", **SHAPE)
    return path


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    save_tiny(path, "llama", num_hidden_layers=1, **SHAPE)
    return path


def load(folder, select=None, head_map=MIXED, ctx=CTX, **options):
    budget = Budget(10**9, host_bytes=10**9, weight_format="fp32", page_size=PAGE, chunk_size=130)
    options.setdefault("select_from", None if select is None else 0)
    return longrun.load(folder, budget, head_map, device="cpu", ctx=ctx, select=select, **options)


def after(runtime, count):
    session = runtime.new_session()
    session.prefill(IDS[:count])
    return session


def lists(runtime, session, layer_idx=0):
    """The page numbers that each head of the layer that ran last read."""
    return lists_of(runtime.engine(session).attention, session.cache.view(layer_idx))


def lists_of(attention, view):
    chosen = attention.selector.chosen(view)
    return [row[:count].tolist() for row, count in zip(chosen.pages, chosen.counts.tolist(), strict=True)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("kv_format", ["k5v3", "int4"])
def test_as_long_as_all_pages_are_chosen_it_is_dense_attention(folder, kv_format, share, compiled):
    options = {"device_share": share, "compiled_kernels": compiled, "kv_format": kv_format}
    dense, selecting = (after(load(folder, select, **options), 380) for select in (None, 24))
    assert selecting.plan.attention.selects and not dense.plan.attention.selects
    rows = [session.score(IDS[380:450], one_by_one=True) for session in (dense, selecting)]
    same = (rows[0] == rows[1]).all(dim=1).tolist()
    # 24 pages, the sink page and a full tail are 416 tokens; the one after them is the first to leave a page out.
    assert all(same[: 416 + 1 - 380]) and not any(same[416 + 1 - 380 :])


def test_chunks_read_everything_even_of_one_token(folder):
    dense, selecting = (load(folder, select, compiled_kernels=False) for select in (None, 6))
    for pieces in ([400, 1, 1, 98, 1], [131, 261, 109]):
        rows = [
            torch.stack([session.prefill(piece) for piece in IDS[: sum(pieces)].split(pieces)])
            for session in (dense.new_session(), selecting.new_session())
        ]
        assert torch.equal(*rows)


@pytest.mark.parametrize("compiled", [True, False])
def test_only_chosen_pages_are_read(one_layer, compiled):
    runtime = load(one_layer, 8, "full", device_share=0.3, compiled_kernels=compiled)
    session = after(runtime, 700)
    mark = session.mark()
    expected = session.prefill(IDS[700:701], one_by_one=True)
    read, cache = lists(runtime, session), session.cache
    newest = cache.layers[0][0].num_pooled - 4
    assert all(
        len(pages) == 8 and pages == sorted(pages) and pages[4:] == [*range(newest, newest + 4)] for pages in read
    )
    table = cache.layers[0][0].places.table
    pools = cache.device_pool, cache.host_pool
    assert any(int(table[head, page]) >= pools[1].first_slot for head, pages in enumerate(read) for page in pages)

    def again(head, pages):
        kept = [pool.storage.clone() for pool in pools]
        for slot in table[head, pages].tolist():
            pool = pools[slot >= pools[1].first_slot]
            pool.storage[slot - pool.first_slot] = 255  # every scale is NaN
        session.rewind(mark)
        found = session.prefill(IDS[700:701], one_by_one=True)
        for pool, storage in zip(pools, kept, strict=True):
            pool.storage.copy_(storage)
        return found

    for head, pages in enumerate(read):
        assert torch.equal(again(head, [page for page in range(newest + 4) if page not in pages]), expected)
        assert not again(head, pages[:1]).isfinite().all()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_share_grows_with_the_text(one_layer, compiled):
    """Buffers hold the share of the full context; a step reads that of the pages it finds, and at least 64."""
    dense, runtime = (load(one_layer, select, "full", ctx=2300, compiled_kernels=compiled) for select in (None, "80%"))
    assert runtime.plan.attention.most_read_pages == 114 and runtime.plan.cache.pages_per_head == 142
    ids = IDS.repeat(3)
    for count, held, read in ((1000, 61, 61), (1300, 80, 64), (2100, 130, 104), (1410, 87, 70)):
        rows = []
        for one in (dense, runtime):
            session = one.new_session()
            session.prefill(ids[:count])
            rows.append(session.prefill(ids[count : count + 1], one_by_one=True))
        pages = session.cache.layers[0][0].num_pooled
        facts = pages_read(session.plan, count + 1)
        assert (pages, facts.held, facts.read) == (held, held, read)
        assert torch.equal(*rows) == (held == read)
        if held > read:
            assert [len(numbers) for numbers in lists(runtime, session)] == [read] * 3


@pytest.mark.parametrize("compiled", [True, False])
def test_short_texts_are_read_whole(folder, compiled):
    """Up to 352 tokens heads have 20 pages; 353 are 21, from which on steps select."""
    dense, some = (
        load(folder, select, compiled_kernels=compiled, select_from=begin) for select, begin in ((None, None), (6, 21))
    )
    rows = [after(runtime, 300).score(IDS[300:400], one_by_one=True) for runtime in (dense, some)]
    assert torch.equal(rows[0][:53], rows[1][:53]) and not torch.equal(*(row[53:] for row in rows))
    rows = [
        after(runtime, 360).score(IDS[360:400], one_by_one=True)
        for runtime in (load(folder, 6, compiled_kernels=compiled), some)
    ]
    assert torch.equal(*rows)
    chunks = [torch.stack([after(runtime, 340).prefill(IDS[340:341])]) for runtime in (dense, some)]
    assert torch.equal(*chunks)
    session = after(some, 340)
    assert (
        pages_read(session.plan, 340).line()
        == "20 of 20 pages a head read (100.0% of its tokens): steps select from 21 pages a head on"
    )
    assert pages_read(session.plan, 353).read == 6


def test_a_cpu_selects_from_where_it_saves_time(folder):
    own = load(folder, 12, select_from=None)
    selection = own.plan.attention.selection
    assert selection.select_from == 21 and own.plan.attention.selects  # 12 + 0.41 x 21 <= 21
    assert load(folder, 6, select_from=None).plan.attention.selection.select_from == 11
    assert own.derive(select_from=0).plan.attention.selection.select_from == 0
    whole = load(folder, 40, select_from=None).plan  # 54 pages at most
    assert whole.attention.selection.select_from == 68 and not whole.attention.selects and whole.cache.digest is None


def test_streaming_heads_are_as_before(one_layer):
    """One layer: its heads' outputs in turn, retrieval heads first."""
    found = []
    for select in (None, 6):
        runtime = load(one_layer, select, HeadMap(((0.0, 1.0, 0.0),), SINK, 48))
        session = after(runtime, 400)
        session.prefill(IDS[400:401], one_by_one=True)
        found.append(runtime.engine(session).decode_step._attention._out.clone())
    assert torch.equal(found[0][2:], found[1][2:]) and not torch.equal(found[0][:2], found[1][:2])


def test_heads_of_finite_reach_choose_among_what_they_hold(folder):
    split = HeadSplit.of_reaches(((ALL_TOKENS, 48, 300), (150, 48, 200), (48, 48, 48)), SINK, 48)
    dense, few = load(folder, None, "full").derive(split), load(folder, 6, "full").derive(split)
    some = load(folder, 24, "full").derive(split)
    a, b, c = (after(runtime, 390) for runtime in (dense, some, few))
    for session in (a, b, c):
        session.prefill(IDS[390:396], one_by_one=True)
    assert torch.equal(a.logits, b.logits) and not torch.equal(a.logits, c.logits)
    pages = c.cache.layers[1][0]
    held = [range(group.oldest, pages.num_pooled) for group in pages.groups for _ in range(group.num_heads)]
    read = lists(few, c, 1)
    assert [len(numbers) for numbers in read] == [6, 6] and [len(numbers) for numbers in held] == [13, 9]
    assert all(set(numbers) <= set(of) and numbers[2:] == [*of[-4:]] for numbers, of in zip(read, held, strict=True))


@pytest.mark.parametrize("compiled", [True, False])
def test_one_by_one_is_what_generate_does(folder, compiled):
    runtime = load(folder, 6, compiled_kernels=compiled)
    session = after(runtime, 500)
    mark = session.mark()
    answer = list(session.generate(40, eos=False))
    session.rewind(mark)
    assert list(session.generate(40, eos=False)) == answer
    session.rewind(mark)
    assert session.score(answer, one_by_one=True).argmax(dim=-1).tolist() == answer
    last = session.logits
    session.rewind(mark)
    assert torch.equal(session.prefill(answer, one_by_one=True), last)
    session.rewind(mark)
    assert not torch.equal(session.prefill(answer), last)  # in a chunk, exactly


def test_sessions_open_under_any_selection(folder, tmp_path):
    runtimes = {select: load(folder, select) for select in (None, 6, 9)}
    saved, expected = after(runtimes[6], 500), {}
    saved.save(tmp_path / "session")
    for select, runtime in runtimes.items():
        expected[select] = after(runtime, 500).score(IDS[500:540], one_by_one=True)
        loaded = runtime.load_session(tmp_path / "session")
        assert torch.equal(loaded.score(IDS[500:540], one_by_one=True), expected[select])
    assert not torch.equal(expected[6], expected[9]) and not torch.equal(expected[None], expected[9])


def test_the_bytes_are_those_planned(folder):
    runtime = load(folder, 6, device_share=0.4)
    session = after(runtime, 500)
    plan, cache = session.plan, session.plan.cache
    assert session.cache.nbytes() == {**cache.device_bytes(), **cache.host_bytes()}
    assert runtime.engine(session).attention.selector.nbytes == plan.attention.decode_bytes() > 0
    assert load(folder).plan.attention.decode_bytes() == 0
    read = pages_read(plan, 500)
    pooled = cache.page_format.pooled_pages(500)
    assert (read.held, read.read) == (pooled, 6) and pooled == 30
    assert read.share == (6 * PAGE + 20) / 500 and pages_read(load(folder).plan, 500) is None
    assert read.line() == "6 of 30 pages a head read (23.2% of its tokens)"


def test_settings_go_all_the_way(folder):
    base = load(folder)
    derived = base.derive(select=7, select_from=0)
    assert derived.plan.attention.selection.pages_per_head == 7
    assert derived.derive(chunk_size=50).plan.attention.selection.pages_per_head == 7
    assert derived.derive(select="off").plan.attention.selection is base.plan.attention.selection is None
    assert torch.equal(
        after(derived, 500).score(IDS[500:540], True), after(load(folder, 7), 500).score(IDS[500:540], True)
    )
    file = Budget(10**9, weight_format="fp32", page_size=PAGE, pages_per_head=7, select_from=0)
    assert longrun.load(folder, file, device="cpu", ctx=CTX).plan.attention.selection.pages_per_head == 7
    assert longrun.load(folder, file, device="cpu", ctx=CTX, select="off").plan.attention.selection is None
    assert longrun.load(folder, file, device="cpu", ctx=CTX, select="9").plan.attention.selection.pages_per_head == 9
    assert not load(folder, CTX // PAGE).plan.attention.selects  # a head never has more pages


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (0, "select 0 is too small: it must be at least 5"),
        (-1, "select -1 is too small"),
        (4, "select 4 is too small"),
        (64.5, "select 64.5 is not an integer"),
        (True, "select True is not an integer"),
        ("many", "select 'many' is neither a number of pages, nor a share of them, nor off: write it like 128 or 25%"),
        ("-7", "select '-7' is neither a number of pages"),
        ("0%", "select '0%' is no share above 0% and up to 100%: write it like 25%"),
        ("101%", "select '101%' is no share"),
        ("x%", "select 'x%' is no share"),
        ("33.333%", "select '33.333%' is finer than hundredths of a percent: write it like 25% or 6.25%"),
    ],
)
def test_what_cannot_be_selected(folder, select, words):
    with pytest.raises(InputError, match=words):
        load(folder, select)
    with pytest.raises(InputError, match=words):
        load(folder).derive(select=select)


def test_what_has_no_pages_to_select(folder, tmp_path):
    assert [parse_select(select) for select in ("off", "128", 128, " 6.25% ")] == ["off", 128, 128, "6.25%"]
    with pytest.raises(InputError, match=r"select 12\.5% needs quantized pages"):
        load(folder, "12.5%", kv_format="bf16")
    with pytest.raises(InputError, match="select 6 needs quantized pages, and those of bf16 are exact: use kv_format"):
        load(folder, 6, kv_format="bf16")
    with pytest.raises(InputError, match="those of fp32 are exact"):
        load(folder, 6).derive(kv_format="fp32")
    with pytest.raises(InputError, match="select 6 chooses among the pages of retrieval heads, and no head is one"):
        load(folder, 6, HeadMap(((0.0,) * 3,) * 3, SINK, 48))
    save_tiny(tmp_path, "llama")
    with pytest.raises(InputError, match="select 6 serves a head_dim of 64 or 128, and the model's is 16: use select"):
        load(tmp_path, 6)
    with pytest.raises(ConfigError, match="selector"):
        Budget(10**9, selector="best")


def by_the_keys(q, view, digest, *, softmax_scale, out, **_):
    """What every page is worth by its keys themselves, in place of `score_pages`."""
    entries, size = int(view.num_entries().max()), view.fmt.page_size
    k, v = torch.zeros(2, view.num_heads, entries * size, view.fmt.head_dim)
    dequantize_pages(view, k, v)
    scores = softmax_scale * q.float() @ k.mT
    out[:, :, :entries] = scores.unflatten(2, (entries, size)).logsumexp(dim=3)
    return out


def by_nothing(q, view, digest, *, out, **_):
    return out.zero_()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_planted_model_finds_its_needles_in_few_pages(tmp_path, monkeypatch, compiled):
    """8 of about 90 pages. Its keys are random from token to token, so that means of 16 say little of them: the pages
    are chosen by the keys themselves, and none is found where the scores say nothing."""
    planted = make_planted_model(tmp_path / "planted")
    options = {"head_map": planted.head_map, "retrieval_ratio": 0.125, "device": "cpu", "compiled_kernels": compiled}
    right = {}
    for score_pages in (by_the_keys, by_nothing):
        monkeypatch.setattr(backend, "score_pages", score_pages)
        later = lambda self, *given, score_pages=score_pages, **more: partial(score_pages, *given, **more)  # noqa: E731
        monkeypatch.setattr(CpuSelect, "prepare_score", later)
        runtime = longrun.load(planted.path, ctx=6200, select=8, select_from=0, device_share=0.5, **options)
        prompt = build_prompt(runtime.tokenizer, Haystack.generated(3), make_needles(4, 3), 6000, [0.1, 0.35, 0.6, 0.8])
        session = runtime.new_session()
        session.prefill(prompt.document_ids)
        end, right[score_pages] = session.mark(), []
        for question in prompt.questions:
            session.rewind(end)
            session.prefill(question.token_ids, one_by_one=True)
            found = list(session.generate(len(question.expected_ids), eos=False))
            right[score_pages].append(found == list(question.expected_ids))
        assert pages_read(session.plan, session.seq_len).share < 0.11
    assert all(right[by_the_keys]) and not any(right[by_nothing])


def test_the_compiled_kernels_choose_what_the_references_choose(folder, tmp_path):
    """And where a KV head has more query heads than the compiled kernels serve, the references choose."""
    read = []
    for compiled in (True, False):
        runtime = load(folder, 8, "full", compiled_kernels=compiled, device_share=0.5)
        session = after(runtime, 600)
        session.prefill(IDS[600:601], one_by_one=True)
        read.append(lists(runtime, session, 2))
    same = [len(set(one) & set(other)) for one, other in zip(*read, strict=True)]
    assert sum(same) >= 3 * 8 - 2  # by rounding one page may come in another's place
    save_tiny(tmp_path, "llama", **SHAPE | {"hidden_size": 576}, num_attention_heads=9, num_key_value_heads=1)
    session = after(load(tmp_path, 8, "full"), 600)
    assert session.prefill(IDS[600:640], one_by_one=True).isfinite().all()


@pytest.mark.parametrize(("compiled", "step"), [(True, DecodeCalls), (False, type(None))])
def test_what_chosen_pages_are_estimated_to_hold(folder, compiled, step):
    """By the scores and lists that the step itself leaves of the last layer; asking changes no answer."""
    asked, other = (after(load(folder, 8, "full", compiled_kernels=compiled), 501) for _ in range(2))
    assert isinstance(asked._engine.decode_step, step)
    found = []
    for _ in range(20):
        caught = asked.caught_mass()
        found.append(caught)
        token = int(asked.logits.argmax())
        rows = [session.prefill(torch.tensor([token]), one_by_one=True) for session in (asked, other)]
        assert torch.equal(*rows)
        if caught is not None:
            attention = asked._engine.attention
            scores, view = attention.selector._scores, asked.cache.view(2)
            listed = view.pages[0, : int(view.counts[0])].tolist()
            mass = scores[:3, :, : len(listed)].double().exp()
            chosen = lists_of(attention, view)
            expected = [
                (of[:, [listed.index(page) for page in pages]].sum(1) / of.sum(1)).mean()
                for of, pages in zip(mass, chosen, strict=True)
            ]
            assert caught.by_layer[2] == pytest.approx([float(share) for share in expected], rel=1e-4)
            assert [len(heads) for heads in caught.by_layer] == [3, 3, 3] and 0.1 < caught.share < 0.99
    asked.cache.check()
    assert [caught is None for caught in found] == [(501 + n) % PAGE == 0 for n in range(20)]


def test_what_is_not_estimated(folder):
    session = load(folder, 8).new_session()
    assert session.caught_mass() is None
    session.prefill(IDS[:30])
    assert (
        after(load(folder), 500).caught_mass() is None
        and after(load(folder, 8, select_from=40), 500).caught_mass() is None
    )
    every = after(load(folder, 40), 500).caught_mass()
    assert every.share == pytest.approx(1) and every.line() == (
        "they hold about 100.0% of the attention to pages, as digests estimate it"
    )


def test_an_attached_session_is_saved_once_after_tokens_read_one_by_one(folder, tmp_path, monkeypatch):
    session = after(load(folder, 6), 300)
    session.attach(tmp_path / "session")
    saved, update = [], SessionKeeper.update
    monkeypatch.setattr(SessionKeeper, "update", lambda self, of: (saved.append(of.seq_len), update(self, of))[1])
    session.prefill(IDS[300:320], one_by_one=True)
    session.prefill(IDS[320:600])
    assert saved == [320, 450, 580, 600]
    with pytest.raises(InputError, match="one_by_one 1 is neither True nor False"):
        session.prefill(IDS[600:601], one_by_one=1)
