"""Notices that files which the session has read are others now."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


class ChangedFiles:
    """Compares files with what was read of them. A file is hashed only where its time or size is another than at the
    last look, and each change is told once."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[int, int], str]] = {}
        self._told: set[tuple[str, str]] = set()

    def look(self, known: Mapping[str, str]) -> list[str]:
        """Names of files that changed and were not told of yet; files that are gone or cannot be read are passed over.

        Args:
            known: name of each document that was read, and the SHA-256 of its file.
        """
        found = []
        for name, sha256 in known.items():
            now = self._digest(name)
            if now is not None and now != sha256 and (name, now) not in self._told:
                self._told.add((name, now))
                found.append(name)
        return found

    def _digest(self, name: str) -> str | None:
        path = Path(name)
        try:
            if not path.is_file():
                return None
            facts = path.stat()
            key = facts.st_mtime_ns, facts.st_size
            if name not in self._seen or self._seen[name][0] != key:
                with path.open("rb") as file:
                    self._seen[name] = key, hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            return None
        return self._seen[name][1]
