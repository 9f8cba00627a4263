"""First tokens that no head drops: what is seen, the bytes, sessions, the options, a system prompt's length."""

import json
from dataclasses import replace

import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer
from planned_models import SMALL, SMALL_JSON
from test_kv_bytes import CTX, IDS, LOSSES, RING, SINK, by_masks, off, some_bytes
from test_kv_bytes import load as with_reaches
from tiny_models import save_tiny, save_tokenizer

import longrun
from longrun.errors import ConfigError, HeadMapError, InputError, SessionError
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.plan import NoFitError, choose_split, make_plan
from longrun.plan.reaches import allocated_split, window_of
from longrun.plan.split import parse_keep
from longrun.quant.kv_format import PageFormat
from longrun.specs.cache_spec import head_bytes, ring_bytes
from longrun.specs.reach import Reach
from longrun.text.chat_format import ChatFormat, system_size
from longrun.units import ALL_TOKENS

KEEP = 700
HALF = HeadMap(((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)), SINK, 256)
FILE = '[memory]\ngpu = "1 GB"\n[kv]\nkeep = {}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = save_tiny(folder, "llama")
    save_tokenizer(folder)
    return folder, theirs


def load(folder, **options):
    """Reaches, or without `kv_bytes` rings of 256 tokens."""
    if "kv_bytes" in options:
        return with_reaches(folder, **options)
    given = {"head_map": HALF, "ctx": CTX, "chunk_size": 130, "device": "cpu", "kv_format": "fp32", **options}
    return longrun.load(folder, **given)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["rings", "reaches"])
def test_first_tokens_are_seen_from_everywhere(model, kind, compiled):
    """In odd chunks (of 130 tokens, which end within the tokens kept, too), token by token, and after a rewind."""
    folder, theirs = model
    options = {"kv_bytes": "45%", "ctx": 4000} if kind == "reaches" else {}
    runtime = load(folder, keep=KEEP, compiled_kernels=compiled, **options)
    reaches = runtime.split.all_reaches
    assert min(map(min, reaches)) == (RING if kind == "reaches" else 256)
    if kind == "reaches":
        assert {100, 300, ALL_TOKENS} & {reach for row in runtime.split.reaches for reach in row} > {ALL_TOKENS}
    expected, cut = by_masks(theirs, reaches, IDS, KEEP), 960
    session = runtime.new_session()
    assert off(session.prefill(IDS[:cut]), expected[cut - 1]) < 1e-4
    mark = session.mark()
    singles = torch.stack([session.prefill([token]) for token in IDS[cut:]])
    assert off(singles, expected[cut:]) < 1e-4
    session.rewind(mark)
    assert off(session.prefill(IDS[cut:]), expected[-1]) < 1e-4
    assert off(expected[-1], by_masks(theirs, reaches, IDS)[-1]) > 0.01  # the tokens kept matter


@pytest.mark.parametrize("kv_format", ["fp32", "k5v3"])
@pytest.mark.parametrize("options", [{}, {"kv_bytes": "90%", "ctx": 4000}])
def test_the_cache_holds_the_bytes_that_were_planned(model, kv_format, options):
    folder, _ = model
    runtime = load(folder, kv_format=kv_format, keep=KEEP, **options)
    session = runtime.new_session()
    cache = session.plan.cache
    session.prefill(IDS)
    assert session.cache.nbytes() == {**cache.device_bytes(), **cache.host_bytes()}
    if options:
        full = load(folder, kv_format=kv_format, head_map="full", ctx=4000).plan.cache
        assert cache.kv_bytes <= 0.9 * full.kv_bytes and cache.keeping_heads < 9
    else:
        without = load(folder, kv_format=kv_format).plan.cache
        width = 2 * cache.page_format.head_dim * cache.page_format.exact_itemsize
        assert cache.kv_bytes - without.kv_bytes == 6 * (KEEP - SINK) * width  # of six streaming heads
    assert runtime.plan.split_note.endswith("; no head drops the first 700 tokens")


