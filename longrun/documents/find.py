"""From what a person names (files, folders, patterns, stdin) to documents, always in the same order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longrun.documents.decoding import NoTextError
from longrun.documents.document import MAX_BYTES, PIPED, Document, document_of, read_document, too_large
from longrun.documents.folder import files_below, files_matching, holds_code, is_pattern, pattern_base
from longrun.documents.left_out import LeftOut
from longrun.errors import InputError, short_path
from longrun.paths import user_path

STDIN = "-"


@dataclass(frozen=True)
class Documents:
    """What was found and read.

    Attributes:
        texts: the documents; headed where they are several, or come from a folder, a pattern or an archive.
        notices: sentences that a person should be shown: what was left out of a folder, a pattern or a file.
    """

    texts: tuple[Document, ...] = ()
    notices: tuple[str, ...] = ()


def read_documents(paths: Sequence[str | Path], stdin: Callable[[], bytes] | None = None) -> Documents:
    """Read all that is named, in the order in which it is named; within a folder or a pattern sorted by path.

    A folder stands for its files at any depth, but for hidden ones, those that .gitignore names, links that lead out
    of the folder or to another, and files without text. A pattern (`*`, `?`, `[`, and `**` for any depth) does the same
    for the files that it matches. What is named itself is read whatever .gitignore says. HTML among files of code
    (`longrun.documents.folder.holds_code`) keeps its markup.

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
    left_out = filter(None, (source.left_out.notice() for source in sources))
    return Documents(tuple(texts), (*left_out, *(notice for text in texts for notice in text.notices)))


def files_named(paths: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """The files that `read_documents` would read, each with its document's name, in the same order; those without text
    among them.

    Raises:
        InputError: as there.
    """
    return [file for path in paths for file in _Source.of(path).files]


@dataclass
class _Source:
    """One thing that was named.

    Attributes:
        files: the files that it stands for, each with its document's name; none for stdin.
        several: it is a folder or a pattern.
        left_out: files that were, but for hidden and ignored ones.
    """

    named: str
    files: list[tuple[Path, str]]
    several: bool
    left_out: LeftOut

    @classmethod
    def of(cls, path: str | Path) -> _Source:
        named = str(path)
        if named == STDIN:
            return cls(named, [], False, LeftOut(named))
        file = user_path(path, "file")
        if file.is_dir():
            base, found = file, files_below(file)
        elif is_pattern(named) and not os.path.lexists(file):
            base, found = pattern_base(str(file)), files_matching(str(file))
        else:
            return cls(named, [(file, named)], False, LeftOut(named))
        source = cls(named, [], True, LeftOut(named))
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
        count, code = 0, holds_code(name for _, name in self.files)
        for file, name in self.files:
            try:
                yield read_document(file, name, headed, code)
                count += 1
            except NoTextError as error:
                self.left_out.add(error.kind, name)
        if not count:
            raise no_text_in(self.named, self.left_out)

    def _add(self, root: Path, name: str) -> None:
        """Take the entry `name` of the folder `root`, which is absolute and without links."""
        file, here = root / name, Path.cwd().resolve()
        shown = str(file.relative_to(here) if file.is_relative_to(here) else Path(root.name, name))
        target = file.resolve()
        if file.is_symlink() and not (target.is_relative_to(root) and target.is_file()):
            self.left_out.add("linked", shown)
        elif not file.is_file():
            self.left_out.add("special", shown)
        else:
            self.files.append((file, shown))


def no_text_in(named: str, left_out: LeftOut) -> InputError:
    """What to raise for a folder, a pattern or an archive without any text file."""
    return InputError(
        f"{short_path(named)} stands for no text file ({left_out.notice() or 'nothing was left out'}): name another; "
        f"hidden files, and those that .gitignore names, are never read from a folder, a pattern or an archive"
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (OSError, ValueError):  # said when it is read
        return 0
