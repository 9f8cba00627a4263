"""Greedy steps launched before the host has seen their token: the same tokens, logits and cache, and no step twice."""

import pytest
import torch
from test_gpu_backend import SHAPE, engines
from tiny_models import tiny_model

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.engine.engine import Engine
from longrun.errors import ContextFullError
from longrun.session.session import Session

START = 190


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    return path


def read(folder, scores="mixed", device_share=0.6) -> Engine:
    """An engine after START tokens."""
    engine = engines(folder, scores, device_share)[0]
    engine.run(ids()[:START])
    return engine


def ids() -> torch.Tensor:
    return torch.randint(0, 97, (700,), generator=torch.Generator().manual_seed(7))


class Launches:
    """Counts the steps that a graph launches."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, launch = 0, engine.decode_step._launch

        def counted(start: int) -> None:
            self.count += 1
            launch(start)

        monkeypatch.setattr(engine.decode_step, "_launch", counted)


def step(engine: Engine, token_id: int, ahead: bool = False) -> torch.Tensor:
    return engine.run_one(token_id, ahead)


def equal_caches(one: Engine, other: Engine) -> None:
    """Everything a later token could read: all of pages, sinks and tails, the rings but the next token's slot."""
    for engine in (one, other):
        engine.cache.check()
    assert one.cache.seq_len == other.cache.seq_len
    tail = one.cache.spec.page_format
    length = one.cache.seq_len
    used = length - tail.closed_pages(length) * tail.page_size
    for (pages, ring), (pages_b, ring_b) in zip(one.cache.layers, other.cache.layers, strict=True):
        if pages is not None:
            assert torch.equal(pages.places.table, pages_b.places.table) and torch.equal(pages.index, pages_b.index)
            assert torch.equal(pages.tail_k[:, :used], pages_b.tail_k[:, :used])
            assert torch.equal(pages.sink_v, pages_b.sink_v)
        if ring is not None:
            slots = [s for s in range(ring.k.shape[1]) if s != ring.sink_size + (length - 16) % ring.recent_size]
            assert torch.equal(ring.k[:, slots], ring_b.k[:, slots])
    assert torch.equal(one.cache.device_pool.storage, other.cache.device_pool.storage)


@pytest.mark.parametrize(("scores", "device_share"), [("mixed", 1.0), ("mixed", 0.3), ("full", 0.6), ("streaming", 1)])
def test_greedy_steps_ahead_are_the_steps_themselves(folder, scores, device_share, monkeypatch):
    plain, ahead = read(folder, scores, device_share), read(folder, scores, device_share)
    launches = Launches(ahead, monkeypatch)
    assert ahead.next_token_id() is None  # the last chunk was no single token
    token = other = 5
    for _ in range(80):  # over the pages that end at 192 and 256
        expected, found = step(plain, token), step(ahead, other, ahead=True)
        assert torch.equal(expected, found)
        token, other = int(expected.argmax()), ahead.next_token_id()
        assert token == other
    assert launches.count in (80, 81)  # every step once, and perhaps one that nobody asked for
    equal_caches(plain, ahead)


def test_what_comes_instead_throws_a_step_away(folder, monkeypatch):
    """Other tokens, chunks and rewinds while a step is ahead, at every place of a page."""
    plain, ahead = read(folder), read(folder)
    launches = Launches(ahead, monkeypatch)
    rng = torch.Generator().manual_seed(3)
    marks, steps = None, 0
    for turn in range(160):
        token = int(torch.randint(0, 97, (1,), generator=rng))
        assert torch.equal(step(plain, token), step(ahead, token, ahead=True))
        steps += 1
        if turn % 23 == 5:
            chunk = ids()[turn : turn + 1 + turn % 70]
            assert torch.equal(plain.run(chunk), ahead.run(chunk))
            steps += len(chunk) == 1
        if turn % 31 == 7:
            marks = [engine.cache.mark() for engine in (plain, ahead)]
        if turn % 31 == 20 and marks is not None:
            for engine, mark in zip((plain, ahead), marks, strict=True):
                engine.cache.rewind(mark)
                engine.rewound()
            assert ahead.next_token_id() is None
        if plain.cache.seq_len > 600:
            break
    assert launches.count > steps + 20  # most were launched and not used
    equal_caches(plain, ahead)


def test_a_rewind_to_the_same_length_voids_the_step_ahead(folder):
    """The token that was foreseen comes at the same place after another past."""
    engine, fresh = read(folder), read(folder)
    begin = engine.cache.mark()
    step(engine, 12)
    after_12 = engine.cache.mark()
    engine.cache.rewind(begin)
    engine.rewound()
    step(engine, 11, ahead=True)
    foreseen = engine.next_token_id()
    engine.cache.rewind(after_12)
    engine.rewound()
    step(fresh, 12)
    assert torch.equal(step(engine, foreseen), step(fresh, foreseen))


