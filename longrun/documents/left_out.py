"""What was left out of a folder, a pattern or an archive, as a sentence."""

from __future__ import annotations

from collections import Counter

from longrun.errors import short_path


class LeftOut:
    """Counts of files by kind, and the first one of each.

    Args:
        named: what they were left out of, as a person named it.
    """

    def __init__(self, named: str) -> None:
        self._named = named
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """One more; `kind` in a word or two that stand before "files"."""
        self._counts[kind] += 1
        self._first.setdefault(kind, name)

    def notice(self) -> str | None:
        """The sentence; None where nothing was left out."""
        if not self._counts:
            return None
        kinds = []
        for kind, count in sorted(self._counts.items()):
            first = short_path(self._first[kind])
            kinds.append(f"1 {kind} file ({first})" if count == 1 else f"{count:,} {kind} files ({first}, ...)")
        return f"left out of {short_path(self._named)}: {', '.join(kinds)}"
