"""Standard streams that are closed, full or left by their reader: every command ends with a status and a sentence."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from planned_models import LLAMA_JSON
from planted_chat import saved_tokens

from longrun.cli import Parser, StdoutLost, run
from longrun.errors import InputError
from longrun.patterns.head_map import HeadMap

ROOT = Path(__file__).resolve().parent.parent
FULL = "error: stdout cannot be written (No space left on device): send it somewhere else\n"
CLOSED = "error: stdout is closed: send it somewhere, to /dev/null for example\n"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Commands that print something and load no model."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "config.json").write_text(json.dumps(LLAMA_JSON))
    for name in ("a", "b"):
        HeadMap.uniform(4, 4, 0.5).save(folder / name)
    (folder / "text").write_text("text")
    return {
        "plan": ["-m", "longrun.plan", "--model", str(folder), "--budget", "a100-80g", "--json"],
        "show": ["-m", "longrun.patterns", "show", str(folder / "a")],
        "compare": ["-m", "longrun.patterns", "compare", str(folder / "a"), str(folder / "b")],
        "help": ["-m", "longrun.chat", "--help"],
        "script": ["scripts/training/file_parts.py", "split", str(folder / "text"), str(folder / "parts")],
    }


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run `line` in bash, with the command as "$@"."""
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, *arguments],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plan", "show", "compare", "help", "script"])
def test_a_stdout_that_takes_nothing(commands, name):
    full = shell('"$@" > /dev/full', *commands[name])
    assert (full.returncode, full.stderr) == (2, FULL)
    left = shell('"$@" | true; exit ${PIPESTATUS[0]}', *commands[name])
    assert (left.returncode, left.stderr) in [(141, ""), (0, "")], "0 where all was written before the reader left"


def test_closed_streams(commands):
    closed = shell('"$@" >&-', *commands["plan"])
    assert (closed.returncode, closed.stderr) == (2, CLOSED)
    nowhere = shell('"$@" >&- 2>&- <&-', *commands["plan"])
    assert (nowhere.returncode, nowhere.stdout, nowhere.stderr) == (2, "", "")
    quiet = shell('"$@" 2>&- <&-', *commands["plan"])
    assert quiet.returncode == 0 and json.loads(quiet.stdout)["fits"]
    for stream in ("&-", "/dev/full"):
        mistake = shell(f'"$@" --ctx 0 2>{stream}', *commands["plan"])
        assert (mistake.returncode, mistake.stdout) == (2, ""), "an error never goes to stdout"


class Broken(io.StringIO):
    """Takes `room` characters and then fails."""

    def __init__(self, number: int, room: int = 0) -> None:
        super().__init__()
        self._number, self._room = number, room

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self._room:
            raise OSError(self._number, os.strerror(self._number))
        return super().write(text)


@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 2), (errno.EIO, 2)])
def test_a_chat_whose_stdout_is_lost_is_saved(planted, text_file, tmp_path, monkeypatch, capsys, number, status):
    from longrun.chat.command import chat_command

    folder = tmp_path / "session"
    arguments = ["--model", planted.path, "--ctx", "4K", "--file", text_file, "--prompt", "Hi", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "stdout", Broken(number))
    with pytest.raises(SystemExit) as left:
        run(lambda: chat_command([*map(str, arguments), "--session", str(folder)]))
    assert left.value.code == status and saved_tokens(folder) > 1500
    told = capsys.readouterr().err.splitlines()[-1]
    assert ("stdout cannot be written" in told) == (status == 2)


def test_no_ordinary_handler_takes_a_lost_stdout_and_streams_are_put_back(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", lost := Broken(errno.ENOSPC, room=3))
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())

    def careless() -> int:
        sys.stdout.write("abc")
        try:
            print("more")
        except Exception:
            return 0
        return 1

    with pytest.raises(SystemExit) as left:
        run(careless)
    assert left.value.code == 2 and "No space left" in stderr.getvalue()
    assert sys.stdout is lost and sys.stderr is stderr
    assert not issubclass(StdoutLost, Exception)


def test_a_lost_stderr_stops_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Broken(errno.ENOSPC))
    with pytest.raises(SystemExit) as left:
        run(lambda: print("said", file=sys.stderr) or print("done") or 0)
    assert left.value.code == 0 and capsys.readouterr().out == "done\n"


def test_a_character_that_stdout_lacks_ends_nothing(commands):
    done = shell('PYTHONIOENCODING=ascii "$@"', *commands["show"])
    assert done.returncode == 0 and done.stderr == ""


def test_a_parser_refuses_in_one_sentence():
    parser = Parser(prog="prog")
    parser.add_argument("--kind", choices=["a", "b"])
    with pytest.raises(InputError, match=r"invalid choice.*\(see prog --help\)") as error:
        parser.parse_args(["--kind", "x" * 5000])
    assert len(str(error.value)) < 600


def test_every_program_leaves_through_one_door_and_reads_its_options_with_one_parser():
    programs = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("longrun/*.py"), *ROOT.glob("longrun/*/*.py")]
    ours = ("template_child.py", "pdf_child.py", "llama_cpp_child.py", "measure.py")  # never started by a person
    programs = [path for path in programs if path.name not in ours]
    started = [path for path in programs if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(started) > 15
    for path in started:
        command = path.with_name("command.py")  # of a package, which its __main__ starts
        path = command if path.name == "__main__.py" and command.exists() else path
        text = path.read_text(encoding="utf-8")
        assert re.search(r"\brun\((main|chat_command|plan_command|server_command|lambda)\b", text), (
            f"{path} does not leave through run"
        )
    for path in programs:  # of some only the options stand in a file of their own
        text = path.read_text(encoding="utf-8")
        assert "argparse.ArgumentParser(" not in text, f"{path}: take longrun.cli.Parser"
        assert not re.search(r"type=(int|float|Path)\b", text), f"{path}: take a type of longrun.arguments or paths"
