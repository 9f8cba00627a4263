"""Real code to be read and asked about: the modules of the running Python's standard library, and facts in them.

Nothing is shipped: the text comes from the machine's own Python, so it is the same wherever that has the same version.
`source_facts` goes into results and says which text it was.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

CONSTANT, DEFAULT, SIGNATURE, WHICH_FILE = "constant", "default", "signature", "which file"

_LEFT_OUT = {
    "__pycache__", "config", "dist-packages", "encodings", "ensurepip", "idlelib", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
_CHARS = (1_500, 150_000)  # of a module: shorter ones hold nothing to ask about, longer ones are tables
_NAME_CHARS = 6  # of what is asked for by name alone
_STRING_CHARS = (3, 30)
_LEAST = 10  # of a number: smaller ones are guessed


@dataclass(frozen=True)
class SourceFile:
    """A module: its path below the library's folder, with slashes, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Fact:
    """Something that one file says.

    Attributes:
        task: one of the four names above.
        subject: constant, function (`Class.method`) or class it is about; parameter: of a default.
        answer: as the file writes it; of a signature the parameters' names but `self`, separated by commas.
        line: where it stands, counted from 1.
    """

    task: str
    subject: str
    answer: str
    line: int
    parameter: str = ""


@lru_cache(maxsize=1)
def standard_library() -> tuple[SourceFile, ...]:
    """Modules of a size to be read, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if any(part in _LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few modules are written in other encodings
        if _CHARS[0] <= len(text) <= _CHARS[1]:
            found.append(SourceFile("/".join(parts), text))
    return tuple(sorted(found, key=lambda file: file.name))


def source_facts() -> dict[str, Any]:
    """Which text the code tasks read, JSON-able: Python's version, how many modules, and SHA-256 over all of them."""
    digest = hashlib.sha256()
    files = standard_library()
    for file in files:
        digest.update(f"{file.name}\0{file.text}\0".encode())
    return {"python": platform.python_version(), "modules": len(files), "sha256": digest.hexdigest()}


@lru_cache(maxsize=1024)
def facts_of(file: SourceFile) -> tuple[Fact, ...]:
    """What a file can be asked for: answers that are short, stand in it literally and are hard to guess. Empty where
    the file cannot be parsed."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return ()
    lines = file.text.splitlines()
    found = [*_constants(tree, lines), *_functions(tree, lines)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and len(node.name.strip("_")) >= _NAME_CHARS:
            stem = file.name.removesuffix(".py").rpartition("/")[2].strip("_").lower()
            name = node.name.strip("_").lower()
            if stem not in name and name not in stem and not node.name.startswith("__"):
                found.append(Fact(WHICH_FILE, node.name, file.name, node.lineno))
    once: dict[tuple[str, str, str], list[Fact]] = {}
    for fact in found:
        once.setdefault((fact.task, fact.subject, fact.parameter), []).append(fact)
    return tuple(same[0] for same in once.values() if len(same) == 1)


def _constants(tree: ast.Module, lines: list[str]) -> Iterator[Fact]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, answer = node.targets[0].id, _literal(node.value, lines)
            if name.isupper() and answer is not None and answer.strip("'\"").lower() not in name.lower():
                yield Fact(CONSTANT, name, answer, node.lineno)


def _functions(tree: ast.Module, lines: list[str]) -> Iterator[Fact]:
    """Of functions and methods that are defined once in the file, defaults and parameters."""
    defined = [("", node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            defined += [(f"{owner.name}.", node) for node in owner.body if isinstance(node, ast.FunctionDef)]
    names = [before + node.name for before, node in defined]
    for name, (_, node) in zip(names, defined, strict=True):
        if names.count(name) > 1:
            continue
        given = node.args
        asked = [one.arg for one in given.args if one.arg not in ("self", "cls")]
        plain = not (given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs)
        if plain and 2 <= len(asked) <= 6:
            yield Fact(SIGNATURE, name, ", ".join(asked), node.lineno)
        named = [*given.posonlyargs, *given.args]
        for one, value in zip(named[len(named) - len(given.defaults) :], given.defaults, strict=True):
            answer = _literal(value, lines)
            if answer is not None:
                yield Fact(DEFAULT, name, answer, node.lineno, one.arg)


def _literal(node: ast.expr, lines: list[str]) -> str | None:
    """A number or a string as the file writes it, where it is neither trivial nor long; else None."""
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool) or node.lineno != node.end_lineno:
        return None
    value, line = node.value, lines[node.lineno - 1].encode()
    written = line[node.col_offset : node.end_col_offset].decode()
    if isinstance(value, str):
        plain = written[:1] in "'\"" and written[1:-1] == value  # no prefix, no escapes
        sized = _STRING_CHARS[0] <= len(value) <= _STRING_CHARS[1]
        return written if plain and sized and value.isprintable() and value.strip(" `'\"*.") == value else None
    return written if isinstance(value, int | float) and abs(value) >= _LEAST and len(written) <= 12 else None
