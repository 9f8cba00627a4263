"""Documents in a folder: each has a folder of its name with its text, a record and its session."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from longrun.errors import InputError, LongrunError, quoted, short_path
from longrun.files.folder_lock import FolderLock
from longrun.files.user_files import read_object
from longrun.files.whole_file import fresh_path, sync_folder, write_whole
from longrun.paths import user_path
from longrun.server.openai_errors import RequestError
from longrun.specs.prefill_spec import EXACT, PREFILL_MODES

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_LEFT = re.compile(r"\..+\.[0-9a-f]{12}\.(made|gone)")
_TEXT = re.compile(r"text-[0-9a-f]{64}\.txt")
_UNFINISHED = re.compile(r"\.(text-[0-9a-f]{64}\.txt|document\.json)\.[0-9a-f]{12}\.new")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RECORD, _SESSION, _LOCK = "document.json", "session", ".documents.lock"


def checked_name(name: str) -> str:
    """The name of a document, which is a folder's.

    Raises:
        RequestError: it can be none.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{quoted(name)} is no name for a document: use 1 to 100 of the letters a to z and A to Z, digits, '.', "
            f"'_' and '-', not beginning with '.'",
            "invalid_name",
        )
    return name


@dataclass(frozen=True)
class Record:
    """What is kept of a document beside its text.

    Attributes:
        sha256: of its text, hex.
        bytes: of the body that it came in.
        tokens: of its session, once all is read.
        created: seconds since 1970; the time that its prompts write, so that its session stays their beginning.
        notices: sentences about what of the body is not in its text.
        ready: all of it was read.
        prefill: how it is read, one of `PREFILL_MODES`: "exact" means that nothing of it was read sparsely.
        sparse_counts: of what was read sparsely, after a restart in mid-reading of what was read since: pages read, of
            the past, the attention that dense rows caught, such rows; empty where nothing was.
    """

    sha256: str
    bytes: int
    tokens: int
    created: int
    notices: list[str] = field(default_factory=list)
    ready: bool = False
    prefill: str = EXACT
    sparse_counts: list[float] = field(default_factory=list)


class DocumentFiles:
    """The folder, owned from the moment this is made. Its methods may raise OSError but where they say otherwise.

    Raises:
        InputError: it cannot be written, or another server owns it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = user_path(folder, "documents folder").absolute()
        self._lock = FolderLock(
            self._folder / _LOCK, f"documents folder {self._folder}", InputError, "end that server",
            "name another folder with --documents",
        )  # fmt: skip
        for entry in self._folder.iterdir():
            if _LEFT.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        """Others may own the folder."""
        self._lock.release()

    def session(self, name: str) -> Path:
        """The folder of the document's session, there or not."""
        return self._folder / name / _SESSION

    def disk(self) -> tuple[int, int]:
        """Bytes of all files in the folder, and bytes free on its disk; files may come and go meanwhile."""
        used = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with suppress(FileNotFoundError):
                    used += os.lstat(os.path.join(folder, name)).st_size
        return used, shutil.disk_usage(self._folder).free

    def found(self) -> dict[str, Record]:
        """Every document that is there, tidied; what is no document is passed over.

        Raises:
            InputError: a record that cannot be used.
        """
        names = sorted(entry.name for entry in self._folder.iterdir() if entry.is_dir() and not entry.is_symlink())
        found = {
            name: self._record(name)
            for name in names
            if _NAME.fullmatch(name) and (self._folder / name / _RECORD).is_file()
        }
        for name, record in found.items():
            self._tidy(name, record)
        return found

    def text(self, name: str, record: Record) -> str:
        """The document's text.

        Raises:
            LongrunError: it is not the one of the record.
        """
        raw = (self._folder / name / _text_name(record.sha256)).read_bytes()
        if hashlib.sha256(raw).hexdigest() != record.sha256:
            raise LongrunError(f"the text of document {name} is damaged: put it again")
        return raw.decode()

    def create(self, name: str, record: Record, text: str) -> None:
        """A document that was not there."""
        made = fresh_path(self._folder / name, "made")
        try:
            made.mkdir()
            write_whole(made / _text_name(record.sha256), text.encode())
            write_whole(made / _RECORD, json.dumps(asdict(record)).encode())
            os.replace(made, self._folder / name)
            sync_folder(self._folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

    def replace(self, name: str, record: Record, text: str, keeps_session: bool) -> None:
        """Other content for a document; without its session unless that is of a beginning of the new text."""
        if not keeps_session:
            self._remove(self.session(name))
        write_whole(self._folder / name / _text_name(record.sha256), text.encode())
        self.write_record(name, record)
        self._tidy(name, record)

    def write_record(self, name: str, record: Record) -> None:
        """Another record for a document that is there."""
        write_whole(self._folder / name / _RECORD, json.dumps(asdict(record)).encode())

    def remove(self, name: str) -> None:
        """The document with all that belongs to it."""
        self._remove(self._folder / name)

    def _remove(self, folder: Path) -> None:
        if not folder.exists():
            return
        gone = fresh_path(self._folder / folder.name, "gone")
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _tidy(self, name: str, record: Record) -> None:
        """Remove other texts, and what killed writers have left."""
        for entry in (self._folder / name).iterdir():
            other = _TEXT.fullmatch(entry.name) and entry.name != _text_name(record.sha256)
            if other or _UNFINISHED.fullmatch(entry.name):
                entry.unlink()

    def _record(self, name: str) -> Record:
        path, advice = self._folder / name / _RECORD, "remove the folder it stands in, and put the document again"
        data = read_object(path, InputError, advice)
        kinds = {"sha256": str, "bytes": int, "tokens": int, "created": int, "notices": list, "ready": bool}
        kinds |= {"prefill": str, "sparse_counts": list}
        data = {"prefill": EXACT, "sparse_counts": []} | data  # which older records lack
        sound = data.keys() == kinds.keys() and all(type(data[key]) is kind for key, kind in kinds.items())
        sound = sound and all(type(notice) is str for notice in data["notices"])
        sound = sound and data["prefill"] in PREFILL_MODES and _are_counts(data["sparse_counts"])
        if not sound or not _DIGEST.fullmatch(data["sha256"]) or min(data["bytes"], data["tokens"]) < 0:
            raise InputError(f"{short_path(path)} is no record of a document: {advice}")
        return Record(**data)


def _are_counts(values: list[object]) -> bool:
    numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in values)
    return len(values) in (0, 4) and numbers


def _text_name(sha256: str) -> str:
    return f"text-{sha256}.txt"


@contextmanager
def storing(name: str) -> Iterator[None]:
    """Within it an OSError is one that a client can read.

    Raises:
        RequestError: the files of document `name` could not be written or read.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"document {name} cannot be stored ({error.strerror or error}): make room in the folder of documents",
            "storage_failed", status=507,
        ) from error  # fmt: skip
