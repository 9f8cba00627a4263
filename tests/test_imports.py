"""Import directions: every module belongs to a room, and a room imports only rooms below it.

The table here is the one in docs/architecture.md; a test holds the two together. Imports inside functions and under
`TYPE_CHECKING` count like any other. What is planned without torch is checked twice: by following imports through the
sources, and by importing it in a fresh process.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("quant", "kernels", "patterns")
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "triton"}


@dataclass(frozen=True)
class Room:
    """Modules that may import the same things.

    Attributes:
        modules: patterns of module names; a module belongs to the first room of the table that has a matching one.
        rooms: rooms it may import; `base` and itself always.
        packages: packages of others that it may import.
        light: importing any of its modules, and calling into it, must not load one of `HEAVY`.
    """

    name: str
    modules: tuple[str, ...]
    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    light: bool = False


ROOMS = (
    Room(
        "base",
        ("longrun.errors", "longrun.units", "longrun.paths", "longrun.cli", "longrun.interrupts"),
        light=True,
    ),
    Room("formats", ("longrun.quant.*_format",), light=True),
    Room("weight kernels", ("longrun.kernels.weight_dequantize",), ("formats",), ("torch", "triton")),
    Room("quant", ("longrun.quant.*",), ("weight kernels", "formats"), ("torch", "bitsandbytes")),
    Room("kernels", ("longrun.kernels.*",), ("quant", "formats"), ("torch", "triton")),
    Room(
        "head maps",
        (
            "longrun.patterns.head_map",
            "longrun.patterns.head_map_folder",
            "longrun.patterns.head_split",
            "longrun.patterns.baseline_maps",
        ),
        light=True,
    ),
    Room(
        "head map tools",
        (
            "longrun.patterns.head_map_picture",
            "longrun.patterns.head_map_table",
            "longrun.patterns.compare_maps",
            "longrun.patterns.identify_settings",
            "longrun.patterns.identify_progress",
        ),
        ("head maps",),
        ("rich", "matplotlib"),
        light=True,
    ),
    Room("config", ("longrun.config",), light=True),
    Room(
        "specs",
        ("longrun.cache.spec", "longrun.attention.spec", "longrun.model_bytes"),
        ("config", "formats"),
        light=True,
    ),
    Room(
        "plan",
        ("longrun.budget", "longrun.budgets", "longrun.placement", "longrun.plan", "longrun.plan_*"),
        ("specs", "config", "head maps", "formats"),
        ("rich",),
        light=True,
    ),
    Room("cache", ("longrun.cache", "longrun.cache.*"), ("kernels", "quant", "specs", "formats"), ("torch", "psutil")),
    Room("attention interface", ("longrun.attention.interface",), packages=("torch",)),
    Room(
        "attention",
        ("longrun.attention", "longrun.attention.*"),
        ("attention interface", "cache", "kernels", "quant", "specs", "formats"),
        ("torch", "numpy"),
    ),
    Room(
        "model",
        ("longrun.model", "longrun.model.*"),
        ("attention interface", "quant", "specs", "config", "formats"),
        ("torch", "numpy", "transformers", "huggingface_hub"),
    ),
    Room("sampling", ("longrun.sampling",), packages=("torch",)),
    Room(
        "engine",
        ("longrun.engine", "longrun.decode_graph", "longrun.session", "longrun.store", "longrun.synthetic_session"),
        ("model", "attention", "attention interface", "cache", "plan", "sampling"),
        ("torch", "safetensors"),
    ),
    Room("documents", ("longrun.documents",), light=True),
    Room("needles", ("longrun.needles", "longrun.needle_words"), packages=("transformers",)),
    Room("long tasks", ("longrun.long_tasks", "longrun.long_words"), packages=("numpy", "transformers")),
    Room(
        "trainers",
        (
            "longrun.patterns.identify",
            "longrun.patterns.identify_checkpoint",
            "longrun.patterns.gates",
            "longrun.patterns.gate_texts",
            "longrun.patterns.gated_attention",
            "longrun.patterns.reconstruction",
            "longrun.patterns.reconstruction_*",
        ),
        ("needles", "documents", "model", "kernels", "config", "head map tools", "head maps"),
        ("torch", "transformers", "safetensors"),
    ),
    Room(
        "auto head map",
        ("longrun.auto_head_map",),
        ("trainers", "model", "cache", "config", "head map tools", "head maps"),
        ("torch",),
    ),
    Room(
        "runtime",
        ("longrun.runtime", "longrun.backend", "longrun.gpu_checks", "longrun.head_map_check"),
        ("auto head map", "engine", "model", "attention", "cache", "kernels", "plan", "specs", "config", "head maps"),
        ("torch", "transformers", "psutil"),
    ),
    Room(
        "chat",
        (
            "longrun.chat",
            "longrun.chat_*",
            "longrun.answer",
            "longrun.conversation",
            "longrun.progress",
            "longrun.report",
            "longrun.text_stream",
        ),
        ("documents", "runtime", "auto head map", "engine", "model", "plan", "sampling", "formats"),
        ("rich", "transformers"),
    ),
    Room(
        "results",
        ("longrun.report_env", "longrun.needle_results", "longrun.needle_report"),
        packages=("rich", "matplotlib", "torch"),
    ),
    Room(
        "patterns command",
        ("longrun.patterns.__main__",),
        ("trainers", "head map tools", "head maps"),
        ("rich",),
    ),
    Room(
        "planted",
        ("longrun.planted", "longrun.planted_*", "longrun.shard_writer"),
        ("needles", "head maps"),
        ("torch", "tokenizers"),
    ),
    Room(
        "quality",
        ("longrun.quality", "longrun.quality.*"),
        ("needles", "runtime", "engine", "attention", "cache", "quant", "head maps", "formats"),
        ("torch", "numpy", "matplotlib", "transformers"),
    ),
    Room("package", ("longrun",), ("runtime", "engine", "plan", "head maps"), light=True),
)


@dataclass(frozen=True)
class Found:
    """One import statement: the module named, and whether only a type checker executes it."""

    target: str
    line: int
    typing_only: bool


@cache
def project_sources() -> dict[str, str]:
    """Source of every module of ours by the name it is imported by; links are not followed."""
    found = {}
    for folder in ("longrun", *LINKED):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "longrun" and parts[1] in LINKED:
                continue  # rglob follows links on some versions of Python
            parts = parts if parts[0] == "longrun" else ("longrun", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


@cache
def written_imports(source: str) -> tuple[tuple[str, int, tuple[str, ...], int, bool], ...]:
    """Import statements as they stand: (module, dots before it, names, line, under TYPE_CHECKING)."""

    def visit(node: ast.AST, typing_only: bool) -> Iterator[tuple[str, int, tuple[str, ...], int, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, (), node.lineno, typing_only
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield node.module or "", node.level, names, node.lineno, typing_only
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, typing_only)

    return tuple(visit(ast.parse(source), False))


def find_imports(module: str, sources: Mapping[str, str]) -> Iterator[Found]:
    """Imports of a module, relative ones resolved; an imported name that is a module is taken as that module."""
    packages = {name.rpartition(".")[0] for name in sources}
    for base, level, names, line, typing_only in written_imports(sources[module]):
        if level:
            package = module.split(".") if module in packages else module.split(".")[:-1]
            package = package[: len(package) - level + 1]
            base = ".".join([*package, *([base] if base else [])])
        if not names:
            yield Found(base, line, typing_only)
        for name in names:
            inner = f"{base}.{name}"
            yield Found(inner if inner in sources or inner in packages else base, line, typing_only)


def room_of(module: str) -> Room | None:
    return next((room for room in ROOMS if any(fnmatchcase(module, pattern) for pattern in room.modules)), None)


def is_ours(target: str) -> bool:
    return target == "longrun" or target.startswith("longrun.")


def direction_violations(sources: Mapping[str, str]) -> list[str]:
    """One sentence for every module without a room and every import that the table does not allow."""
    wrong = []
    for module, source in sorted(sources.items()):
        room = room_of(module)
        if room is None:
            wrong.append(f"{module} has no room: add it to the table of rooms")
            continue
        if "import_module" in source or "__import__" in source:
            allowed = module == "longrun"  # its lazy names; every other import is written where it can be seen
            if not allowed:
                wrong.append(f"{module} imports by a computed name, which hides the direction")
        for found in find_imports(module, sources):
            where, top = f"{module}:{found.line}", found.target.split(".")[0]
            if not is_ours(found.target):
                if top not in sys.stdlib_module_names and top not in room.packages:
                    wrong.append(f"{where}: room {room.name!r} may not import the package {top}")
                continue
            other = room_of(found.target)
            if other is None:
                wrong.append(f"{where}: {found.target} has no room")
            elif other.name not in (room.name, "base", *room.rooms):
                wrong.append(f"{where}: room {room.name!r} may not import {found.target} of room {other.name!r}")
    return wrong


def heavy_chains(sources: Mapping[str, str]) -> list[str]:
    """For every light module that reaches a heavy package: the chain of imports that leads there."""

    def next_of(module: str) -> Iterator[str]:
        parent = module.rpartition(".")[0]
        if parent in sources:
            yield parent  # importing a module runs its package's __init__ first
        for found in find_imports(module, sources):
            if not found.typing_only:
                yield found.target

    chains = []
    for start in sorted(sources):
        room = room_of(start)
        if room is None or not room.light:
            continue
        todo, seen = [(start,)], {start}
        while todo:
            chain = todo.pop()
            for target in next_of(chain[-1]):
                if target.split(".")[0] in HEAVY:
                    chains.append(" -> ".join((*chain, target)))
                elif target in sources and target not in seen:
                    seen.add(target)
                    todo.append((*chain, target))
    return chains


def test_every_module_has_a_room_and_imports_only_what_the_table_allows() -> None:
    sources = project_sources()
    assert {"longrun", "longrun.quant.page_codec", "longrun.kernels.int4_pages", "longrun.runtime"} <= sources.keys()
    assert direction_violations(sources) == []


def test_planning_does_not_reach_torch_through_any_chain_of_imports() -> None:
    assert heavy_chains(project_sources()) == []


def test_the_table_only_points_down_and_holds_no_empty_room() -> None:
    modules = project_sources()
    for position, room in enumerate(ROOMS):
        below = {other.name for other in ROOMS[:position]}
        assert set(room.rooms) <= below, f"{room.name} imports a room that stands above it"
        assert any(room_of(module) is room for module in modules), f"no module is in room {room.name}"
        if room.light:
            assert not HEAVY & set(room.packages), room.name


# Sources that do not exist, put beside the real ones: (module, source, what must be said).
MADE_UP = [
    ("longrun.cache.made_up", "from longrun.session import Session", "may not import longrun.session"),
    ("longrun.cache.made_up", "def f():\n    import longrun.runtime", "may not import longrun.runtime"),
    ("longrun.model.made_up", "from longrun.cache.dual import DualCache", "may not import longrun.cache.dual"),
    ("longrun.model.made_up", "from longrun.attention import torch_backend", "may not import longrun.attention.t"),
    ("longrun.kernels.made_up", "from ..cache.pool import PagePool", "may not import longrun.cache.pool"),
    (
        "longrun.quant.made_up",
        "if TYPE_CHECKING:\n    from longrun.kernels import cpu_int4",
        "import longrun.k",
    ),
    ("longrun.patterns.head_split", "import numpy", "may not import the package numpy"),
    ("longrun.runtime", "import kernels.int4_pages", "may not import the package kernels"),
    ("longrun.chat_made_up", "from longrun import load", "may not import longrun of room 'package'"),
    ("longrun.unheard_of", "", "has no room"),
    ("longrun.cache.made_up", "importlib.import_module('longrun.' + 'chat')", "computed name"),
]


@pytest.mark.parametrize(("module", "source", "message"), MADE_UP)
def test_the_checker_finds_a_made_up_violation(module: str, source: str, message: str) -> None:
    sources = {**project_sources(), module: source}
    new = [text for text in direction_violations(sources) if text not in direction_violations(project_sources())]
    assert len(new) == 1
    assert message in new[0]
    assert new[0].startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longrun.plan_made_up", "import torch"),
        ("longrun.plan_made_up", "def later():\n    from torch import Tensor"),
        ("longrun.plan_made_up", "from longrun.quant.page_codec import exact_dtype"),
        ("longrun.cache", "from longrun.cache.dual import DualCache"),
        ("longrun.errors", "import longrun.sampling"),
    ],
)
def test_the_checker_finds_a_made_up_way_to_torch(module: str, source: str) -> None:
    assert heavy_chains({**project_sources(), module: source})


def test_imports_for_a_type_checker_are_no_way_to_torch() -> None:
    sources = {**project_sources(), "longrun.plan_made_up": "if TYPE_CHECKING:\n    import torch"}
    assert heavy_chains(sources) == []


def test_light_modules_load_no_heavy_package_in_a_fresh_process() -> None:
    light = [m for m in sorted(project_sources()) if (room := room_of(m)) and room.light and "__main__" not in m]
    assert "longrun.plan_cli" in light
    code = f"import sys\nfor name in {light!r}: __import__(name)\nprint(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_linked_rooms_are_no_top_level_packages() -> None:
    """An `__init__.py` would make `kernels` a top-level package that hides the library of that name."""
    for name in LINKED:
        link = ROOT / "longrun" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert not list((ROOT / name).rglob("__init__.py"))


def table() -> str:
    """The table of rooms as docs/architecture.md prints it."""
    lines = ["| room | modules | may import | packages |", "|---|---|---|---|"]
    for room in ROOMS:
        modules = ", ".join(f"`{name.removeprefix('longrun.')}`" for name in room.modules)
        allowed = ", ".join(room.rooms) or "-"
        packages = ", ".join(room.packages) or "-"
        lines.append(f"| {room.name}{' (light)' if room.light else ''} | {modules} | {allowed} | {packages} |")
    return "\n".join(lines)


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert table() in text, f"put this table into docs/architecture.md:\n{table()}"


if __name__ == "__main__":
    print(table())
