"""SIGINT and SIGTERM at any moment of a session's work: what stands afterwards is a whole state, and continues as if
nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import longrun
from longrun.interrupts import deferred_signals
from longrun.patterns.head_map import HeadMap

ROOT = Path(__file__).resolve().parents[1]
WATCHED = {
    f"{name}.py" for name in ("session", "sequence", "generation", "marks", "engine", "interrupts", "dual", "store")
}
TEXT = list(range(3, 93)) * 2
POINTS = 40


class Terminated(BaseException):
    pass


def terminate(number, frame):
    raise Terminated


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    head_map = HeadMap.from_scores([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], sink_size=16, recent_size=32)
    return longrun.load(folder, device="cpu", ctx=512, head_map=head_map, kv_format="fp32", chunk_size=50)


@pytest.fixture(autouse=True)
def _terminating():
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    with deferred_signals():  # puts back what signals during the exchange of handlers have left
        pass
    assert signal.getsignal(signal.SIGTERM) is terminate, "a handler was left behind"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_at(*lines):
    """Raise SIGINT, SIGTERM, SIGINT ... as the n-th line of the watched files begins, for each n; counts the lines."""
    seen = [0]

    def trace(frame, event, argument):
        if os.path.basename(frame.f_code.co_filename) not in WATCHED:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] in lines:
                signal.raise_signal((signal.SIGINT, signal.SIGTERM)[seen[0] % 2])
        return trace

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)


def begin(runtime):
    """A session of 40 tokens and a sampled one that waits; a mark before that one."""
    session = runtime.new_session()
    session.prefill(TEXT[:40])
    mark = session.mark()
    next(session.generate(1, temperature=1.0, seed=3))
    return session, mark


def fed(session):
    session.prefill(TEXT[session.num_tokens - 1 : 160])


def scored(session):
    session.score(TEXT[session.num_tokens - 1 : 43])


def drawn(session):
    list(session.generate(44 - session.num_tokens, temperature=1.0, eos=False))


def greedy(session):
    list(session.generate(44 - session.num_tokens, eos=False))


OPERATIONS = {fed: 161, scored: 44, drawn: 44, greedy: 44}


def check_whole(runtime, session, known={}):  # noqa: B006  computed once
    """Cache, tokens and logits agree: a session that reads the same tokens for the first time says the same."""
    session.cache.check()
    assert session.num_tokens - session.seq_len in (0, 1)
    taken = tuple(session.token_ids[: session.seq_len])
    if taken not in known:
        known[taken] = runtime.new_session().prefill(taken).clone()
    assert torch.allclose(session.snapshot()["logits"], known[taken], atol=1e-3), (session.num_tokens, session.seq_len)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_signal_at_any_line(runtime, operation):
    session, mark = begin(runtime)
    with signals_at() as lines:
        operation(session)
    expected, logits = session.token_ids, session.logits.clone()
    assert len(expected) == OPERATIONS[operation] and lines[0] > 50
    for at in range(1, lines[0], max(1, lines[0] // POINTS)):
        session.rewind(mark)
        next(session.generate(1, temperature=1.0, seed=3))
        with pytest.raises((KeyboardInterrupt, Terminated)), signals_at(at, at + 3):
            operation(session)
        check_whole(runtime, session)
        if session.num_tokens < len(expected):
            operation(session)
        assert session.token_ids == expected, f"another way after a signal at line {at}"
        assert torch.allclose(session.logits, logits, atol=1e-3)


def test_a_second_signal_while_the_first_one_has_the_session_rewound(runtime):
    session, mark = begin(runtime)
    list(session.generate(100, eos=False))
    with signals_at() as lines:
        session.rewind(mark)
    logits = session.logits.clone()
    for at in range(1, lines[0], max(1, lines[0] // POINTS)):
        list(session.generate(25, eos=False))
        with pytest.raises((KeyboardInterrupt, Terminated)), signals_at(at, at + 1, at + 5):
            session.rewind(mark)
        check_whole(runtime, session)
        session.rewind(mark)
        assert torch.equal(session.logits, logits)


def test_signals_from_outside_while_tokens_are_decoded(runtime):
    """Another thread sends them at random moments."""
    session, mark = begin(runtime)
    expected = [*session.token_ids, *session.generate(150, temperature=1.0, eos=False)]
    chance, heard = random.Random(1), 0
    for _ in range(12):
        session.rewind(mark)
        next(session.generate(1, temperature=1.0, seed=3))
        timer = threading.Timer(chance.uniform(0.0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            list(session.generate(150, temperature=1.0, eos=False))
            timer.join()
        except KeyboardInterrupt:
            heard += 1
        check_whole(runtime, session)
        session.prefill(expected[session.num_tokens :] or TEXT[:1])
        assert session.token_ids[: len(expected)] == expected
    assert heard > 6


def test_both_signals_are_heard_and_sigterm_has_the_last_word():
    heard = []

    def work():
        with deferred_signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.waiting
            with deferred_signals():
                signal.raise_signal(signal.SIGINT)
            assert not heard, "the outermost block lets go"

    signal.signal(signal.SIGINT, lambda *_: heard.append("int"))
    try:
        with pytest.raises(Terminated):
            work()
        assert heard == ["int"]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_block_that_fails_still_lets_its_signals_go():
    def work():
        with deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError

    with pytest.raises(Terminated) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_while_libraries_load_ends_the_chat_with_one_line(number, status, word):
    process = subprocess.Popen(
        [sys.executable, "-m", "longrun.chat", "--prompt", "x"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "torch" not in maps.read_text():  # torch has begun to load
        time.sleep(0.002)
    process.send_signal(number)
    assert process.communicate()[1] == f"{word}\n"
    assert process.returncode == status


def test_outside_the_main_thread_nothing_is_touched(runtime):
    found = []

    def work():
        session = runtime.new_session()
        session.prefill(TEXT[:60])
        found.append(len(list(session.generate(3, eos=False))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [3]
