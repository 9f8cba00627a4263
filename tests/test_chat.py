"""The chat as a person starts it: a tiny planted model, subprocesses, signals and a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

import longrun
from longrun.answer import AnswerOptions
from longrun.chat import chat_command
from longrun.chat_loop import ChatLoop
from longrun.chat_runner import ChatRunner
from longrun.cli import run
from longrun.needles import generate_sentences, make_needles
from longrun.planted import make_planted_model
from longrun.progress import PrefillProgress

ROOT = Path(__file__).resolve().parents[1]
NEEDLES = make_needles(2, 0)


def spaced(key: str) -> str:
    return " ".join(key)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_planted_model(tmp_path_factory.mktemp("planted") / "model").path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """About 1,900 tokens with two needles."""
    sentences = list(islice(generate_sentences(3), 100))
    sentences.insert(10, NEEDLES[0].sentence)
    sentences.insert(90, NEEDLES[1].sentence)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(sentences) + "\n")
    return path


@pytest.fixture(scope="module")
def long_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(" ".join([NEEDLES[0].sentence, *islice(generate_sentences(4), 600)]))
    return path


@pytest.fixture(scope="module")
def runtime(model) -> longrun.Runtime:
    return longrun.load(model, ctx=6000, chunk_size=256)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(model: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "longrun.chat", "--model", str(model), *map(str, arguments)]


@dataclass
class Done:
    """How a chat command ended."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def chat(model, capsys, monkeypatch):
    """Runs the command in this process, as `python -m longrun.chat` does, without its seconds of imports."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str | Path, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(lambda: chat_command(["--model", str(model), *map(str, arguments)]))
        captured = capsys.readouterr()
        return Done(left.value.code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


class Chat:
    """A chat in this process, fed with lines."""

    def __init__(self, runtime: longrun.Runtime, folder: Path | None = None, **options) -> None:
        self.said, self.out = io.StringIO(), io.StringIO()
        console = Console(file=self.said, width=200)
        self.runner = ChatRunner(runtime, AnswerOptions(**{"max_new_tokens": 8, **options}), console, folder=folder)

    def type(self, *lines: str | BaseException, interactive: bool = True) -> str:
        """Feed lines (an exception is raised instead of a line); returns what was told since then."""
        feed: Iterator[str | BaseException] = iter(lines)

        def read_line() -> str | None:
            line = next(feed, None)
            if isinstance(line, BaseException):
                raise line
            return line

        for stream in (self.said, self.out):
            stream.seek(0)
            stream.truncate()
        self.loop = ChatLoop(self.runner, read_line, self.out, interactive)
        self.loop.run()
        return self.said.getvalue()


def ask(number: int) -> str:
    return NEEDLES[number].answer_prefix


def test_prompt_gives_the_answer_on_stdout_and_json_last(model, text_file):
    arguments = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--stop", ".", "--json", "--chunk-size", "512"]
    arguments += ["--retrieval-ratio", "0.5", "--head-map", model / "head_map"]
    done = subprocess.run(command(model, *arguments), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    *answer, last = done.stdout.splitlines()
    result = json.loads(last)
    assert answer == [spaced(NEEDLES[0].key)] and result["text"] == answer[0]
    assert result["stop_reason"] == "stop string"
    tokens, timings = result["tokens"], result["timings"]
    assert tokens["generated"] == 8 and tokens["total"] == tokens["prompt"] + 8 and tokens["capacity"] == 4000
    assert tokens["prefilled"] == tokens["prompt"] > 1500
    assert all(timings[name] > 0 for name in ("load_s", "prefill_s", "prefill_tokens_per_s", "decode_ms_per_token"))
    assert result["cache_bytes"] == result["plan"]["cache_bytes"] > 0
    assert result["split_hash"] == result["plan"]["split"]["hash"]
    assert sum(result["plan"]["split"]["retrieval_heads"]) == 4
    for expected in ("retrieval pages", "prompt tokens", "tokens/s", "ms/token", "planned"):
        assert expected in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ctx", "0"], "--ctx '0' must be at least 1"),
        (["--ctx", "-5"], "--ctx '-5' is not a number"),
        (["--ctx", "3.3X"], "--ctx '3.3X' is not a number"),
        (["--temperature", "-1"], "temperature -1.0 is negative"),
        (["--top-p", "2"], "top_p 2.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--stop", ""], "stop string is empty"),
        (["--file", "/nowhere/a.txt"], "there is no file /nowhere/a.txt"),
        (["--session", "FULL"], "is not a session and not empty"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 (byte 0xe9 after 3 characters)"),
        (["--seed", "-1"], "--seed -1 must be between 0 and"),
        (["--interactive"], "--interactive needs a terminal"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_arguments_are_one_sentence_and_status_2(chat, tmp_path, arguments, message):
    (tmp_path / "something").write_text("mine")
    arguments = [str(tmp_path) if argument == "FULL" else argument for argument in arguments]
    done = chat("--prompt", "Hi", *arguments)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error: ") and message in done.err and done.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["something"]


def test_json_needs_a_prompt(chat):
    done = chat("--json")
    assert done.status == 2 and "--json needs --prompt" in done.err


def test_a_prompt_beyond_the_capacity_names_both_numbers_before_reading(chat, text_file):
    done = chat("--ctx", "500", "--file", text_file, "--prompt", ask(0))
    assert done.status == 2 and done.out == ""
    sentence = done.err.splitlines()[-1]
    numbers = re.search(r"would hold ([\d,]+) tokens, more than the capacity of 500: give --ctx (\d+)", sentence)
    assert numbers and int(numbers[2]) > int(numbers[1].replace(",", "")) > 1500, sentence
    assert "tokens/s" not in done.err


def test_a_full_context_ends_the_answer_with_status_0(chat):
    done = chat("--ctx", "64", "--prompt", "The old lighthouse " * 10, "--max-new-tokens", "500", "--json")
    assert done.status == 0, done.err
    assert done.result["stop_reason"] == "context full" and "the context is full (64 tokens)" in done.err
    assert done.result["tokens"]["total"] == 65, "64 in the cache and one that was given out"


def test_piped_lines_are_turns_and_errors_show_in_the_status(chat, text_file, tmp_path):
    lines = f"/file {text_file}\n{ask(0)}\n/nonsense\n{ask(1)}\n/save {tmp_path / 'saved'}\n"
    done = chat("--ctx", "4K", "--max-new-tokens", "7", stdin=lines)
    assert done.out.splitlines() == [spaced(needle.key) for needle in NEEDLES]
    assert done.status == 2 and "no command /nonsense" in done.err
    assert (tmp_path / "saved" / "manifest.json").is_file()
    done = chat("--ctx", "1K")
    assert done.status == 2 and "pass --prompt" in done.err.splitlines()[-1]


def saved_tokens(folder: Path) -> int:
    try:
        return json.loads((folder / "manifest.json").read_bytes())["num_tokens"]
    except FileNotFoundError:
        return 0


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
    assert tokens["resumed_at"] == at and tokens["prefilled"] == tokens["prompt"] - at

    done = chat(*arguments)
    assert f"{text_file} was read before: not read again" in done.err
    assert done.result["text"] == spaced(NEEDLES[0].key) and done.result["tokens"]["prefilled"] < 20


def resumable(text_file: Path, folder: Path) -> list:
    return [
        "--ctx", "20K", "--chunk-size", "256", "--file", text_file, "--prompt", ask(0), "--max-new-tokens", "7",
        "--session", folder, "--json",
    ]  # fmt: skip


def test_a_reading_killed_at_any_moment_goes_on_where_it_was(chat, model, long_file, tmp_path):
    arguments = resumable(long_file, tmp_path / "session")
    process = subprocess.Popen(
        command(model, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    end = time.monotonic() + 120
    while saved_tokens(tmp_path / "session") < 512:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    process.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and out == "", err
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
        sys.stdout.write(text)
        if len(pieces) == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr("longrun.chat._emit", emit_and_signal)
        done = chat(*arguments, "--session", folder)
    assert done.status == status
    if number == signal.SIGINT:
        assert done.result["stop_reason"] == "interrupted" and whole["text"].startswith(done.result["text"])
    assert saved_tokens(folder) == whole["tokens"]["prompt"]
    again = chat(*arguments, "--session", folder)
    assert again.result["text"] == whole["text"] and again.result["tokens"]["prefilled"] == 0


def test_commands(runtime, text_file, tmp_path):
    chat = Chat(runtime)
    told = chat.type(f"/file {text_file}", ask(0), "/stats")
    assert chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}.\n"
    assert f"documents: {text_file}" in told and told.count("ms/token") == 2 and "planned" in told
    tokens = chat.runner.session.num_tokens

    told = chat.type(f"/save {tmp_path / 'a'}", "/reset", "/stats", f"/load {tmp_path / 'a'}", ask(1))
    assert f"saved {tokens:,} tokens" in told and "0 of 6,000 tokens used" in told
    assert f"going on with the session in {tmp_path / 'a'}: {tokens:,} of 6,000" in told
    assert chat.out.getvalue() == f"{spaced(NEEDLES[1].key)}.\n"
    assert chat.loop.errors == 0

    told = chat.type("/exit", "/stats")
    assert told == ""
    assert "/continue" in chat.type("/help")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fil x", "no command /fil: did you mean /file?"),
        ("/quit", "no command /quit: did you mean /exit?"),
        ("/file", "/file needs a path"),
        ("/file /nowhere", "there is no file /nowhere"),
        ("/stats now", "/stats takes nothing after it"),
        ("/load /nowhere", "no session folder /nowhere"),
        ("/save FULL", "is not a session and not empty"),
        ("/load BAD", "cannot be read as a session manifest"),
        ("/continue", "nothing to continue"),
        ("caf\udce9", "the message is not UTF-8 (byte 0xe9 after 3 characters)"),
        ("word " * 7000, "more than the capacity of 6,000"),
    ],
)
def test_errors_are_told_and_the_chat_goes_on(runtime, tmp_path, line, message):
    (tmp_path / "BAD").mkdir()
    (tmp_path / "BAD" / "manifest.json").write_text("{")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "other").write_text("")
    chat = Chat(runtime, max_new_tokens=2)
    chat.type("The magic number of")
    tokens = chat.runner.session.num_tokens
    command, _, argument = line.partition(" ")
    line = f"{command} {tmp_path / argument}" if argument in ("BAD", "FULL") else line
    told = chat.type(line, "/stats")
    assert f"error: {message}" in told or (told.startswith("error: ") and message in told.splitlines()[0])
    assert f"{tokens:,} of 6,000 tokens used" in told and chat.loop.errors == 1
    chat.type("is: 1")
    assert chat.runner.session.num_tokens > tokens and chat.loop.errors == 0


def test_nothing_is_saved_from_an_empty_chat(runtime, tmp_path):
    chat = Chat(runtime)
    assert "nothing to save" in chat.type(f"/save {tmp_path / 'a'}")
    assert not (tmp_path / "a").exists()


class _Interrupting(io.StringIO):
    """Presses Ctrl-C when the given number of pieces has been written."""

    countdown = 3

    def write(self, text: str) -> int:
        written = super().write(text)
        self.countdown -= 1
        if self.countdown == 0:
            signal.raise_signal(signal.SIGINT)
        return written


def test_ctrl_c_stops_an_answer_and_keeps_the_session(runtime, text_file):
    chat = Chat(runtime, max_new_tokens=100)
    chat.out = _Interrupting()
    told = chat.type(f"/file {text_file}", ask(0))
    answer = chat.out.getvalue()
    assert spaced(NEEDLES[0].key).startswith(answer.strip()) and len(answer.split()) == 3
    assert "ended by interrupted" in told
    session = chat.runner.session
    assert session.num_tokens - session.seq_len == 1, "the last token was sampled and not yet taken in"
    chat.out = io.StringIO()
    chat.runner.options = AnswerOptions(max_new_tokens=8)
    chat.type(ask(1))
    assert chat.out.getvalue() == f"{spaced(NEEDLES[1].key)}.\n"


def test_ctrl_c_stops_the_reading_and_it_can_go_on_or_be_cut(runtime, text_file, monkeypatch):
    def press_once(self, done: int, total: int) -> None:
        if done == 512:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)

    chat = Chat(runtime)
    monkeypatch.setattr(PrefillProgress, "__call__", press_once)
    told = chat.type(f"/file {text_file}")
    assert chat.runner.session.num_tokens == 512 and "/continue reads on" in told
    unread = chat.runner.conversation.unread
    assert f"{unread:,} tokens are unread" in told and chat.loop.errors == 0
    chat.type("/continue", ask(1))
    assert chat.out.getvalue() == f"{spaced(NEEDLES[1].key)}.\n"
    assert chat.runner.conversation.documents == [str(text_file)]

    chat.type("/reset")
    monkeypatch.setattr(PrefillProgress, "__call__", press_once)
    chat.type(f"/file {text_file}", ask(0))
    assert chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}.\n", "the first needle stands in what was read"
    assert chat.runner.conversation.documents == [] and chat.runner.session.num_tokens < 600


def test_ctrl_c_at_the_prompt_leaves_the_second_time(runtime):
    chat = Chat(runtime)
    told = chat.type(KeyboardInterrupt(), "/stats", KeyboardInterrupt(), None)
    assert told.count("press Ctrl-C again") == 2
    with pytest.raises(KeyboardInterrupt):
        chat.type(KeyboardInterrupt(), KeyboardInterrupt(), "/stats")
    with pytest.raises(KeyboardInterrupt):
        chat.type(KeyboardInterrupt(), interactive=False)


def test_a_kept_folder_follows_until_another_session_is_loaded(runtime, tmp_path):
    kept, other = tmp_path / "kept", tmp_path / "other"
    chat = Chat(runtime, folder=kept, max_new_tokens=2)
    chat.type("The magic number of")
    assert saved_tokens(kept) == chat.runner.session.num_tokens
    chat.type(f"/save {other}", "is: 1")
    assert saved_tokens(kept) == chat.runner.session.num_tokens > saved_tokens(other)
    before = saved_tokens(kept)
    told = chat.type(f"/load {other}", "one two three four")
    assert f"{kept} stays as it was" in told and saved_tokens(kept) == before

    chat = Chat(runtime, folder=kept, max_new_tokens=2)
    assert f"going on with the session in {kept}: {before:,} of 6,000" in chat.said.getvalue()
    chat.type("/reset", "one")
    assert saved_tokens(kept) == before


def test_a_session_that_fits_only_alone_is_loaded_once_nothing_else_is_there(model, tmp_path):
    need = longrun.load(model, ctx=6000).plan.device_bytes
    budget = tmp_path / "small.toml"
    budget.write_text(f"[memory]\ngpu = {need + 10_000}\nhost = 0\n")
    chat = Chat(longrun.load(model, budget, ctx=6000), max_new_tokens=2)
    saved = tmp_path / "saved"
    chat.type("The magic number of", f"/save {saved}")
    tokens = saved_tokens(saved)
    told = chat.type(f"/load {saved}", "/stats")
    assert "does not fit in memory beside this conversation" in told and f"{tokens:,} of 6,000" in told
    told = chat.type("/reset", f"/load {saved}")
    assert f"going on with the session in {saved}: {tokens:,} of 6,000" in told and chat.loop.errors == 0

    state = next(saved.glob("state-*"))
    state.write_bytes(state.read_bytes()[:-1])
    told = chat.type("/reset", f"/load {saved}", "/stats", "The magic number of")
    assert "is truncated" in told and "0 of 6,000" in told and chat.loop.errors == 1
    assert chat.runner.session.num_tokens == tokens


def test_a_question_without_answer_is_told_and_can_be_answered(runtime, text_file, tmp_path):
    chat = Chat(runtime, folder=tmp_path / "kept")
    from longrun.documents import read_document

    chat.runner.read([read_document(text_file)], ask(0))
    del chat
    chat = Chat(runtime, folder=tmp_path / "kept")
    told = chat.type("/continue")
    assert "has no answer yet" in told and chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}.\n"


def test_on_a_terminal(model, text_file):
    """Progress bar, streaming, Ctrl-C during an answer, Ctrl-D."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(
            model, "--ctx", "8K", "--max-new-tokens", "3000", "--chunk-size", "256", "--file", text_file,
            "--prompt", ask(0), "--interactive",
        ),
        stdin=follower, stdout=follower, stderr=follower, env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"},
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def expect(pattern: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end, f"no {pattern!r} in {seen[-2000:]!r}"
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536).decode(errors="replace")
        seen = seen[re.search(pattern, seen).end() :]

    try:
        expect("Ctrl-D leaves")
        expect(r"of [\d,]+ tokens")
        expect(spaced(NEEDLES[0].key))
        os.write(leader, b"\x03")
        expect("ended by interrupted")
        os.write(leader, b"/stats\n")
        expect("documents:")
        expect("ms/token")
        expect("> ")
        os.write(leader, f"{ask(1)}\n".encode())
        expect(spaced(NEEDLES[1].key))
        os.write(leader, b"\x03")
        expect("ended by interrupted")
        expect("> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)


def _take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C typed there becomes SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
