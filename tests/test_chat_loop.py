"""The chat's turns and commands, fed with lines in this process: answers, errors, Ctrl-C, sessions saved and loaded."""

from __future__ import annotations

import gc
import io
import shutil
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_chat import NEEDLES, ask, saved_tokens, spaced
from rich.console import Console

import longrun
from longrun.chat.answer import AnswerOptions
from longrun.chat.loop import ChatLoop
from longrun.chat.progress import PrefillProgress
from longrun.chat.runner import ChatRunner
from longrun.documents.document import read_document
from longrun.engine.sampling import SamplingParams


@pytest.fixture(scope="module")
def runtime(planted) -> longrun.Runtime:
    return longrun.load(planted.path, ctx=6000, chunk_size=256)


class Chat:
    """A chat in this process, fed with lines."""

    def __init__(self, runtime: longrun.Runtime, folder: Path | None = None, **options) -> None:
        self.said, self.out = io.StringIO(), io.StringIO()
        console = Console(file=self.said, width=200)
        self.runner = ChatRunner(runtime, AnswerOptions(**{"max_new_tokens": 8, **options}), console, folder=folder)

    def type(self, *lines: str | BaseException, interactive: bool = True) -> str:
        """Feed lines (an exception is raised instead of a line); returns what was printed since then."""
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


def test_commands(runtime, text_file, tmp_path):
    chat = Chat(runtime)
    told = chat.type(f"/file {text_file}", ask(0), "/stats")
    assert chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}.\n"
    assert f"documents: {text_file}" in told and told.count("ms/token") == 2 and "filled" in told
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


def test_an_answer_that_was_cut_is_continued_where_it_stopped(runtime, text_file, tmp_path):
    whole = Chat(runtime, stop=(".",))
    assert "error: there is nothing to continue" in whole.type("/continue")
    told = whole.type(f"/file {text_file}", ask(0))
    assert "/continue" not in told and "error: there is nothing to continue" in whole.type("/continue")
    tokens = whole.runner.session.token_ids

    folder = tmp_path / "cut"
    chat = Chat(runtime, max_new_tokens=3, stop=(".",))
    told = chat.type(f"/file {text_file}", ask(0), f"/save {folder}")
    assert "ended by max_new_tokens: /continue resumes it" in told
    pieces = [chat.out.getvalue().removesuffix("\n")]
    shutil.copytree(folder, tmp_path / "copy")
    again = Chat(runtime, max_new_tokens=100, stop=(".",), folder=tmp_path / "copy")
    assert "the last answer was cut: /continue resumes it" in again.said.getvalue()
    for one in (chat, again):
        said = list(pieces)
        while one.runner.conversation.cut_answer is not None:
            assert one.type("/continue") and one.loop.errors == 0
            said.append(one.out.getvalue().removesuffix("\n"))
        assert "".join(said) == spaced(NEEDLES[0].key) and one.runner.session.token_ids == tokens
        assert len(said) > 2 or one is again
    assert "error: there is nothing to continue" in again.type("/continue")

    chat = Chat(runtime, max_new_tokens=3)
    chat.type("The magic number of", "is: 1", "/stats")
    assert chat.runner.conversation.cut_answer is not None
    chat.runner.talk.read([read_document(text_file)], None)
    assert chat.runner.conversation.cut_answer is None, "something follows it now"


def test_an_interrupted_answer_is_continued(runtime, text_file):
    chat = Chat(runtime, max_new_tokens=100, stop=(".",))
    chat.out = _Interrupting()
    chat.type(f"/file {text_file}", ask(0))
    first = chat.out.getvalue().removesuffix("\n")
    chat.out = io.StringIO()
    chat.type("/continue")
    assert first + chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}\n"


def test_an_answer_at_random_tells_its_seed_and_goes_on_at_random(runtime):
    settings = {"max_new_tokens": 6, "sampling": SamplingParams(temperature=50.0)}
    seeds, answers = [], []
    for seed in (None, None, "the first's"):
        chat = Chat(runtime, seed=seeds[0] if seed else None, **settings)
        told = chat.type("The magic number of", "/continue")
        assert told.count(f"seed {chat.runner.last_report.answer.seed}") == 2, "the continued answer began with it"
        seeds.append(chat.runner.last_report.to_dict()["seed"])
        answers.append(chat.runner.session.token_ids)
    assert answers[0] != answers[1] and seeds[0] != seeds[1]
    assert answers[2] == answers[0]
    assert "seed" not in Chat(runtime, max_new_tokens=2).type("The magic number of")