def test_kv_bytes_pay_for_the_tokens_kept():
    fmt = PageFormat("k5v3", 64, 16)
    plain, kept = (allocated_split(LOSSES, fmt, 40_000, 5 * 10**6, RING, sinks) for sinks in (None, 10_000))
    assert (plain.sink_size, kept.sink_size) == (SINK, 10_000)
    assert LOSSES.lost(kept.all_reaches) > LOSSES.lost(plain.all_reaches) > 0


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("keep", [SINK, 5000, 20_000])
@pytest.mark.parametrize("kv_format", ["int4", "fp32"])
def test_no_allocation_takes_more_than_its_bytes(kv_format, keep, share):
    """Also where a ring, whose tokens are exact, takes more than pages of a longer reach."""
    fmt, capacity = PageFormat(kv_format, 64, 64), 60_000
    full = 9 * head_bytes(Reach(ALL_TOKENS, SINK, fmt), capacity)
    try:
        split = allocated_split(LOSSES, fmt, capacity, int(share * full), sink_size=keep)
    except HeadMapError:
        assert keep > SINK  # not even the first tokens
        return
    rings = ring_bytes(fmt, keep + split.recent_size)
    taken = sum(
        rings if reach == split.recent_size else head_bytes(Reach(reach, keep, fmt), capacity)
        for row in split.all_reaches
        for reach in row
    )
    assert taken <= share * full
    assert HeadSplit.of_reaches(split.all_reaches, keep, window_of(split.all_reaches, LOSSES)) == split


def test_sessions_bring_their_own(model, tmp_path):
    folder, _ = model
    with_keep, without = load(folder, keep=KEEP), load(folder)
    assert with_keep.split.hash != without.split.hash
    expected = {}
    for name, runtime in (("kept", with_keep), ("plain", without)):
        session = runtime.new_session()
        session.prefill(IDS[:900])
        session.save(tmp_path / name)
        expected[name] = session.prefill(IDS[900:950])
    assert not torch.equal(expected["kept"], expected["plain"])
    for name, given, said in (("kept", None, 0), ("kept", 500, 1), ("plain", 500, 1), ("kept", "system", 0)):
        runtime = load(folder, keep=given, session=tmp_path / name)
        assert torch.equal(runtime.load_session(tmp_path / name).prefill(IDS[900:950]), expected[name])
        found = [notice for notice in runtime.notices if f"keep {given} changes nothing in it" in notice]
        assert len(found) == said
    for runtime, name in ((without, "kept"), (with_keep, "plain")):
        with pytest.raises(SessionError, match=r"named \(session=\), and it keeps its first tokens"):
            runtime.load_session(tmp_path / name)
    derived = without.derive(keep=KEEP)
    assert derived.identity == with_keep.identity and derived.identity.keep == KEEP
    assert torch.equal(derived.load_session(tmp_path / "kept").prefill(IDS[900:950]), expected["kept"])
    assert derived.derive(chunk_size=50).split == with_keep.split
    assert derived.derive(HALF, retrieval_ratio=0.2).split.sink_size == KEEP
    assert derived.derive(keep=0).split == without.split


def test_derived_reaches_stay(model):
    folder, _ = model
    base = load(folder, kv_bytes=some_bytes(folder))
    found = base.derive(keep=100)
    assert found.split == replace(base.split, sink_size=100) and found.identity.keep == 100
    with pytest.raises(InputError, match="counted while a model is loaded"):
        base.derive(keep="system")


