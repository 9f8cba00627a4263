"""The plan's command: its table and JSON, status and message of errors, and that it starts quickly."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planned_models import LLAMA, LLAMA_JSON, assumed
from rich.console import Console
from run_here import run_here

from longrun.cli import PLAN_OPTIONS
from longrun.errors import CheckpointError
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.plan import make_plan
from longrun.plan.report import print_plan
from longrun.plan.shapes import SHAPES
from longrun.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_JSON))
    return str(folder)


def start_python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


@pytest.fixture
def run_plan(capsys):
    return lambda *arguments: run_here(lambda: plan_command(arguments), capsys, PLAN_OPTIONS)


def test_table_says_what_is_planned(model_dir):
    options = ("--ctx", "3.3M", "--budget", "a100-80g", "--retrieval-ratio", "0.5")
    result = start_python("-m", "longrun.plan", "--model", model_dir, *options)
    assert result.returncode == 0, result.stderr
    for text in ["3.3M tokens", "128 of 256 KV heads", "assumed", "55,755,177,984", "17,920 bytes per token", "8,192"]:
        assert text in result.stdout


def test_a_well_known_shape_needs_no_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan_command(["--model", "llama-3-8b", "--budget", "a100-80g", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = make_plan(LLAMA, Budget.load("a100-80g"))
    assert found.pop("times")["speeds"]["device"].startswith("an A100")
    assert found.pop("notes")[-1].startswith("there is no folder llama-3-8b here")
    assert found == {key: value for key, value in json.loads(json.dumps(plan.to_dict())).items() if key != "notes"}
    for name in SHAPES:
        assert plan_command(["--model", name, "--budget", "a100-80g", "--ctx", "1000", "--weights", "int4"]) == 0
    with pytest.raises(CheckpointError, match=r"Llama-3-80B does not exist: .* \(nearest: Llama-3-8B\)"):
        plan_command(["--model", "Llama-3-80B"])
    Path("Llama-3-8B").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):  # a folder of that name wins
        plan_command(["--model", "Llama-3-8B"])


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 150])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_no_terminal_is_too_narrow(width, term, monkeypatch):
    """Every item with its size, no word cut and no line of the table broken by the terminal."""
    monkeypatch.setenv("TERM", term)
    plan = make_plan(LLAMA, Budget.load("rtx4090-24g"), 3_300_000, split=assumed(LLAMA, Budget.load("cpu"), 0.5))
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width, height=40, force_terminal=True, color_system=None))
    text = out.getvalue()
    assert "\u2026" not in text
    assert ("\u2500" in text) == (term == "xterm" and width >= 40)
    rows = [line for line in text.splitlines() if line.startswith(" ")]
    assert all(len(row) <= width for row in rows)
    for item in plan.items:
        assert re.search(rf"{re.escape(item.name)}.* ({item.bytes:,}|{re.escape(format_bytes(item.bytes))})\b", text)
    flat = " ".join(text.split())
    assert "24.0 GB of 24.0" in flat and "44.1 GB of 51.5" in flat


def test_json_is_the_plan(model_dir, run_plan):
    options = ("--ctx", "1M", "--budget", "a100-80g", "--kv", "bf16", "--weights", "int8", "--chunk-size", "4.096K")
    result = run_plan("--model", model_dir, *options, "--json")
    assert result.status == 0, result.err
    assert result.err == ""
    budget = Budget.load("a100-80g").override(kv_format="bf16", weight_format="int8", chunk_size=4096)
    plan = make_plan(LLAMA, budget, 10**6)
    assert json.loads(result.out) == {**json.loads(json.dumps(plan.to_dict())), "times": None}


def test_no_fit_leaves_with_status_2_and_the_same_facts_in_json(model_dir, run_plan):
    options = ("--model", model_dir, "--ctx", "20M", "--budget", "a100-80g")
    result = run_plan(*options)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: a100-80g (gpu 80.0 GB, host 107 GB) does not hold 20,000,000 tokens")
    as_json = run_plan(*options, "--json")
    assert as_json.status == 2
    facts = json.loads(as_json.out)
    assert facts["fits"] is False
    assert f"error: {facts['error']}\n" == result.err
    assert facts["suggestions"][0]["setting"] == "ctx"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ctx", "0"], "at least 1"),
        (["--ctx", "-5"], "'-5'"),
        (["--ctx", "3.3X"], "'3.3X'"),
        (["--budget", "a100"], "shipped budget"),
        (["--head-map", "/no/such/map"], "/no/such/map is not a folder"),
        (["--retrieval-ratio", "half"], "'half'"),
        (["--chunk-size", "0"], "--chunk-size: value '0' must be at least 1"),
        (["--chunk-size", "32X"], "--chunk-size: value '32X'"),
        (["--chunk-size", "9" * 5000], "--chunk-size: value '999"),
        (["--ctx", "9" * 5000], "at most 1,000,000,000 tokens"),
        (["--retrieval-ratio", "nan"], "--retrieval-ratio: value nan is not a finite number"),
        (["--kv", "x" * 5000], "--kv: invalid choice"),
        (["--budget", "~nobody-here/b.toml"], "names a home folder that is not known"),
        (["--model", "m" * 300], "File name too long"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(model_dir, arguments, words, run_plan):
    result = run_plan("--model", model_dir, *arguments)
    assert result.status == 2
    assert words in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1 and len(result.err) < 600


def test_missing_model_folder(run_plan):
    result = run_plan("--model", "/no/such/model")
    assert result.status == 2
    assert result.err.startswith("error: model folder /no/such/model does not exist")


def test_planning_is_quick_and_imports_nothing_heavy(model_dir):
    script = (
        "import sys; from longrun.plan.command import plan_command; plan_command(sys.argv[1:]); "
        "sys.exit(str({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    arguments = ("--model", model_dir, "--ctx", "3.3M", "--budget", "rtx4090-24g", "--retrieval-ratio", "0.5")
    start = time.perf_counter()
    result = start_python("-c", script, *arguments)
    assert result.stderr == "set()\n"
    assert "3.3M tokens" in result.stdout
    assert time.perf_counter() - start < 5.0  # well under a second on an idle machine
