"""Sessions on disk: a folder with page files, one state file, and a manifest that names them with checksums.

Page files are only ever added; a save writes the pages that are new, a new state file and then the manifest. Files that
no manifest names are what an interrupted save left behind: the folder's next owner removes them.

A folder has one owner at a time, the session that is attached to it or was saved to it last, for as long as that lives.
Reading needs no ownership.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.errors import SessionError, shortened
from longrun.files.folder_lock import FolderLock
from longrun.files.whole_file import write_whole
from longrun.paths import user_path
from longrun.session.manifest import MANIFEST, Manifest, SessionIdentity, StoredFile, check_extra, shown
from longrun.session.page_files import read_state, restore_pages, write_pages, write_state

if TYPE_CHECKING:
    from longrun.session.savable import Savable
from longrun.specs.cache_spec import CacheSpec
from longrun.units import MAX_TOKENS

_LOCK = "session.lock"
_DATA_FILES = re.compile(
    r"pages-[0-9]+-[0-9]+-[0-9a-f]+\.bin|state-[0-9a-f]+\.safetensors"
    r"|\.manifest\.json\.[0-9a-f]+\.new|manifest\.json\.tmp"  # unfinished manifests, the latter of earlier versions
)
_PAGES_PER_FILE = 1024


def is_session(path: str | Path) -> bool:
    """Whether the folder holds a session's manifest (of any version, intact or not).

    Raises:
        SessionError: `path` can be no folder's.
    """
    return (_folder_of(path) / MANIFEST).is_file()


def saved_reaches(path: str | Path) -> list[list[int]] | None:
    """How far each head of the saved session reaches, in the model's order, where bytes decided it; otherwise None, and
    where there is no session.

    Raises:
        SessionError: a manifest that cannot be used.
    """
    if not is_session(path):
        return None
    rows = Manifest.read(_folder_of(path)).identity.get("reaches")
    of_rows = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    return rows if of_rows and all(type(reach) is int for row in rows for reach in row) else None


def saved_keep(path: str | Path) -> int | None:
    """How many first tokens no head of the saved session drops, where that was asked for; otherwise None.

    Raises:
        SessionError: a manifest that cannot be used.
    """
    keep = Manifest.read(_folder_of(path)).identity.get("keep")
    return keep if type(keep) is int and 0 <= keep <= MAX_TOKENS else None


class SessionStore:
    """The folder a session is saved to. Making one reads only; `claim` makes it the folder's owner.

    Attributes:
        folder: absolute, links resolved.

    Raises:
        SessionError: the path is a file, or a folder that holds something other than a session.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = _folder_of(path)
        self._pages: list[StoredFile] = []
        self._seen: str | None = None
        self._lock: FolderLock | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise SessionError(f"{shown(path)} is a file: name a folder for the session")
        if self.folder.is_dir() and not is_session(self.folder):
            others = [entry for entry in _names(self.folder) if entry != _LOCK and not _DATA_FILES.fullmatch(entry)]
            if others:
                raise SessionError(
                    f"{shown(path)} is not a session and not empty (it holds {shortened(others[0])!r}): name "
                    f"another folder"
                )

    def adopt(self, manifest: Manifest) -> None:
        """The session was loaded as `manifest` says: these page files are its own and need not be written again."""
        self._pages, self._seen = list(manifest.pages), manifest.sha256

    def rewound(self, spec: CacheSpec, seq_len: int) -> None:
        """The session was rewound to `seq_len` tokens: files with later pages no longer describe it, nor do files that
        were written later, where heads have dropped pages meanwhile."""
        pooled = spec.page_format.pooled_pages(seq_len)
        self._pages = [
            file for file in self._pages if file.stop <= pooled and (not spec.reaches or file.seq_len <= seq_len)
        ]

    def claim(self) -> None:
        """Become the folder's owner until `release`, or until nothing refers to this store; a folder that is not there
        is made. What killed saves have left is removed.

        Raises:
            SessionError: another session owns the folder, or another one was saved there since this one was loaded
                from it or saved to it; the folder cannot be written.
        """
        if self._lock is not None and self._lock.held:
            return
        self.release()
        lock = FolderLock(
            self.folder / _LOCK, f"session folder {self.folder}", SessionError, "end that one", "name another folder"
        )
        try:
            on_disk = Manifest.read(self.folder) if is_session(self.folder) else None
        except SessionError:  # damaged, or of another version: no telling which files belong to what
            self._lock = lock
            return
        if self._seen is not None and on_disk is not None and on_disk.sha256 != self._seen:
            lock.release()
            raise SessionError(
                f"the session in {shown(self.folder)} was saved by another run since this one was last there: save "
                f"to another folder, or load it again"
            )
        self._lock = lock
        self._remove_unnamed(on_disk)

    def release(self) -> None:
        """Others may own the folder from now on."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save(self, session: Savable) -> None:
        """Claim the folder, write what is new or no longer there, and replace the manifest.

        Raises:
            SessionError: as `claim`; writing failed (a full disk, say), or the folder was removed meanwhile; what was
                saved before is untouched.
        """
        check_extra(session.extra)
        self.claim()
        token = uuid.uuid4().hex[:12]
        written: list[Path] = []
        try:
            pages = self._write_pages(session, token, written)
            path = self.folder / f"state-{token}.safetensors"
            written.append(path)
            manifest = Manifest(
                vars(session.identity).copy(), session.seq_len, session.num_tokens, session.capacity,
                write_state(path, session), tuple(pages), session.extra, session.sparse_tokens,
            )  # fmt: skip
            data, sha256 = manifest.encoded()
            write_whole(self.folder / MANIFEST, data)
        except BaseException as error:
            for path in written:
                path.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise SessionError(
                f"the session could not be written to {shown(self.folder)} ({error.strerror or error}): free some "
                f"room or name another folder; what was saved there before is untouched"
            ) from error
        self._pages, self._seen = pages, sha256
        assert self._lock is not None
        lost = [file.name for file in (*pages, manifest.state) if not self._is_there(file)]
        if lost or not self._lock.held:
            raise SessionError(
                f"session folder {shown(self.folder)} was removed while it was written: save again, or name "
                f"another folder"
            )
        self._remove_unnamed(manifest)

    def _write_pages(self, session: Savable, token: str, written: list[Path]) -> list[StoredFile]:
        """Files for all pooled pages: those of earlier saves that are still there, and new ones for the rest."""
        pooled = session.cache.spec.page_format.pooled_pages(session.seq_len)
        saved = self._pages[-1].stop if self._pages else 0
        new = [(first, min(first + _PAGES_PER_FILE, pooled), None) for first in range(saved, pooled, _PAGES_PER_FILE)]
        pages = []
        for first, stop, file in [*((file.first, file.stop, file) for file in self._pages), *new]:
            if file is None or not self._is_there(file):
                path = self.folder / f"pages-{first}-{stop}-{token}.bin"
                written.append(path)
                file = write_pages(path, session.cache, first, stop)
            pages.append(file)
        return pages

    def _is_there(self, file: StoredFile) -> bool:
        try:
            return (self.folder / file.name).stat().st_size == file.bytes
        except OSError:
            return False

    def _remove_unnamed(self, manifest: Manifest | None) -> None:
        """Remove data files that `manifest` does not name. Only for the owner, and with the manifest that is there."""
        named = manifest.file_names if manifest is not None else set()
        for name in _names(self.folder):
            if name not in named and _DATA_FILES.fullmatch(name):
                try:
                    (self.folder / name).unlink(missing_ok=True)
                except OSError:
                    continue  # it only takes room


class SavedSession:
    """A session in a folder, its manifest read and checked; the files it names are checked as they are read.

    Attributes:
        manifest: what is there.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, path: str | Path, identity: SessionIdentity) -> SavedSession:
        """Read the manifest of the folder `path`, whether a session owns it or not.

        Raises:
            SessionError: no session there, a damaged manifest, another version, or another model, split or format.
        """
        folder = _folder_of(path)
        if not folder.is_dir():
            raise SessionError(
                f"there is no session folder {shown(path)}: check the path, or start without loading one"
            )
        if not is_session(folder):
            raise SessionError(f"{shown(path)} holds no session (no {MANIFEST}): check the path")
        manifest = Manifest.read(folder)
        if manifest.version == 1 and manifest.identity.get("kv_format") == "int4":
            raise SessionError(
                f"session {shown(path)} is of version 1, whose INT4 pages hold keys that are not rotated as this "
                f"longrun's are: read the text again into a new session, or use the longrun that wrote it"
            )
        identity.check(manifest.identity, folder)
        return cls(folder, manifest)

    @property
    def seq_len(self) -> int:
        return self.manifest.seq_len

    @property
    def capacity(self) -> int:
        return self.manifest.capacity

    def restore(self, session: Savable) -> SessionStore:
        """Fill a new, empty session. The store that is returned saves it here without writing again what is here.

        Raises:
            SessionError: a file is missing, truncated or damaged, or holds something else.
        """
        state = self._read_state(session)
        restore_pages(self.folder, self.manifest.pages, session.cache, self.seq_len)
        session.cache.load_state({name[6:]: x for name, x in state.items() if name.startswith("cache.")})
        session.cache.seq_len = self.seq_len
        session.restore(
            state["token_ids"], state.get("logits"), state["generator"], self.manifest.extra,
            self.manifest.sparse_tokens,
        )  # fmt: skip
        store = SessionStore(self.folder)
        store.adopt(self.manifest)
        return store

    def _read_state(self, session: Savable) -> dict[str, Any]:
        """The state; where the folder's owner has saved again since the manifest was read, the newer one."""
        while True:
            try:
                return read_state(self.folder, self.manifest, session)
            except SessionError:
                newer = SavedSession.open(self.folder, session.identity).manifest
                if newer.sha256 == self.manifest.sha256 or newer.seq_len > session.capacity:
                    raise
                self.manifest = newer


def _folder_of(path: str | Path) -> Path:
    try:
        return user_path(path, "session folder", SessionError).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise SessionError(f"{shown(path)} can be no session's folder ({error}): name another one") from error


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SessionError(
            f"session folder {shown(folder)} cannot be read ({error.strerror or error}): name another one"
        ) from error