def test_where_it_changes_nothing(model):
    folder, _ = model
    full = load(folder, head_map="full", keep=KEEP)
    assert full.split == load(folder, head_map="full").split and full.identity.keep is None
    assert "keep 700 changes nothing, as every head keeps all tokens" in full.plan.notes
    as_many = load(folder, keep=SINK)
    assert as_many.split == load(folder).split and as_many.identity.keep is None
    assert "keep 16 changes nothing, as every head keeps 16 of its own" in as_many.plan.notes
    everything = load(folder, kv_bytes="100%", keep=KEEP)
    assert everything.split.is_full and everything.identity.keep is None


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (CTX + 1, r"keep 1,201 is more than the context of 1,200 tokens: give fewer, or a longer context"),
        (-1, "keep -1 is too small"),
        ("many", "keep 'many' is not a number with a known unit"),
        (1.5, "keep 1.5 is not an integer"),
        (True, "keep True is not an integer"),
        ("system", "keep system needs a chat's system prompt, which is not known here: give a number of tokens"),
    ],
)
def test_what_cannot_be_kept(model, keep, words):
    with pytest.raises(InputError, match=words):
        load(model[0], keep=keep)


def test_the_budget_file():
    assert Budget.parse(FILE.format(300)).keep == 300
    assert Budget.parse(FILE.format('"system"')).keep == "system"
    for bad in ("-1", "1.5", "true", '"1K"'):
        with pytest.raises(ConfigError, match=r"\[kv\] keep = .* (must be a whole number|is no number of tokens)"):
            Budget.parse(FILE.format(bad))
    assert [parse_keep(keep) for keep in ("0", 0, "1K", "700", "system")] == [0, 0, 1000, 700, "system"]
    chosen = choose_split(SMALL, Budget.parse(FILE.format(300)), HeadMap.uniform(6, 4, 0.5))
    assert (chosen.split.sink_size, chosen.head_map.sink_size, chosen.keep) == (300, 64, 300)


def test_what_would_fit_keeps_as_many():
    budget = Budget(device_bytes=740 * 10**6, weight_format="int4", chunk_size=64, keep=3000)
    chosen = choose_split(SMALL, budget, HeadMap.uniform(6, 4, 0.75, 8, 32), 0.75)
    with pytest.raises(NoFitError) as error:
        make_plan(SMALL, budget, 400_000, split=chosen, device_type="cpu")
    found = {suggestion.setting: suggestion.value for suggestion in error.value.suggestions}
    for change in ({"capacity": found["ctx"]}, {"ratio": found["retrieval_ratio"]}):
        split = choose_split(SMALL, budget, chosen.head_map, change.get("ratio", 0.75))
        assert split.split.sink_size == 3000
        make_plan(SMALL, budget, change.get("capacity", 400_000), split=split, device_type="cpu")


def test_the_plan_command(tmp_path, capsys):
    HeadMap.uniform(6, 4, 0.5).save(tmp_path / "map")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_JSON))
    shared = ["--model", str(tmp_path), "--ctx", "6K", "--head-map", str(tmp_path / "map"), "--retrieval-ratio", "0.5"]
    assert plan_command([*shared, "--keep", "2K"]) == 0
    said = capsys.readouterr().out
    assert "the others 2,000 + 256 (" in said and "; no head drops the first 2,000 tokens)" in said
    with pytest.raises(InputError, match="give a number of tokens"):
        plan_command([*shared, "--keep", "system"])


def test_a_system_prompt_is_counted_as_the_chat_writes_it(model):
    tokenizer = byte_tokenizer(CHATML)
    system = "Answer in one word."
    chat = ChatFormat(tokenizer, system)
    size = system_size(tokenizer, system)
    whole = chat.opening_ids(None, False) + chat.text_ids(["What is it?"], True, True, True)[0]
    assert tokenizer.decode(whole[:size]).endswith(tokenizer.decode(chat.tail_ids(True)))
    assert system in tokenizer.decode(whole[:size]) and "What" not in tokenizer.decode(whole[:size])
    assert "What" in tokenizer.decode(whole[size : size + 4])
    assert system_size(tokenizer) < size
    runtime = load(model[0], keep="system", system_size=lambda _: 77)
    assert runtime.split.sink_size == 77
    with pytest.raises(InputError, match="this model has no tokenizer: give a number"):
        system_size(None)