def test_a_model_without_chat_template_is_told_of_once(runtime, tmp_path):
    chat = Chat(runtime)
    assert chat.said.getvalue().count("no chat template") == 1
    assert "no chat template" not in chat.type("The magic number of", "/reset", "The magic number of")


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


def test_a_loaded_session_leaves_nothing_of_the_one_before(runtime, tmp_path):
    chat = Chat(runtime)
    chat.type(ask(0), f"/save {tmp_path / 'a'}")
    before = weakref.ref(chat.runner.session.cache)
    assert chat.runner.last_report is not None
    chat.type(f"/load {tmp_path / 'a'}")
    gc.collect()
    assert before() is None and chat.runner.last_report is None


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


def test_a_session_that_fits_only_alone_is_loaded_once_nothing_else_is_there(planted, tmp_path):
    need = longrun.load(planted.path, ctx=6000).plan.device_bytes
    budget = tmp_path / "small.toml"
    budget.write_text(f"[memory]\ngpu = {need + 10_000}\nhost = 0\n")
    chat = Chat(longrun.load(planted.path, budget, ctx=6000), max_new_tokens=2)
    saved = tmp_path / "saved"
    chat.type("The magic number of", f"/save {saved}")
    tokens = saved_tokens(saved)
    told = chat.type(f"/load {saved}", "/stats")
    assert "does not fit in memory together with this conversation" in told and f"{tokens:,} of 6,000" in told
    told = chat.type("/reset", f"/load {saved}")
    assert f"going on with the session in {saved}: {tokens:,} of 6,000" in told and chat.loop.errors == 0

    state = next(saved.glob("state-*"))
    state.write_bytes(state.read_bytes()[:-1])
    told = chat.type("/reset", f"/load {saved}", "/stats", "The magic number of")
    assert "is truncated" in told and "0 of 6,000" in told and chat.loop.errors == 1
    assert chat.runner.session.num_tokens == tokens


def test_a_question_without_answer_is_told_and_can_be_answered(runtime, text_file, tmp_path):
    chat = Chat(runtime, folder=tmp_path / "kept")
    from longrun.documents.document import read_document

    chat.runner.talk.read([read_document(text_file)], ask(0))
    del chat
    chat = Chat(runtime, folder=tmp_path / "kept")
    told = chat.type("/continue")
    assert "has no answer yet" in told and chat.out.getvalue() == f"{spaced(NEEDLES[0].key)}.\n"


@pytest.mark.parametrize("path", ["~nobody-here/x", "n" * 300, "a\0b", "/nowhere/" + "d/" * 3000, "/proc/self/mem"])
def test_no_path_ends_a_chat(runtime, path):
    chat = Chat(runtime, max_new_tokens=2)
    chat.type("The magic number of")
    tokens = chat.runner.session.num_tokens
    told = chat.type(f"/file {path}", f"/save {path}", f"/load {path}", "/stats")
    assert told.count("error: ") == 3 and chat.loop.errors == 3 and chat.loop.defects == 0
    assert "Traceback" not in told and len(told) < 2000
    assert f"{tokens:,} of 6,000 tokens used" in told


def test_a_defect_of_ours_is_told_with_its_traceback_and_the_conversation_lives(runtime, tmp_path, monkeypatch):
    chat = Chat(runtime, max_new_tokens=2)
    chat.type("The magic number of")
    tokens = chat.runner.session.num_tokens
    with monkeypatch.context() as patch:
        patch.setattr("longrun.chat.loop.read_documents", lambda paths: {}["not there"])
        told = chat.type("/file x")
    assert "Traceback" in told and "KeyError: 'not there'" in told and "defect of longrun (KeyError)" in told
    assert chat.loop.defects == 1
    chat.type(f"/save {tmp_path / 'saved'}")
    assert saved_tokens(tmp_path / "saved") == tokens and chat.loop.defects == 0


def test_a_conversation_that_was_lost_can_be_begun_anew(runtime, monkeypatch):
    chat = Chat(runtime, max_new_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(type(runtime), "new_session", lambda self, capacity: {}["no room"])
        told = chat.type("/reset", "hello", "/stats", "/save x")
    assert told.count("there is no conversation in memory: /reset begins one") == 3
    chat.runner.reset()
    chat.type("hello")
    assert chat.loop.errors == chat.loop.defects == 0 and chat.runner.session.num_tokens
