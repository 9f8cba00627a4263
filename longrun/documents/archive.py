"""Archives (zip, tar, tar.gz) as the documents in them, read in memory as a folder is: nothing is written, so that no
name in an archive can lead anywhere.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from longrun.documents.decoding import NoTextError
from longrun.documents.document import Document, document_of
from longrun.documents.find import Documents, no_text_in
from longrun.documents.folder import MAX_ENTRIES, counted, holds_code
from longrun.documents.ignore import IgnoreRules
from longrun.documents.left_out import LeftOut
from longrun.errors import InputError, short_path, shortened
from longrun.units import format_bytes

_BLOCK = 512  # of a tar file
_ZIP_ENTRY = b"PK\x01\x02"
_ZIP_KINDS = {0: None, 0o10: None, 0o12: "linked"}  # by the file type of Unix; 0 where another system packed it
_FOLDER = 0o4
_ROOT = Path("/")
_DAMAGED = (EOFError, OSError, ValueError, NotImplementedError, RuntimeError, KeyError, zlib.error, zipfile.BadZipFile,
            tarfile.TarError)  # fmt: skip


class ArchiveTooLargeError(InputError):
    """An archive holds more than may be read."""


def read_archive(raw: bytes, named: str, most_bytes: int) -> Documents:
    """The documents in an archive, as `longrun.documents.find.read_documents` reads those of a folder: sorted by path,
    each with its path in the archive as its name, without hidden files, those that a .gitignore in the archive names,
    and files without text. Links, devices and names that lead out of the archive are left out.

    Args:
        named: what messages call the archive.
        most_bytes: of what is packed in it, and of its texts: the memory that reading takes is a few times as much.

    Raises:
        ArchiveTooLargeError: more than `most_bytes`, whatever the archive says of itself.
        InputError: neither zip nor tar nor tar.gz, damaged, encrypted, packed by another method than deflate, more
            than `longrun.documents.folder.MAX_ENTRIES` entries, or no text file among them.
    """
    left_out = LeftOut(named)
    with _sound(named):
        members = _of_zip(raw, named, most_bytes) if raw.startswith(b"PK") else _of_tar(raw, named, most_bytes)
        files = _files(members, left_out)

    def content(name: str) -> bytes:
        with _sound(named):
            return files[name]()

    def lines(path: Path) -> list[str]:
        name = path.relative_to(_ROOT).as_posix()
        return content(name).decode("utf-8", "surrogateescape").splitlines() if name in files else []

    rules = IgnoreRules(_ROOT, lines)
    names = [name for name in sorted(files) if not rules.leave_out_any(_ROOT / name)]
    code, texts, size = holds_code(names), list[Document](), 0
    for name in names:
        try:
            texts.append(document_of(content(name), name, headed=True, markup=code))
        except NoTextError as error:
            left_out.add(error.kind, name)
            continue
        size += len(texts[-1].text)
        _check_size(size, named, most_bytes)
    if not texts:
        raise no_text_in(named, left_out)
    notices = (left_out.notice(), *(notice for text in texts for notice in text.notices))
    return Documents(tuple(texts), tuple(filter(None, notices)))


_Member = tuple[str, str | None, Callable[[], bytes]]  # name; why it is left out, None for a file; its content


def _files(members: Iterator[_Member], left_out: LeftOut) -> dict[str, Callable[[], bytes]]:
    """Of two of one name the later one, as where an archive is unpacked."""
    files = {}
    for name, kind, read in members:
        path = PurePosixPath(name)
        if not path.parts:
            raise ValueError("a file has no name")
        if path.is_absolute() or ".." in path.parts:
            kind = "outside"
        if kind is not None:
            left_out.add(kind, name)
        else:
            files[str(path)] = read
    return files


def _of_zip(raw: bytes, named: str, most_bytes: int) -> Iterator[_Member]:
    """What is no folder. An entry gives no more bytes than its size in the directory, by which it is counted."""
    if raw.count(_ZIP_ENTRY) > MAX_ENTRIES:
        counted(MAX_ENTRIES, named)  # refuses
    archive, total = zipfile.ZipFile(io.BytesIO(raw)), 0

    def content(entry: zipfile.ZipInfo) -> bytes:
        with archive.open(entry) as stream:
            return stream.read(entry.file_size or 1)  # without a number up to 2 GiB are unpacked at once

    for entry in archive.infolist():
        total += entry.file_size
        _check_size(total, named, most_bytes)
        if entry.flag_bits & 1:
            raise InputError(f"archive {short_path(named)} is encrypted: pack it without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = zipfile.compressor_names.get(entry.compress_type, str(entry.compress_type))
            raise InputError(f"archive {short_path(named)} is packed by {method}: pack it by deflate, or as tar.gz")
        mode = entry.external_attr >> 28
        if not entry.filename.endswith("/") and mode != _FOLDER:
            archive.open(entry).close()  # raises where its name is not the one that stands before its content
            yield entry.filename, _ZIP_KINDS.get(mode, "special"), lambda entry=entry: content(entry)


def _of_tar(raw: bytes, named: str, most_bytes: int) -> Iterator[_Member]:
    """What is no folder. Files with holes are left out: a few bytes may ask for any size."""
    if raw.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            raw = stream.read(most_bytes + 1)
    _check_size(len(raw), named, most_bytes)
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
        for count, entry in enumerate(archive):
            counted(count, named)
            first, stop = entry.offset_data, entry.offset_data + entry.size
            kind = "linked" if entry.issym() or entry.islnk() else "sparse" if entry.issparse() else None
            if kind is None and not entry.isreg():
                kind = "special"
            if kind is None and not first <= stop <= len(raw):
                raise tarfile.ReadError("it ends too soon")
            if not entry.isdir():
                yield entry.name, kind, lambda first=first, stop=stop: raw[first:stop]
        if raw[archive.offset : archive.offset + _BLOCK].strip(b"\0"):
            raise tarfile.ReadError(f"what stands at byte {archive.offset:,} is no header of a file")


def _check_size(size: int, named: str, most_bytes: int) -> None:
    if size > most_bytes:
        raise ArchiveTooLargeError(
            f"unpacked, archive {short_path(named)} holds more than the {format_bytes(most_bytes)} that one may: leave "
            f"out what is no text (.git, builds, pictures)"
        )


@contextmanager
def _sound(named: str) -> Iterator[None]:
    """Within it what a damaged archive makes Python's readers raise is a sentence."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(
            f"archive {short_path(named)} cannot be read ({shortened(error or type(error).__name__, 160)}): send a "
            f"zip, tar or tar.gz file, packed again if this one is damaged"
        ) from None
