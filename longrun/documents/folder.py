"""The files that a folder or a pattern stands for, without those that are left out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from longrun.documents.ignore import IgnoreRules
from longrun.errors import InputError, short_path

MAX_ENTRIES = 100_000
"""Of one folder or pattern, counted before any is left out, but for those in ignored folders: `/` by mistake, say."""

CODE = (
    ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".go", ".rs", ".java", ".kt", ".scala",
    ".cs", ".swift", ".m", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj",
    ".dart", ".zig", ".ts", ".tsx", ".jsx", ".vue", ".svelte", ".sh", ".sql",
)  # fmt: skip
"""Ends of the names of program sources. Not `.js` and `.css`: pages that a browser has saved bring such files along."""
CODE_NAMES = ("package.json", "makefile", "cmakelists.txt", "dockerfile")

_WILDCARD = re.compile(r"[*?\[]")


def is_pattern(path: str) -> bool:
    """Whether the path holds a character that stands for others (`*`, `?`, `[`)."""
    return _WILDCARD.search(path) is not None


def holds_code(names: Iterable[str]) -> bool:
    """Whether one of these files is a program's source, by its name: HTML beside it is source, too."""
    return any(name.lower().endswith(CODE) or name.lower().rpartition("/")[2] in CODE_NAMES for name in names)


def pattern_base(pattern: str) -> Path:
    """The folder before the first part of the pattern that holds such a character."""
    found = _WILDCARD.search(pattern)
    assert found is not None, pattern
    return Path(os.path.dirname(pattern[: found.start()]) or ".")


def files_below(folder: Path) -> list[str]:
    """Paths from `folder` of the entries at any depth that are no folders, sorted; links to folders among them.

    Raises:
        InputError: a folder that cannot be read, or more than `MAX_ENTRIES`.
    """
    root = folder.resolve()
    rules, found, pending, count = IgnoreRules(root), [], [root], 0
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    count = counted(count, folder)
                    path, inner = Path(entry.path), entry.is_dir(follow_symlinks=False)
                    if rules.leave_out(path, inner):
                        continue
                    if inner:
                        pending.append(path)
                    else:
                        found.append(path.relative_to(root).as_posix())
        except OSError as error:
            raise InputError(
                f"folder {short_path(here)} cannot be read ({error.strerror}): check its permissions"
            ) from None
    return sorted(found)


def files_matching(pattern: str) -> list[str]:
    """Paths from the pattern's base of the entries that it matches and that are no folders, sorted.

    Raises:
        InputError: more than `MAX_ENTRIES` matches.
    """
    base = pattern_base(pattern)
    root = base.resolve()
    rules, found, count = IgnoreRules(root), set(), 0
    for match in glob.iglob(pattern, recursive=True):
        count = counted(count, pattern)
        if os.path.isdir(match) and not os.path.islink(match):
            continue
        name = os.path.relpath(match, base)
        if not rules.leave_out_any(root / name):
            found.add(Path(name).as_posix())
    return sorted(found)


def counted(count: int, named: object) -> int:
    """One entry more than `count`.

    Raises:
        InputError: more than `MAX_ENTRIES`.
    """
    if count == MAX_ENTRIES:
        raise InputError(
            f"{short_path(named)} stands for more than {MAX_ENTRIES:,} files and folders: name a smaller folder, or a "
            f"pattern that fewer match"
        )
    return count + 1