def test_no_step_ahead_over_a_full_tail_or_the_end(folder):
    engine = read(folder)
    for begin, end in ((START, 258), (317, 323), (445, 451), (690, 700)):
        if begin > START:
            engine.run(ids()[engine.cache.seq_len : begin])
        for start in range(begin, end):
            step(engine, 3, ahead=True)
            following = start + 1
            expected = following < engine.cache.spec.capacity and following % 64 != 0
            assert (engine.decode_step._ahead_at == following) == expected
    assert engine.cache.spec.capacity == 700


def make_session(folder) -> Session:
    engine = read(folder)
    session = Session(engine, None, None, frozenset())
    session.restore(ids()[:START], torch.arange(97.0), torch.Generator().get_state(), {})
    return session


def test_generating_is_the_same_with_and_without(folder, monkeypatch):
    ahead, plain = make_session(folder), make_session(folder)
    monkeypatch.setattr(plain._engine, "next_token_id", lambda: None)
    run_one = plain._engine.run_one
    monkeypatch.setattr(plain._engine, "run_one", lambda token_id, ahead: run_one(token_id))
    launches = Launches(ahead._engine, monkeypatch)
    for count, stop in ((90, 90), (50, 17), (1, 1)):
        found = [[], []]
        for session, tokens in zip((ahead, plain), found, strict=True):
            for token in session.generate(count, eos=False):
                tokens.append(token)
                if len(tokens) == stop:
                    break
        assert found[0] == found[1] and len(found[0]) == stop
        for session in (ahead, plain):
            session.prefill([1, 2, 3])
        assert torch.equal(ahead.logits, plain.logits)
    # The last token of each run came with the chunk after it; the second run ended before its time, one step ahead.
    assert launches.count == 89 + 16 + 1
    equal_caches(ahead._engine, plain._engine)
    assert ahead.token_ids == plain.token_ids


def test_sampling_and_penalties_take_nothing_from_the_device(folder, monkeypatch):
    session = make_session(folder)
    launches = Launches(session._engine, monkeypatch)
    list(session.generate(20, temperature=1.0, seed=1, eos=False))
    list(session.generate(20, repetition_penalty=1.3, eos=False))
    assert launches.count == 39 and session._engine.decode_step._ahead_at is None


class EvenTokens:
    """A rule of so many tokens, all of even numbers."""

    def __init__(self, count: int) -> None:
        self.left = count

    @property
    def is_complete(self) -> bool:
        return not self.left

    def allowed(self) -> bytes:
        return bytes([0b01010101] * 13)

    def take(self, token_id: int) -> None:
        self.left -= 1


def test_a_rule_takes_nothing_from_the_device(folder, monkeypatch):
    session, other = make_session(folder), make_session(folder)
    launches = Launches(session._engine, monkeypatch)
    tokens = list(session.generate(20, eos=False, rule=EvenTokens(12)))
    assert len(tokens) == 12 and launches.count == 11 and session._engine.decode_step._ahead_at is None
    odd = 0
    for token in tokens:
        assert token == 2 * int(other.logits[::2].argmax())
        odd += int(other.logits.argmax()) % 2
        other.prefill([token])
    assert odd > 2
    assert list(session.generate(5, eos=False)) == list(other.generate(5, eos=False))


def test_the_context_ends_where_it_ended(folder):
    session = make_session(folder)
    session.prefill(ids()[START:695].tolist())
    with pytest.raises(ContextFullError):
        list(session.generate(50, eos=False))
    assert session.seq_len == 700


@pytest.mark.gpu
def test_on_a_gpu_the_tokens_are_the_same(folder, monkeypatch):
    import longrun

    runtime = longrun.load(folder, "rtx4090-24g", kv_format="int4", weight_format="bf16", device="cuda", ctx=700)
    sessions = [runtime.new_session() for _ in range(2)]
    plain = sessions[1]._engine
    run_one = plain.run_one
    monkeypatch.setattr(plain, "next_token_id", lambda: None)
    monkeypatch.setattr(plain, "run_one", lambda token_id, ahead: run_one(token_id))
    found = []
    for session in sessions:
        session.prefill(ids()[:START])
        tokens = [list(session.generate(count, eos=False)) for count in (150, 1, 40)]
        session.prefill(ids()[:77])
        found.append((tokens, session.logits.cpu(), list(session.generate(60, eos=False))))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert torch.equal(found[0][1], found[1][1])
    equal_caches(sessions[0]._engine, plain)
