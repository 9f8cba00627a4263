"""From what a person names (files, folders, patterns, stdin) to documents, always in the same order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longrun.documents.decoding import NoTextError
from longrun.documents.document import MAX_BYTES, PIPED, Document, document_of, read_document, too_large
from longrun.documents.folder import files_below, files_matching, is_pattern, pattern_base
from longrun.errors import InputError, short_path
from longrun.paths import user_path

STDIN = "-"


@dataclass(frozen=True)
class Documents:
    """What was found and read.

    Attributes:
        texts: the documents; headed where they are several, or come from a folder or a pattern.
        notices: sentences that a person should be shown: what was left out of a folder, a pattern or a file.
    """

    texts: tuple[Document, ...] = ()
    notices: tuple[str, ...] = ()


def read_documents(paths: Sequence[str | Path], stdin: Callable[[], bytes] | None = None) -> Documents:
    """Read all that is named, in the order in which it is named; within a folder or a pattern sorted by path.

    A folder stands for its files at any depth, but for hidden ones, those that .gitignore names, links that lead out
    of the folder or to another, and files without text. A pattern (`*`, `?`, `[`, and `**` for any depth) does the same
    for the files that it matches. What is named itself is read whatever .gitignore says.

    Args:
        stdin: gives the bytes that `-` stands for; None where stdin holds something else.

    Raises:
        InputError: nothing there, a file that is named itself and has no text, a folder without any, more than
            `MAX_BYTES` in all, or more than `longrun.documents.folder.MAX_ENTRIES` in a folder.
    """
    if sum(str(path) == STDIN for path in paths) > 1:
        raise InputError(f"{STDIN} is named twice: stdin can be read once")
    sources = [_Source.of(path) for path in paths]
    sizes = [_size(file) for source in sources for file, _ in source.files]
    if sum(sizes) > MAX_BYTES:
        raise too_large("what is named", sum(sizes))
    headed = len(sources) > 1 or any(source.several for source in sources)
    texts = [text for source in sources for text in source.read(headed, stdin)]
    left_out = filter(None, (source.notice() for source in sources))
    return Documents(tuple(texts), (*left_out, *(notice for text in texts for notice in text.notices)))


@dataclass
class _Source:
    """One thing that was named.

    Attributes:
        files: the files that it stands for, each with its document's name; none for stdin.
        several: it is a folder or a pattern.
        left_out: how many files were, by kind; `first`: the first one of each kind.
    """

    named: str
    files: list[tuple[Path, str]]
    several: bool
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path) -> _Source:
        named = str(path)
        if named == STDIN:
            return cls(named, [], False)
        file = user_path(path, "file")
        if file.is_dir():
            base, found = file, files_below(file)
        elif is_pattern(named) and not os.path.lexists(file):
            base, found = pattern_base(str(file)), files_matching(str(file))
        else:
            return cls(named, [(file, named)], False)
        source = cls(named, [], True)
        for name in found:
            source._add(base.resolve(), name)
        return source

    def read(self, headed: bool, stdin: Callable[[], bytes] | None) -> Iterator[Document]:
        """The texts of its files.

        Raises:
            InputError: see `read_documents`.
        """
        if self.named == STDIN:
            if stdin is None:
                raise InputError(f"{STDIN} stands for stdin, which does not hold a text here: name a file")
            yield document_of(stdin(), PIPED, headed)
        if not self.several:
            yield from (read_document(file, name, headed) for file, name in self.files)
            return
        count = 0
        for file, name in self.files:
            try:
                yield read_document(file, name, headed)
                count += 1
            except NoTextError as error:
                self._leave_out(error.kind, name)
        if not count:
            raise InputError(
                f"{short_path(self.named)} stands for no text file ({self.notice() or 'nothing was left out'}): name "
                f"another; hidden files, and those that .gitignore names, are never read from a folder or a pattern"
            )

    def notice(self) -> str | None:
        """What was left out of it, but for hidden and ignored files."""
        if not self.left_out:
            return None
        kinds = []
        for kind, count in sorted(self.left_out.items()):
            first = short_path(self.first[kind])
            kinds.append(f"1 {kind} file ({first})" if count == 1 else f"{count:,} {kind} files ({first}, ...)")
        return f"left out of {short_path(self.named)}: {', '.join(kinds)}"

    def _add(self, root: Path, name: str) -> None:
        """Take the entry `name` of the folder `root`, which is absolute and without links."""
        file, here = root / name, Path.cwd().resolve()
        shown = str(file.relative_to(here) if file.is_relative_to(here) else Path(root.name, name))
        target = file.resolve()
        if file.is_symlink() and not (target.is_relative_to(root) and target.is_file()):
            self._leave_out("linked", shown)
        elif not file.is_file():
            self._leave_out("special", shown)
        else:
            self.files.append((file, shown))

    def _leave_out(self, kind: str, name: str) -> None:
        self.left_out[kind] += 1
        self.first.setdefault(kind, name)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (OSError, ValueError):  # said when it is read
        return 0
