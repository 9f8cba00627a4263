"""Every import of the sources, as it stands there, and what is wrong with it by the table of rooms.

Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rooms import HEAVY, room_of

ROOT = Path(__file__).parent.parent
LINKED = ("quant", "kernels", "patterns")


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


def circles(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other, by way of others or for a type checker alone too, one sentence a circle."""
    targets = {
        module: {found.target for found in find_imports(module, sources) if found.target in sources} - {module}
        for module in sources
    }

    def reached(start: str) -> set[str]:
        todo, seen = [start], set()
        while todo:
            for target in targets[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    around = {module: reached(module) for module in sources}
    found = {frozenset(other for other in around[one] if one in around[other]) for one in sources if one in around[one]}
    return sorted(" and ".join(sorted(circle)) + " import each other" for circle in found)
