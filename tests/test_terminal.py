"""What a person types on a terminal: lines, pasted text, completion; and which of it is a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from longrun.chat.loop import COMMANDS, Pasted
from longrun.chat.terminal import Terminal, can_edit

PATHS = [name for name, takes_path in COMMANDS.items() if takes_path]
ENTER, ALT_ENTER = "\r", "\x1b\r"


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def typed() -> Iterator[Callable[[str], str | None]]:
    """Gives what a terminal reads when these keys are pressed."""
    with create_pipe_input() as keys:
        terminal = Terminal(COMMANDS, PATHS, keys, DummyOutput())

        def read(text: str) -> str | None:
            keys.send_text(text)
            return terminal.read()

        yield read


@pytest.mark.parametrize(
    ("keys", "text", "pasted"),
    [
        ("hello" + ENTER, "hello", False),
        ("hello\n", "hello", False),
        ("one\\" + ENTER + "two" + ENTER, "one\ntwo", False),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo", False),
        ("/stats" + ENTER, "/stats", False),
        (paste("one\r\ntwo\rthree\n") + ENTER, "one\ntwo\nthree\n", True),
        (paste("/exit") + ENTER, "/exit", True),
        (paste("/exit\n") + " and more" + ENTER, "/exit\n and more", True),
        ("/file " + paste("a path.txt") + ENTER, "/file a path.txt", False),
        ("/file " + paste("a\n/reset") + ENTER, "/file a\n/reset", True),
        ("What is this? " + paste("/exit\n/reset") + ENTER, "What is this? /exit\n/reset", True),
        ("  " + paste("/exit") + ENTER, "  /exit", True),
    ],
)
def test_keys_become_one_message_and_what_is_pasted_is_no_command(typed, keys, text, pasted):
    found = typed(keys)
    assert found == text and isinstance(found, Pasted) == pasted
    assert not isinstance(typed("/stats" + ENTER), Pasted), "the next message is another"


def test_ctrl_c_and_ctrl_d(typed):
    with pytest.raises(KeyboardInterrupt):
        typed("begun\x03")
    assert typed("\x04") is None
    assert typed("still here" + ENTER) == "still here"


def test_tab_completes_commands_and_paths(typed, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert typed("/fi\t n\t" + ENTER) == "/file notes.txt"
    assert typed("/file fo\tin\t" + ENTER) == "/file folder/inner.txt"
    assert typed("/cont\t" + ENTER) == "/continue"
    assert typed("no com\t" + ENTER) == "no com"
    completer = Terminal(COMMANDS, PATHS, output=DummyOutput())._session.completer
    assert completer is not None

    def shown(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]

    assert shown("/") == sorted(COMMANDS) and shown("/sa") == ["/save"]
    assert shown("/stats ") == shown("x /file ") == []
    assert sorted(shown(f"/save {tmp_path}/")) == ["folder/", "notes.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shown("/load ~/f") == ["older/"]
    assert shown(f"/load {Path.cwd()}/folder/in") == ["ner.txt"]


@pytest.mark.parametrize(("term", "can"), [("xterm-256color", True), ("dumb", False), ("", False), (None, False)])
def test_a_terminal_that_cannot_move_its_cursor_is_known(monkeypatch, term, can):
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert can_edit() == can
