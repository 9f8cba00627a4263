"""Sessions on disk: page files, one state file, and a manifest that names them with checksums.

    manifest.json             what the session is, and every file with its length and SHA-256; replaced last, atomically
    pages-FIRST-STOP-ID.bin   pooled pages [FIRST, STOP): layer by layer, payloads [heads, n, payload_bytes], then the
                              index [heads, n, 2, head_dim] float16 (INT4 only)
    state-ID.safetensors      token ids, logits, random state, tails, sink pages, rings

Page files are only ever added; a save writes the pages that are new, a new state file and then the manifest. Files that
no manifest names are what an interrupted save left behind, and are removed by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from longrun.errors import SessionError

if TYPE_CHECKING:
    from longrun.cache.dual import DualCache
    from longrun.session import Session

VERSION = 2  # 1: INT4 pages held keys that were not rotated; exact pages were the same
_KIND = "longrun session"
_MANIFEST = "manifest.json"
_OWN_FILES = re.compile(r"(pages-\d+-\d+-[0-9a-f]+\.bin|state-[0-9a-f]+\.safetensors|manifest\.json(\.tmp)?)")
_PAGES_PER_FILE = 1024


@dataclass(frozen=True)
class SessionIdentity:
    """What must be equal for a saved cache to mean the same: checked field by field on load."""

    model: str
    head_split: str
    kv_format: str
    page_size: int
    weight_format: str

    _ADVICE: ClassVar[dict[str, str]] = {
        "model": "load the checkpoint it was made with",
        "head_split": "give the head map, ratio and window it was made with",
        "kv_format": "give --kv {saved}",
        "page_size": "give the page_size it was made with",
        "weight_format": "give the weight format it was made with",
    }

    def check(self, saved: dict[str, Any], folder: Path) -> None:
        """Raises SessionError naming the first field of `saved` that differs."""
        for name, own in asdict(self).items():
            if saved.get(name) != own:
                raise SessionError(
                    f"session {folder} was saved with {name.replace('_', ' ')} {saved.get(name)}, but this runtime has "
                    f"{own}: {self._ADVICE[name].format(saved=saved.get(name))}"
                )


@dataclass(frozen=True)
class _File:
    name: str
    bytes: int
    sha256: str
    first: int = 0
    stop: int = 0


def is_session(path: str | Path) -> bool:
    """Whether the folder holds a session's manifest (of any version, intact or not)."""
    return (Path(path) / _MANIFEST).is_file()


class SessionStore:
    """The folder a session is saved to.

    Raises:
        SessionError: the path is a file, or a folder that holds something other than a session.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path).absolute()
        self._pages: list[_File] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise SessionError(f"{path} is a file: name a folder for the session")
        if self.folder.is_dir() and not is_session(self.folder):
            others = [entry.name for entry in self.folder.iterdir() if not _OWN_FILES.fullmatch(entry.name)]
            if others:
                raise SessionError(
                    f"{path} is not a session and not empty (it holds {others[0]!r}): name another folder"
                )

    def adopt(self, pages: list[_File]) -> None:
        """The session was loaded from here: these page files are its own and need not be written again."""
        self._pages = list(pages)

    def forget_pages(self, num_pooled: int) -> None:
        """The session was rewound to `num_pooled` pages: files with later pages no longer describe it."""
        self._pages = [file for file in self._pages if file.stop <= num_pooled]

    def save(self, session: Session) -> None:
        """Write what is new and replace the manifest.

        Raises:
            SessionError: writing failed (a full disk, say); what was saved before is untouched.
        """
        token = uuid.uuid4().hex[:12]
        written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            pages = list(self._pages)
            saved = pages[-1].stop if pages else 0
            pooled = session.cache.spec.page_format.pooled_pages(session.seq_len)
            for first in range(saved, pooled, _PAGES_PER_FILE):
                stop = min(first + _PAGES_PER_FILE, pooled)
                path = self.folder / f"pages-{first}-{stop}-{token}.bin"
                written.append(path)
                pages.append(_write_file(path, _page_bytes(session.cache, first, stop), first, stop))
            path = self.folder / f"state-{token}.safetensors"
            written.append(path)
            state = _write_file(path, iter([memoryview(save_safetensors(_session_tensors(session)))]))
            manifest = {
                "kind": _KIND,
                "version": VERSION,
                "identity": asdict(session.identity),
                "seq_len": session.seq_len,
                "num_tokens": session.num_tokens,
                "capacity": session.capacity,
                "state": asdict(state),
                "pages": [asdict(file) for file in pages],
                "extra": session.extra,
            }
            manifest["sha256"] = _digest(manifest)
            temporary = self.folder / f"{_MANIFEST}.tmp"
            written.append(temporary)
            _write_file(temporary, iter([memoryview(json.dumps(manifest, indent=1).encode())]))
            os.replace(temporary, self.folder / _MANIFEST)
            _sync_folder(self.folder)
        except OSError as error:
            for path in written:
                path.unlink(missing_ok=True)
            raise SessionError(
                f"the session could not be written to {self.folder} ({error.strerror or error}): free some room or "
                f"name another folder; what was saved there before is untouched"
            ) from error
        self._pages = pages
        self._remove_leftovers({file.name for file in (*pages, state)} | {_MANIFEST})

    def _remove_leftovers(self, keep: set[str]) -> None:
        for entry in self.folder.iterdir():
            if entry.name not in keep and _OWN_FILES.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


@dataclass(frozen=True)
class SavedSession:
    """A manifest that was read and checked; the files it names are checked as they are read."""

    folder: Path
    seq_len: int
    num_tokens: int
    capacity: int
    extra: dict[str, Any]
    state: _File
    pages: tuple[_File, ...]

    @classmethod
    def open(cls, path: str | Path, identity: SessionIdentity) -> SavedSession:
        """Read the manifest of the folder `path`.

        Raises:
            SessionError: no session there, a damaged manifest, another version, or another model, split or format.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise SessionError(f"there is no session folder {path}: check the path, or start without loading one")
        if not is_session(folder):
            raise SessionError(f"{path} holds no session (no {_MANIFEST}): check the path")
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
            version = manifest["version"] if manifest["kind"] == _KIND else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SessionError(f"{folder / _MANIFEST} cannot be read as a session manifest: {error}") from error
        if version not in (1, VERSION):
            raise SessionError(
                f"session {path} is of version {version}, this longrun reads version {VERSION}: read the text again "
                f"into a new session, or use the longrun that wrote it"
            )
        stored = manifest.pop("sha256", None)
        if stored != _digest(manifest):
            raise SessionError(f"{folder / _MANIFEST} is damaged (its checksum does not match): restore it from a copy")
        if version == 1 and manifest["identity"]["kv_format"] == "int4":
            raise SessionError(
                f"session {path} is of version 1, whose INT4 pages hold keys that are not rotated as this longrun's "
                f"are: read the text again into a new session, or use the longrun that wrote it"
            )
        identity.check(manifest["identity"], folder)
        return cls(
            folder, manifest["seq_len"], manifest["num_tokens"], manifest["capacity"], manifest["extra"],
            _File(**manifest["state"]), tuple(_File(**entry) for entry in manifest["pages"]),
        )  # fmt: skip

    def restore(self, session: Session) -> None:
        """Fill a new, empty session and let it go on saving here.

        Raises:
            SessionError: a file is missing, truncated or damaged.
        """
        raw = b"".join(_read_file(self.folder, self.state, [self.state.bytes]))
        state = load_safetensors(raw)
        pooled = session.cache.spec.page_format.pooled_pages(self.seq_len)
        stops = [0, *(file.stop for file in self.pages)]
        assert stops[-1] == pooled and [file.first for file in self.pages] == stops[:-1], "manifest lost pages"
        for file in self.pages:
            _restore_pages(self.folder, file, session.cache)
        session.cache.load_state({name[6:]: x for name, x in state.items() if name.startswith("cache.")})
        session.cache.seq_len = self.seq_len
        session.restore(state["token_ids"], state.get("logits"), state["generator"], self.extra)
        store = SessionStore(self.folder)
        store.adopt(list(self.pages))
        session.adopt_store(store)


