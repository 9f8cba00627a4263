"""The documents are right: commands, links, budgets, dependencies, the printed plan and the Python example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from warm_python import WarmPython

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITHOUT_OPTIONS = ("longrun.model.demo", "tests/rooms.py")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def run(*args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> list[tuple[str, ...]]:
    """Modules and scripts that any document starts: ("-m", module) or (script,)."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found |= {("-m", name) for name in re.findall(r"python -m ([\w.]+)", text)}
        found |= {(name,) for name in re.findall(r"python ((?:scripts|tests)/[\w/]+\.py)", text)}
    return sorted(found)


def test_the_documents_name_the_commands() -> None:
    assert {("-m", "longrun.chat"), ("-m", "longrun.plan"), ("scripts/needle_sweep.py",)} <= set(commands())


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist(warm_python: WarmPython, command: tuple[str, ...]) -> None:
    if command[-1] in WITHOUT_OPTIONS:
        assert (ROOT / command[-1]).is_file() or find_spec(command[-1]) is not None
    else:
        done = warm_python.run(*command, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout


def test_a_command_that_fails_is_found(warm_python: WarmPython, tmp_path: Path) -> None:
    assert warm_python.run("scripts/missing.py", "--help").returncode == 1
    script = tmp_path / "script.py"
    script.write_text("import sys\nimport longrun.missing\n")
    assert "ModuleNotFoundError" in warm_python.run(str(script)).stderr
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert warm_python.run(str(script)).returncode == -9
    script.write_text("import sys\nprint(sys.argv[1:], __name__, 'longrun' in sys.modules)\nsys.exit(3)\n")
    done = warm_python.run(str(script), "a", "b")
    assert (done.returncode, done.stdout) == (3, "['a', 'b'] __main__ False\n")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    texts = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", texts, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def heading_anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in heading_anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    assert broken_links(document) == []


def test_the_link_check_finds_broken_links(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#another) [c](missing.md) [d](page.md) [e](https://x.y/z)\n")
    assert broken_links(page) == ["#another", "missing.md"]


def test_every_shipped_budget_is_listed() -> None:
    shipped = [path.stem for path in (ROOT / "longrun" / "plan" / "budgets").glob("*.toml")]
    assert len(shipped) >= 4
    assert [name for name in shipped if f"`{name}`" not in README] == []


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {re.match(r"[\w.-]+", line)[0] for line in lines} - {"longrun"}


def test_dependencies_are_explained_and_no_others() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([\w.-]+)` \|", text, flags=re.MULTILINE))
    assert explained == declared()


def test_dependencies_are_imported_somewhere() -> None:
    """What is declared is used; some serve other packages and are imported by them."""
    needed_by_others = {
        "accelerate",
        "gguf",
        "httpx",
        "jsonschema",
        "lxml",
        "numpy",
        "playwright",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "setuptools",
    }
    folders = ("longrun", "kernels", "quant", "patterns", "scripts")
    source = "\n".join(path.read_text(encoding="utf-8") for name in folders for path in (ROOT / name).rglob("*.py"))
    modules = {name: name.replace("-", "_") for name in declared()}
    imported = {name for name, module in modules.items() if re.search(rf"^\s*(?:import|from) {module}\b", source, re.M)}
    unused = modules.keys() - imported
    assert unused <= needed_by_others


def test_the_printed_plan_is_what_the_program_prints() -> None:
    (line,) = re.findall(r"^python (-m longrun\.plan .+)$", README, flags=re.MULTILINE)
    printed = run(*line.split())
    printed = "\n".join(row.rstrip() for row in printed.splitlines())
    assert f"```text\n{printed}\n```" in README, f"the plan in README.md should be\n{printed}"


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from longrun.lab.planted import make_planted_model

    make_planted_model(tmp_path / "my-model", "tiny")
    (tmp_path / "my-model" / "head_map").rename(tmp_path / "my-head-map")
    (tmp_path / "long-text.txt").write_text("a word and another word " * 50)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["session"].seq_len == len(names["token_ids"])
    assert "bytes planned" in capsys.readouterr().out
    assert (tmp_path / "my-session" / "manifest.json").is_file()


SPEED = re.compile(r"(\d[\d.,]*) (?:tokens/s|ms/token|ms a token|[GT]B/s|TFLOP/s)")


def unfounded_speeds(text: str) -> list[str]:
    """Paragraphs, and of a table single rows, that quote a speed without naming a result file that exists."""
    wrong = []
    for paragraph in re.split(r"\n\n|\n(?=\|)", text):
        if SPEED.search(paragraph):
            named = re.findall(r"results/([\w.-]+\.json)", paragraph)
            if not named or not all((ROOT / "docs" / "results" / name).is_file() for name in named):
                wrong.append(paragraph)
    return wrong


def test_speeds_are_quoted_from_result_files() -> None:
    assert [text for document in DOCUMENTS for text in unfounded_speeds(document.read_text(encoding="utf-8"))] == []
    assert unfounded_speeds("It runs.\n\nIt reaches 1,234.5 tokens/s.") == ["It reaches 1,234.5 tokens/s."]
    assert unfounded_speeds("40 ms/token (docs/results/nowhere.json)") != []
    row = "| 40 ms/token | [file](docs/results/h100-decode.json) |"
    assert unfounded_speeds(f"{row}\n| 5 ms/token | |\n{row}") == ["| 5 ms/token | |"]


def measured_rows(text: str) -> list[str]:
    """Rows of README's table of what has been measured, without its head."""
    section = text.partition("\n## What has been measured, and what has not\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_every_measured_row_names_its_file_and_its_speeds_stand_in_the_benchmarks() -> None:
    """Tables there are rendered from the result files (`bench_tables.py`), so a speed of no run is found."""
    rows = measured_rows(README)
    assert len(rows) >= 10
    assert [row for row in rows if not re.search(r"\]\(docs/results/[\w.-]+\.json\) \|$", row)] == []
    known = set(re.findall(r"\d[\d.,]*", (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")))
    speeds = [speed for row in rows for speed in SPEED.findall(row)]
    assert len(speeds) >= 4 and [speed for speed in speeds if speed not in known] == []


def test_the_paths_that_the_architecture_draws_exist() -> None:
    """Every file named in its drawings of a token's path and a page's life, `a/b.py, c.py` naming a/c.py as well."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawings = "\n".join(re.findall(r"```text\n(.+?)```", text, flags=re.DOTALL))
    found = re.findall(r"\b((?:\w+/)+)((?:\w*\.(?:py|cpp|cu)(?:, )?)+)", drawings)
    names = [(folder, name) for folder, files in found for name in files.removesuffix(", ").split(", ")]
    missing = []
    for at, (folder, name) in enumerate(names):
        stem = name if not name.startswith(".") else names[at - 1][1].partition(".")[0] + name
        missing += [folder + stem] if not (ROOT / folder / stem).is_file() else []
    assert len(names) >= 30 and missing == []
