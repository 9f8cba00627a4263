"""scripts/kill_sessions.py: a few kills pass, and what would be a loss is one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import longrun
from scripts import kill_sessions

SCRIPT = Path(kill_sessions.__file__)


@pytest.mark.parametrize(("prefill", "sparse_tokens"), [("exact", 0), ("sparse", 500)])
def test_a_few_kills_lose_nothing(prefill, sparse_tokens):
    # sparse: ten chunks of 50 that begin from 50 on, and a tile of 128 or more before the last 64
    argv = ["--kills", "5", "--tokens", "700", "--prefill", prefill]
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["most_tokens_behind"], result["faults"]) == (5, 0, [])
    assert done.stdout.splitlines()[1].endswith("equal tokens")
    assert result["records"][0]["sparse_tokens"] == sparse_tokens


@pytest.fixture
def read(planted, tmp_path):
    """A text of 100 tokens, read and saved."""
    runtime = longrun.load(planted.path, device="cpu", ctx=200, chunk_size=50)
    text = kill_sessions.make_text(runtime, 3, 100)
    session = runtime.new_session()
    session.attach(tmp_path / "s")
    session.prefill(text.token_ids)
    return runtime, text, tmp_path / "s"


def test_what_was_lost_is_a_fault(read):
    runtime, text, folder = read
    kill_sessions.check_after_kill(runtime, text, folder, [50, 100])
    kill_sessions.check_end(runtime, text, folder)
    assert text.faults == []
    kill_sessions.check_after_kill(runtime, text, folder, [50, 100, 150])
    assert "50 tokens were reported as read and lost" in text.faults[-1]
    text.expected[-1] ^= 1
    kill_sessions.check_end(runtime, text, folder)
    assert "other next tokens" in text.faults[-1]
    text.token_ids[3] ^= 1
    kill_sessions.check_after_kill(runtime, text, folder, [])
    assert "other tokens than the text's" in text.faults[-1]
    text.token_ids[3] ^= 1
    text.sparse_tokens[100] = 50
    kill_sessions.check_after_kill(runtime, text, folder, [])
    assert "0 of the tokens were read sparsely instead of 50" in text.faults[-1]
    next(folder.glob("state-*")).unlink()
    kill_sessions.check_after_kill(runtime, text, folder, [])
    assert "cannot be read" in text.faults[-1] and len(text.faults) == 5


def test_a_child_that_fails_is_a_fault(read, monkeypatch):
    runtime, text, folder = read
    (folder / "manifest.json").write_text("{}")
    kill_sessions.read_through(runtime, text, folder, 0, random.Random(0))
    assert text.faults == ["a child ended with status 1"]
