"""Bytes for keys and values decide how far each head reaches: the plan, the tokens, sessions, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from planned_models import SMALL, SMALL_JSON
from tiny_models import save_tiny, save_tokenizer
from transformers import AttentionInterface

import longrun
from longrun.errors import ConfigError, HeadMapError, InputError, SessionError
from longrun.patterns.head_map import HeadMap
from longrun.patterns.reach_losses import ReachLosses
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.plan import NoFitError, choose_split, make_plan
from longrun.plan.split import budget_by_hand
from longrun.units import ALL_TOKENS

SINK, RING, CTX = 16, 32, 1200
IDS = torch.randint(0, 97, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
OF_HEADS = ((3.0, 0.1, 0.05), (4.0, 3.9, 3.8), (0.2, 0.1, 0.05))
ROWS = tuple(tuple(tuple(loss / (1 + n) for loss in of_head) for of_head in OF_HEADS) for n in range(3))
LOSSES = ReachLosses(SINK, 4000, (RING, 100, 300), ROWS)
MAP = HeadMap(((1.0,) * 3,) * 3, 64, 256, reach_losses=LOSSES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = save_tiny(folder, "llama")
    save_tokenizer(folder)
    return folder, theirs


def load(folder, **options):
    given = {"head_map": MAP, "ctx": CTX, "chunk_size": 130, "device": "cpu", "kv_format": "fp32", **options}
    return longrun.load(folder, replace(Budget.load("cpu"), recent_size=RING), **given)


def some_bytes(folder):
    """Bytes with which some heads keep all, some reach and some stream."""
    least, most = (load(folder, head_map=HeadMap(((score,) * 3,) * 3, SINK, RING)).plan.cache.kv_bytes
                   for score in (0.0, 1.0))  # fmt: skip
    return (3 * least + 4 * most) // 7


def by_masks(theirs, reaches, ids, sinks=SINK):
    """Logits of transformers' model whose KV heads see what `reaches` [num_layers][num_kv_heads] say: float64."""

    def attend(module, query, key, value, mask, scaling, **_):
        group, n = query.shape[1] // key.shape[1], query.shape[2]
        rows, cols = torch.arange(n)[:, None], torch.arange(n)[None]
        out = torch.empty_like(query)
        for head in range(query.shape[1]):
            reach = reaches[module.layer_idx][head // group]
            seen = (cols <= rows) & ((cols < sinks) | (cols > rows - reach))
            scores = query[0, head] @ key[0, head // group].T * scaling
            out[0, head] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[0, head // group]
        return out.transpose(1, 2), None

    AttentionInterface.register("reaches", attend)
    theirs.set_attn_implementation("reaches")
    with torch.inference_mode():
        return theirs.double()(torch.tensor([ids])).logits[0]


def off(actual, expected):
    return ((actual.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("device_share", [1.0, 0.4])
def test_tokens_are_those_of_the_same_masks(model, compiled, device_share):
    folder, theirs = model
    runtime = load(folder, kv_bytes=some_bytes(folder), compiled_kernels=compiled, device_share=device_share)
    reaches = runtime.split.reaches
    assert {ALL_TOKENS, 100, RING} <= {reach for row in reaches for reach in row}
    expected = by_masks(theirs, reaches, IDS)
    session = runtime.new_session()
    cut = 900
    assert off(session.prefill(IDS[:cut]), expected[cut - 1]) < 1e-4
    mark = session.mark()
    singles = torch.stack([session.prefill([token]) for token in IDS[cut : cut + 40]])
    assert off(singles, expected[cut : cut + 40]) < 1e-4
    session.rewind(mark)
    assert off(session.prefill(IDS[cut:]), expected[-1]) < 1e-4
    everything = by_masks(theirs, ((ALL_TOKENS,) * 3,) * 3, IDS)
    assert off(expected[-1], everything[-1]) > 0.01  # the masks matter


def test_the_cache_holds_the_bytes_that_were_planned(model):
    folder, _ = model
    for kv_format in ("fp32", "k5v3"):
        room = load(folder, kv_format=kv_format, head_map="full").plan.cache.kv_bytes
        held = []
        for share in (0.4, 0.6, 0.8, 1.0):
            runtime = load(folder, kv_format=kv_format, kv_bytes=int(share * room))
            cache = runtime.new_session().plan.cache
            assert cache.kv_bytes <= share * room
            session = runtime.new_session()
            assert session.cache.nbytes() == {**cache.device_bytes(), **cache.host_bytes()}
            held.append(cache.kv_bytes)
        assert held == sorted(held) and len(set(held)) > 2
        assert runtime.split == HeadMap(((1.0,) * 3,) * 3, SINK, RING).split(), "all bytes are full attention"


def test_sessions_come_back_with_their_reaches(model, tmp_path):
    folder, _ = model
    size = some_bytes(folder)
    runtime = load(folder, kv_bytes=size, kv_format="k5v3")
    session = runtime.new_session()
    session.prefill(IDS[:700])
    session.save(tmp_path / "session")
    session.prefill(IDS[700:900])
    expected = session.logits
    again = load(folder, kv_bytes=size, kv_format="k5v3", session=tmp_path / "session")
    assert again.split == runtime.split
    longer = load(folder, kv_bytes=2 * size, kv_format="k5v3", ctx=3 * CTX, session=tmp_path / "session")
    assert longer.split == runtime.split and longer.plan.capacity == 3 * CTX
    assert "reaches of the session" in longer.plan.split_note
    assert any("the session keeps the reaches" in notice for notice in longer.notices)
    for each in (again, longer):
        loaded = each.load_session(tmp_path / "session", each.plan.capacity)
        assert torch.equal(loaded.prefill(IDS[700:900]), expected)
    no_context = load(folder, kv_bytes=size, kv_format="k5v3", ctx=None, session=tmp_path / "session")
    assert no_context.split == runtime.split


def test_a_runtime_with_other_reaches_refuses_a_session_and_says_what_to_do(model, tmp_path):
    folder, _ = model
    size = some_bytes(folder)
    session = load(folder, kv_bytes=size).new_session()
    session.prefill(IDS[:100])
    session.save(tmp_path / "session")
    other = load(folder, kv_bytes=2 * size)
    with pytest.raises(SessionError, match=r"load the model with this session named \(session=\)"):
        other.load_session(tmp_path / "session")
    for options in ({}, {"retrieval_ratio": 0.5}):
        with pytest.raises(SessionError, match="give the head map, ratio or kv_bytes and window it was made with"):
            load(folder, session=tmp_path / "session", **options)
    plain = load(folder).new_session()
    plain.prefill(IDS[:100])
    plain.save(tmp_path / "plain")
    with pytest.raises(SessionError, match="head split"):
        load(folder, kv_bytes=size, session=tmp_path / "plain")


def test_derived_runtimes(model):
    folder, _ = model
    size = some_bytes(folder)
    base = load(folder)
    loaded = load(folder, kv_bytes=size)
    found = base.derive(kv_bytes=size)
    assert found.split == loaded.split and found.identity == loaded.identity
    assert found.identity.reaches == loaded.identity.reaches == loaded.split.reaches
    assert found.plan.cache == loaded.plan.cache
    answers = [runtime.new_session().prefill(IDS[:500]) for runtime in (found, loaded, base)]
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    chunks = loaded.derive(chunk_size=77, ctx=CTX + 500)
    assert chunks.split == loaded.split and chunks.identity.reaches == loaded.split.reaches
    back = loaded.derive("full")
    assert back.split.is_full and back.identity.reaches is None
    assert torch.equal(
        back.new_session().prefill(IDS[:500]), load(folder, head_map="full").new_session().prefill(IDS[:500])
    )
    assert loaded.derive(retrieval_ratio=0.5).split.reaches == ()
    with pytest.raises(InputError, match="need a head map with reach losses"):
        load(folder, head_map="full").derive(kv_bytes=size)


PLAIN = HeadMap(((1.0,) * 4,) * 6)
BUDGET = Budget(device_bytes=10**9, kv_bytes=10**6)
SMALL_LOSSES = ReachLosses(8, 4000, (64, 500), (((4.0, 1.0), (3.0, 0.5), (1.0, 0.25), (0.5, 0.0)),) * 6)
REACHING = replace(PLAIN, reach_losses=SMALL_LOSSES)


@pytest.mark.parametrize(
    ("budget", "head_map", "options", "error", "words"),
    [
        (BUDGET, "full", {}, InputError, "1.00 MB need a head map with reach losses"),
        (BUDGET, None, {}, InputError, "need a head map with reach losses"),
        (BUDGET, PLAIN, {}, InputError, "need reach losses, and head map has none"),
        (BUDGET, REACHING, {"capacity": None}, InputError, "need a stated context"),
        (BUDGET, REACHING, {"session_reaches": [[64] * 4] * 5}, HeadMapError, "reaches are of 5 layers of 4 KV heads"),
        (BUDGET, REACHING, {"session_reaches": [[0] * 4] * 6}, HeadMapError, "recent_size"),
        (BUDGET, REACHING, {"retrieval_ratio": 0.5}, InputError, "retrieval ratio 0.5 both say"),
        (replace(BUDGET, sink_size=9), REACHING, {}, ConfigError, "sink_size = 9 is not the 8"),
        (
            replace(BUDGET, recent_size=65),
            REACHING,
            {},
            ConfigError,
            r"recent_size = 65 is none of the reaches .*\(64, 500\)",
        ),
        (replace(BUDGET, kv_bytes=1000), REACHING, {}, HeadMapError, "do not hold the shortest reach of every head"),
    ],
)
def test_what_cannot_be_allocated(budget, head_map, options, error, words):
    with pytest.raises(error, match=words):
        choose_split(SMALL, budget, head_map, **{"capacity": 2000, **options})


def test_bytes_by_hand_win_over_the_file_and_the_other_way_round():
    file = Budget.parse('[memory]\ngpu = "1 GB"\n[kv]\nkv_bytes = "3 MB"\n')
    assert file.kv_bytes == 3 * 10**6
    assert budget_by_hand(file, 0.5, None).kv_bytes is None
    assert budget_by_hand(file, None, "2 MiB").kv_bytes == 2 * 2**20
    ratio = replace(file, kv_bytes=None, retrieval_ratio=0.5)
    by_hand = budget_by_hand(ratio, None, 500)
    assert (by_hand.kv_bytes, by_hand.retrieval_ratio) == (500, None)
    with pytest.raises(InputError, match="give one"):
        budget_by_hand(file, 0.5, "2 MB")
    for bad in ("much", True, 1.5, -1, "9 PB"):
        with pytest.raises(InputError, match="kv_bytes"):
            budget_by_hand(file, None, bad)
    with pytest.raises(ConfigError, match="kv_bytes = 0 must be a whole number of at least 1"):
        budget_by_hand(file, None, 0)
    with pytest.raises(ConfigError, match=r"\[kv\] retrieval_ratio = 0.5 and kv_bytes = 3000000"):
        Budget.parse('[memory]\ngpu = "1 GB"\n[kv]\nkv_bytes = "3 MB"\nretrieval_ratio = 0.5\n')
    assert Budget.parse('[memory]\ngpu = "1 GB"\n[kv]\nkv_bytes = "25%"\n').kv_bytes == "25%"
    for bad in ("0%", "101%", "-1%", "many%", "nan%"):
        with pytest.raises(InputError, match="write it like 25%"):
            budget_by_hand(file, None, bad)
        with pytest.raises(ConfigError, match="write it like 25%"):
            Budget.parse(f'[memory]\ngpu = "1 GB"\n[kv]\nkv_bytes = "{bad}"\n')
    with pytest.raises(ConfigError, match=r"\[kv\] kv_bytes = true is not a memory size"):
        Budget.parse('[memory]\ngpu = "1 GB"\n[kv]\nkv_bytes = true\n')


def test_the_same_bytes_reach_less_far_in_a_longer_context():
    splits = [choose_split(SMALL, BUDGET, REACHING, capacity=capacity).split for capacity in (600, 6000, 60_000)]
    kept = [sum(row.count(ALL_TOKENS) for row in split.all_reaches) for split in splits]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2]
    assert splits[1] == choose_split(SMALL, BUDGET, REACHING, capacity=6000).split


@pytest.mark.parametrize("capacity", [2000, 6000, 20_000, 200_000])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_streaming_heads_have_the_window_that_loses_least(capacity, share):
    """Beside every choice of the window by hand, and no head's reach lies below it."""
    room = make_plan(SMALL, replace(BUDGET, kv_bytes=None), capacity, device_type="cpu").cache.kv_bytes
    budget = replace(BUDGET, kv_bytes=int(share * room))
    split = choose_split(SMALL, budget, REACHING, capacity=capacity).split
    by_hand = {}
    for window in SMALL_LOSSES.reaches:
        try:
            one = choose_split(SMALL, replace(budget, recent_size=window), REACHING, capacity=capacity).split
        except HeadMapError:
            continue
        assert one.recent_size == window == min(map(min, one.all_reaches))
        by_hand[window] = SMALL_LOSSES.lost(one.all_reaches)
    assert SMALL_LOSSES.lost(split.all_reaches) == min(by_hand.values())
    assert split.recent_size == min(by_hand, key=by_hand.get)


@pytest.mark.parametrize("capacity", [2000, 60_000])
def test_a_share_is_of_what_full_attention_takes(capacity):
    room = make_plan(SMALL, replace(BUDGET, kv_bytes=None), capacity, device_type="cpu").cache.kv_bytes
    for share in (0.4, 0.75, 1.0):
        given = [
            choose_split(SMALL, replace(BUDGET, kv_bytes=size), REACHING, capacity=capacity)
            for size in (f"{100 * share:g}%", int(share * room))
        ]
        assert given[0].split == given[1].split and given[0].kv_bytes == given[1].kv_bytes
    assert SMALL_LOSSES.lost(given[0].split.all_reaches) == 0


def test_a_wide_window_is_chosen_where_a_context_is_long():
    windows = [
        choose_split(SMALL, replace(BUDGET, kv_bytes=capacity * 300), REACHING, capacity=capacity).split.recent_size
        for capacity in (2000, 200_000)
    ]
    assert windows == [64, 500]


def test_what_would_fit_is_fewer_bytes():
    budget = replace(BUDGET, device_bytes=476 * 10**6, kv_bytes=40 * 10**6, weight_format="int4", chunk_size=64)
    capacity = 60_000
    chosen = choose_split(SMALL, budget, REACHING, capacity=capacity)
    with pytest.raises(NoFitError) as error:
        make_plan(SMALL, budget, capacity, split=chosen, device_type="cpu")
    found = {suggestion.setting: suggestion.value for suggestion in error.value.suggestions}
    assert not found.keys() & {"ctx", "retrieval_ratio", "kv"}
    assert f"--kv-bytes {found['kv_bytes']}" in error.value.told_by({"--kv-bytes"})
    fits = replace(budget, kv_bytes=found["kv_bytes"])
    make_plan(SMALL, fits, capacity, split=choose_split(SMALL, fits, REACHING, capacity=capacity), device_type="cpu")


def test_the_plan_command(tmp_path, capsys):
    REACHING.save(tmp_path / "map")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_JSON))
    shared = ["--model", str(tmp_path), "--ctx", "6K", "--head-map", str(tmp_path / "map"), "--kv-bytes", "3MB"]
    assert plan_command([*shared, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_bytes"] <= 3e6
    assert plan["split"]["reaches"] is None and plan["split"]["recent_size"] == 500
    assert plan_command(shared) == 0
    assert "8 + 500" in capsys.readouterr().out
    with pytest.raises(InputError, match="give one"):
        plan_command([*shared, "--retrieval-ratio", "0.5"])
    with pytest.raises(InputError, match="need a stated context"):
        plan_command([word for word in shared if word not in ("--ctx", "6K")])