def _session_tensors(session: Session) -> dict[str, Tensor]:
    found = {f"cache.{name}": x.cpu().contiguous() for name, x in session.cache.state().items()}
    found.update(session.snapshot())
    return found


def _page_bytes(cache: DualCache, first: int, stop: int) -> Iterator[memoryview]:
    for pages, _ in cache.layers:
        if pages is None:
            continue
        yield _raw(pages.read_payload(first, stop))
        if pages.index is not None:
            yield _raw(pages.index[:, first:stop])


def _restore_pages(folder: Path, file: _File, cache: DualCache) -> None:
    fmt, count = cache.spec.page_format, file.stop - file.first
    layers = [pages for pages, _ in cache.layers if pages is not None]
    sizes = [size for pages in layers for size in (pages.num_heads * count * fmt.payload_bytes,
                                                   pages.num_heads * count * fmt.index_bytes)]  # fmt: skip
    parts = _read_file(folder, file, sizes)
    for pages in layers:
        payload = torch.frombuffer(next(parts), dtype=torch.uint8).view(pages.num_heads, count, -1)
        raw = next(parts)
        index = None
        if fmt.quantized:
            index = torch.frombuffer(raw, dtype=torch.float16).view(pages.num_heads, count, 2, fmt.head_dim)
        pages.store(payload.to(cache.device), None if index is None else index.to(cache.device))
    assert next(parts, None) is None


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().view(torch.uint8).reshape(-1).numpy())


def _write_file(path: Path, parts: Iterator[memoryview], first: int = 0, stop: int = 0) -> _File:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as out:
        for part in parts:
            digest.update(part)
            out.write(part)
            size += part.nbytes
        out.flush()
        os.fsync(out.fileno())
    return _File(path.name, size, digest.hexdigest(), first, stop)


def _read_file(folder: Path, file: _File, sizes: list[int]) -> Iterator[bytearray]:
    """The file's parts in turn; its checksum is compared after the last one."""
    path, digest = folder / file.name, hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != file.bytes or sum(sizes) != file.bytes:
            raise SessionError(f"{path} has {size:,} bytes where the session needs {file.bytes:,}: it is truncated")
        with path.open("rb") as source:
            for count in sizes:
                part = bytearray(count)
                if source.readinto(part) != count:
                    raise SessionError(f"{path} ended early: it is truncated")
                digest.update(part)
                if source.tell() == file.bytes and digest.hexdigest() != file.sha256:
                    raise SessionError(f"{path} is damaged (its checksum does not match): restore it from a copy")
                yield part
    except OSError as error:
        raise SessionError(f"{path} cannot be read ({error.strerror}): the session is incomplete") from error


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
