"""Which files below a folder are left out: hidden ones, and what .gitignore files say, as git understands them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from pathspec import GitIgnoreSpec

from longrun.errors import InputError, short_path


class IgnoreRules:
    """The rules for the files below a folder.

    A file's fate is that of the deepest .gitignore with a pattern for it, in the folder, below it, and above it up to
    the root of the git repository it stands in; the repository's `.git/info/exclude` counts as well. Where the folder
    itself is ignored from above, it was named in spite of that, and only its own rules hold.

    Args:
        folder: absolute, without links.
        lines: the lines of a file with patterns, where the folder is none of the disk's; nothing above it counts then.
    """

    def __init__(self, folder: Path, lines: Callable[[Path], list[str]] | None = None) -> None:
        self._folder = self._top = folder
        self._spec = lru_cache(maxsize=None)(lambda level: _spec_of(level, lines or _lines_of))
        if lines is not None:
            return
        self._top = next((above for above in (folder, *folder.parents) if (above / ".git").exists()), folder)
        if folder != self._top and any(self._says(path, True) for path in (folder, *folder.parents)):
            self._top = folder

    def leave_out(self, path: Path, is_folder: bool) -> bool:
        """Whether an entry below the folder is hidden or ignored; those of a folder that is, are as well."""
        return path.name.startswith(".") or bool(self._says(path, is_folder))

    def leave_out_any(self, path: Path) -> bool:
        """Whether a file, or a folder between it and the folder, is left out."""
        between = [above for above in path.parents if self._folder in above.parents]
        return self.leave_out(path, False) or any(self.leave_out(above, True) for above in between)

    def _says(self, path: Path, is_folder: bool) -> bool | None:
        if self._top not in path.parents:
            return None
        for level in path.parents:
            spec = self._spec(level)
            if spec is not None:
                name = path.relative_to(level).as_posix() + ("/" if is_folder else "")
                found = spec.check_file(name).include
                if found is not None:
                    return found
            if level == self._top:
                break
        return None


def _lines_of(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"{short_path(file)} cannot be read ({error.strerror}): check its permissions") from None


def _spec_of(folder: Path, lines_of: Callable[[Path], list[str]]) -> GitIgnoreSpec | None:
    lines = [*lines_of(folder / ".git" / "info" / "exclude"), *lines_of(folder / ".gitignore")]
    try:
        return GitIgnoreSpec.from_lines(lines) if lines else None
    except ValueError:  # git passes over a line that is no pattern
        return GitIgnoreSpec.from_lines([line for line in lines if _is_pattern(line)])


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
