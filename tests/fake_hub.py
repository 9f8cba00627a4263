"""A Hugging Face hub without a network: what it lists and serves, and huggingface_hub's own cache layout on disk."""

from __future__ import annotations

import hashlib
import io
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """One repository on the hub.

    Attributes:
        files: its files by path.
        fetched: paths of the files that were fetched so far.
        error: raised by every access, where it is not None.
        fetch_error: raised by fetching files alone.
        asked: number of accesses to the hub.
    """

    def __init__(self, cache: Path, repo: str = "maker/model") -> None:
        self.cache, self.repo = cache, repo
        self.commit = COMMIT
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.error: BaseException | None = None
        self.fetch_error: BaseException | None = None
        self.asked = 0
        self.claimed_bytes: dict[str, int] = {}
        self._snapshot_download = huggingface_hub.snapshot_download

    @classmethod
    def start(cls, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        hub = cls(cache)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: hub.model_info(repo))
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(open=hub.open))
        return hub

    @property
    def snapshot(self) -> Path:
        return self.cache / f"models--{self.repo.replace('/', '--')}" / "snapshots" / self.commit

    def add_folder(self, folder: Path) -> None:
        """Every file of `folder` becomes one of the repository."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()

    def put(self, *names: str) -> Path:
        """Files into the local cache, as huggingface_hub stores them: blobs, links to them, and the branch's commit."""
        base = self.snapshot.parents[1]
        for name in names:
            blob = base / "blobs" / hashlib.sha256(self.files[name]).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(self.files[name])
            link = self.snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / "main").write_text(self.commit)
        return self.snapshot

    def model_info(self, repo: str) -> SimpleNamespace:
        self._access(repo)
        sizes = {name: self.claimed_bytes.get(name, len(data)) for name, data in self.files.items()}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return self._snapshot_download(repo, **options)
        self._access(repo)
        if self.fetch_error is not None:
            raise self.fetch_error
        names = [name for name in self.files if any(fnmatch(name, pattern) for pattern in options["allow_patterns"])]
        self.fetched += names
        return str(self.put(*names))

    def open(self, path: str, mode: str, block_size: int) -> io.BytesIO:
        assert mode == "rb" and block_size
        self._access(self.repo)
        return io.BytesIO(self.files[path.removeprefix(f"{self.repo}/")])

    def _access(self, repo: str) -> None:
        assert repo == self.repo
        self.asked += 1
        if self.error is not None:
            raise self.error
