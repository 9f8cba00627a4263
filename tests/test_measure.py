"""The runner of measurements: lanes, limits, what is kept, and the plans that are shipped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longrun.errors import InputError
from scripts.bench import measure

PLANS = sorted((measure.ROOT / "scripts" / "bench" / "measurements").glob("*.toml"))
VALUES = {"out": "o", "planted": "p", "model": "m", "demo": "d", "scratch": "s"}


def plan(folder, *runs, head=""):
    path = folder / "plan.toml"
    tables = ["[[run]]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in run.items()) for run in runs]
    path.write_text(head + "\n".join(tables))
    return path


def code(text):
    return f'python -c "{text}"'


def ended(out):
    return {one["name"]: one for one in json.loads((out / measure.SUMMARY).read_text())["runs"]}


def test_lanes_run_beside_each_other_and_a_failure_stops_nothing(tmp_path, capsys):
    wait = (
        "import pathlib, time; pathlib.Path('{}').touch(); other = pathlib.Path('{}')\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    first, second, name = tmp_path / "first", tmp_path / "second", "CUDA_VISIBLE_DEVICES"
    runs = (
        {"name": "a1", "lane": "a", "seconds": 60, "command": code(wait.format(first, second))},
        {"name": "a2", "lane": "a", "seconds": 60, "command": code("print('last words'); raise SystemExit(3)")},
        {"name": "a3", "lane": "a", "seconds": 60, "command": code(f"import os; print(os.getenv('{name}'))")},
        {"name": "b1", "lane": "b", "seconds": 60, "command": code(wait.format(second, first))},
    )  # fmt: skip
    out = tmp_path / "out"
    assert measure.main([str(plan(tmp_path, *runs)), "--out", str(out), "--gpus", "a=7"]) == 1
    found = ended(out)
    assert {name: (one["how"], one["exit_status"]) for name, one in found.items()} == {
        "a1": ("done", 0), "a2": ("failed", 3), "a3": ("done", 0), "b1": ("done", 0),
    }  # fmt: skip
    assert (out / "a3.log").read_text().strip() == "7"
    assert "a2  last words" in capsys.readouterr().out


def test_a_second_call_takes_up_what_is_not_done(tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    runs = (
        {"name": "once", "seconds": 60, "command": code(f"open('{mark}', 'a').write('x')")},
        {"name": "later", "seconds": 60, "command": code("import sys; sys.exit(not ${good})")},
    )
    path = str(plan(tmp_path, *runs, head="[values]\ngood = 'False'\n[rehearse]\ngood = 'True'\n"))
    assert measure.main([path, "--out", str(out)]) == 1
    assert measure.main([path, "--out", str(out), "--rehearse", "--set", "good=0"]) == 1
    assert measure.main([path, "--out", str(out), "--rehearse"]) == 0
    assert mark.read_text() == "x"


def test_a_run_that_takes_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "GRACE_SECONDS", 0.3)
    out, pid = tmp_path / "out", tmp_path / "pid"
    child = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); "
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open('{pid}', 'w').write(str(other.pid)); time.sleep(600)"
    )
    runs = (
        {"name": "long", "seconds": 5, "command": code(child)},
        {"name": "next", "seconds": 60, "command": code("")},
    )
    assert measure.main([str(plan(tmp_path, *runs)), "--out", str(out)]) == 1
    found = ended(out)
    assert (found["long"]["how"], found["next"]["how"]) == ("stopped", "done")
    end = time.monotonic() + 10
    while _alive(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(int(pid.read_text()))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_runs_and_begins_nothing(tmp_path, number, status):
    out, pid = tmp_path / "out", tmp_path / "pid"
    child = f"import os, time; open('{pid}', 'w').write(str(os.getpid())); time.sleep(600)"
    runs = ({"name": "one", "seconds": 600, "command": code(child)}, {"name": "two", "seconds": 9, "command": code("")})
    program = subprocess.Popen([sys.executable, measure.__file__, str(plan(tmp_path, *runs)), "--out", str(out)])
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        program.send_signal(number)
        assert program.wait(60) == status
    finally:
        program.kill()
    assert not _alive(int(pid.read_text()))
    assert [(one["how"], one["exit_status"]) for one in ended(out).values()] == [("failed", -15), ("not begun", None)]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_with_no_time_left_nothing_is_begun(tmp_path):
    out = tmp_path / "out"
    path = plan(tmp_path, {"name": "a", "seconds": 60, "command": code("")})
    assert measure.main([str(path), "--out", str(out), "--seconds", "1"]) == 1
    assert ended(out)["a"]["how"] == "not begun"
    assert not (out / "a.log").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "must hold [[run]] tables"),
        ("[values]\na = 1\n[[run]]\nname='a'\nseconds=1\ncommand='a'", "must hold [[run]] tables"),
        ("[[run]]\nname='a'", "a run is not as it should be"),
        ("[[run]]\nname='a'\nseconds=1\ncommand='a'\nlan='b'", "lan"),
        ("[[run]]\nname='a'\nseconds=0\ncommand='a'", "run 'a' has a bad value"),
        ("[[run]]\nname='a/b'\nseconds=1\ncommand='a'", "run 'a/b' has a bad value"),
        ("[[run]]\nname='a'\nseconds=1\ncommand='a ${b}'", "run a needs a value: give --set b=..."),
        ("[[run]]\nname='a'\nseconds=1\ncommand='a \"'", "run a: its command cannot be read"),
    ],
)  # fmt: skip
def test_bad_plans(tmp_path, text, words):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        measure.main([str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_bad_values_and_a_summary_of_something_else(tmp_path):
    path = plan(
        tmp_path, {"name": "a", "seconds": 9, "command": "no-such-program ${size}"}, head="[values]\nsize = '1'\n"
    )
    for value in ("x", "=x", "1=x"):
        with pytest.raises(InputError, match="no NAME=VALUE"):
            measure.main([str(path), "--out", str(tmp_path), "--set", value])
    for option, known in (("--set", "size"), ("--gpus", "all")):
        with pytest.raises(InputError, match=f"{option} 'sise' is nowhere in the plan, which has {known}"):
            measure.main([str(path), "--out", str(tmp_path), option, "sise=1"])
    assert measure.main([str(path), "--out", str(tmp_path / "o")]) == 1
    assert "no-such-program cannot be started" in (tmp_path / "o" / "a.log").read_text()
    (tmp_path / "o" / measure.SUMMARY).write_text('{"runs": [{"name": 1}]}')
    with pytest.raises(InputError, match="is no summary of measurements"):
        measure.main([str(path), "--out", str(tmp_path / "o")])


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("small", [False, True])
def test_shipped_plans_name_programs_that_exist(path, small):
    runs, values, rehearsed = measure.read_plan(path)
    for one in runs:
        program, first, *rest = one.argv(values | (rehearsed if small else {}) | VALUES)
        assert program == sys.executable
        where = rest[0].replace(".", "/") if first == "-m" else first
        assert (measure.ROOT / where).exists() or (measure.ROOT / f"{where}.py").exists()
    assert rehearsed.keys() <= values.keys()
