"""The chat's command, killed or told to stop while it reads or answers: run again, it resumes."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from planted_chat import NEEDLES, ask, saved_tokens, spaced

from longrun.cache.page_places import PagePlaces
from longrun.chat.progress import PrefillProgress
from longrun.errors import SessionError
from longrun.files.folder_lock import FolderLock
from longrun.needles.needles import generate_sentences
from longrun.session.store import SessionStore
from longrun.text.stream import AnswerText


@pytest.fixture(scope="module")
def long_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(" ".join([NEEDLES[0].sentence, *islice(generate_sentences(4), 600)]))
    return path


def check_resumption(chat, arguments: list, folder: Path, text_file: Path) -> None:
    at = saved_tokens(folder)
    done = chat("--ctx", "20K", "--prompt", "Something else", "--session", folder)
    assert done.status == 2 and f"stopped at token {at:,} of " in done.err.splitlines()[-1]
    assert saved_tokens(folder) == at

    done = chat(*arguments)
    assert done.status == 0, done.err
    tokens = done.result["tokens"]
    assert done.result["text"] == spaced(NEEDLES[0].key)
    assert f"resuming at token {at:,} of {tokens['prompt']:,}" in done.err
    assert done.result["resumed"] == {"session_tokens": at, "message_tokens": at, "documents_already_read": []}
    assert tokens["resumed_at"] == at and tokens["prefilled"] == tokens["prompt"] - at

    done = chat(*arguments)
    assert f"{text_file} was read before: not read again" in done.err
    resumed = {"session_tokens": tokens["total"], "message_tokens": 0, "documents_already_read": [str(text_file)]}
    assert done.result["resumed"] == resumed
    assert done.result["text"] == spaced(NEEDLES[0].key) and done.result["tokens"]["prefilled"] < 20


def resumable(text_file: Path, folder: Path) -> list:
    return [
        "--ctx", "20K", "--chunk-size", "256", "--file", text_file, "--prompt", ask(0), "--max-new-tokens", "7",
        "--session", folder, "--json",
    ]  # fmt: skip


def test_a_reading_killed_at_any_moment_goes_on_where_it_was(chat, planted, long_file, tmp_path, warm_python):
    arguments = resumable(long_file, tmp_path / "session")
    process = warm_python.start("-m", "longrun.chat", "--model", planted.path, *arguments)
    end = time.monotonic() + 120
    while saved_tokens(tmp_path / "session") < 512:
        assert process.poll() is None, process.err.read_text()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and process.out.read_text() == ""
    check_resumption(chat, arguments, tmp_path / "session", long_file)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_reading_saves_what_was_read(chat, text_file, tmp_path, monkeypatch, number, status):
    arguments = resumable(text_file, tmp_path / "session")
    with monkeypatch.context() as patch:
        patch.setattr(PrefillProgress, "__call__", lambda _, done, total: done != 512 or signal.raise_signal(number))
        done = chat(*arguments)
    assert done.status == status and done.out == ""
    assert saved_tokens(tmp_path / "session") == 512
    check_resumption(chat, arguments, tmp_path / "session", text_file)


def test_a_second_sigterm_while_the_first_one_is_answered(chat, text_file, tmp_path, monkeypatch):
    """It comes in the middle of the rewind to the question, and again in the middle of the save."""
    folder = tmp_path / "session"
    arguments = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--max-new-tokens", "30", "--json"]
    whole = chat(*arguments).result

    heard = []

    def signalled(name, method):
        def call(*given):
            if name == "step" or heard:  # not before the answer begins
                heard.append(name)
                signal.raise_signal(signal.SIGTERM)
            return method(*given)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((AnswerText, "step"), (PagePlaces, "truncate"), (SessionStore, "save")):
            patch.setattr(owner, name, signalled(name, getattr(owner, name)))
        first = chat(*arguments, "--session", folder)
    assert first.status == 143 and first.err.splitlines()[-1] == "terminated"
    assert set(heard) == {"step", "truncate", "save"}
    assert saved_tokens(folder) == whole["tokens"]["prompt"]
    again = chat(*arguments, "--session", folder)
    assert again.result["text"] == whole["text"] and again.result["tokens"]["prefilled"] == 0


def test_a_session_that_is_open_elsewhere_is_refused_before_anything_is_read(chat, tmp_path):
    lock = FolderLock(tmp_path / "s" / "session.lock", "it", SessionError, "wait", "no")
    done = chat("--prompt", "x", "--session", tmp_path / "s")
    assert done.status == 2 and done.out == "" and len(done.err.splitlines()) == 1
    assert "is in use by another owner in this process" in done.err
    lock.release()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_answering_leaves_the_question_to_be_answered(
    chat, text_file, tmp_path, monkeypatch, number, status
):
    folder = tmp_path / "session"
    arguments = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--json", "--temperature", "1", "--seed", "3"]
    arguments += ["--max-new-tokens", "30", "--top-k", "4"]
    whole = chat(*arguments).result
    pieces = []

    def emit_and_signal(text: str) -> None:
        pieces.append(text)
        sys.stderr.write(text)
        if len(pieces) == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr("longrun.chat.command._emit_to_stderr", emit_and_signal)
        done = chat(*arguments, "--session", folder)
    assert done.status == status
    if number == signal.SIGINT:
        assert done.result["stop_reason"] == "interrupted" and whole["text"].startswith(done.result["text"])
    assert saved_tokens(folder) == whole["tokens"]["prompt"]
    again = chat(*arguments, "--session", folder)
    assert again.result["text"] == whole["text"] and again.result["tokens"]["prefilled"] == 0
