"""Which documents a session holds, and what of a file that has changed since is read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from longrun.documents.document import PIPED, Document


@dataclass
class ToRead:
    """What of the documents given is to be read.

    Attributes:
        new: texts as the model is to see them; of a changed file only what differs, below a line that says so.
        kept_lines: for each of them, how many lines of the version before still stand.
        already: names of those that the session holds.
        changed: a sentence about each file that changed.
    """

    new: list[Document] = field(default_factory=list)
    kept_lines: list[int] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class ReadDocuments:
    """The documents that a session has read to their end.

    Args:
        entries: what the session keeps of each, in the order of reading: its name, the SHA-256 of its file, the tokens
            from `start` to `stop` (older sessions do not know where it starts), and `line`, how many lines of the
            version before still stood.
        text_of: the text of the session's tokens from one to another.
        leads: what may stand between `start` and the text, tokenized together with it.
    """

    def __init__(
        self, entries: Sequence[dict[str, Any]], text_of: Callable[[int, int], str], leads: Sequence[str]
    ) -> None:
        self._entries, self._text_of = entries, text_of
        self._leads = sorted(leads, key=len, reverse=True)

    def sort(self, documents: Sequence[Document]) -> ToRead:
        """Decide what of `documents` is to be read, each text once.

        A file is known by its bytes, whatever its name is. One with other bytes than the session's latest of that name
        has changed: it is read again from the first line that differs, or from its beginning where the session's text
        cannot be told apart.
        """
        known = {entry["sha256"] for entry in self._entries}
        latest = {entry["name"]: entry["sha256"] for entry in self._entries}
        current = set(latest.values())
        found = ToRead()
        for document in documents:
            changed = document.name != PIPED and document.name in latest
            if document.sha256 in current or (document.sha256 in known and not changed):
                found.already.append(document.name)
            elif changed:
                self._add_change(document, found)
            else:
                found.new.append(document)
                found.kept_lines.append(0)
            current.add(document.sha256)
        return found

    def _add_change(self, document: Document, found: ToRead) -> None:
        before, now = self._lines(document.name), document.text.split("\n")
        if before == now:  # but for white space at its end, or its encoding
            found.already.append(document.name)
            return
        same = next((at for at, (old, new) in enumerate(zip(before, now, strict=False)) if old != new), None)
        same = min(len(before), len(now)) if same is None else same
        if same == len(now):
            what, rest, told = f"it ends behind line {same:,} now", [], f"it ends behind line {same:,} now"
        else:
            rest = now[same:]
            what = f"from line {same + 1:,} on it reads now" if same else "it reads now"
            told = f"read again from line {same + 1:,} of {len(now):,} on" if same else "read again"
        header = Document(f"{document.name}, changed: {what}", "", "", True).header
        found.new.append(replace(document, text=(header + "\n".join(rest)).rstrip("\n"), headed=False))
        found.kept_lines.append(same)
        found.changed.append(f"{document.name} has changed since it was read: {told}")

    def _lines(self, name: str) -> list[str]:
        """Lines of the latest version of a document as the session holds it; none where that is not known."""
        lines: list[str] = []
        for number, entry in enumerate(entry for entry in self._entries if entry["name"] == name):
            if "start" not in entry:
                return []
            text = self._text_of(entry["start"], entry["stop"])
            part = text.removeprefix(next(filter(text.startswith, self._leads), "")).split("\n")
            if number or part[0] + "\n" == Document(name, "", "", True).header:
                del part[0]
            lines = lines[: entry["line"]] + part
        return lines
