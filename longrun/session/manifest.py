"""What a session's folder says of itself: `manifest.json`, checked value by value before anything else is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from longrun.errors import SessionError, quoted, shortened
from longrun.specs.selection_spec import Selection

VERSION = 2  # 1: INT4 pages held keys that were not rotated; exact pages were the same
MANIFEST = "manifest.json"
_KIND = "longrun session"
_PAGES_NAME = re.compile(r"pages-[0-9]+-[0-9]+-[0-9a-f]+\.bin")
_STATE_NAME = re.compile(r"state-[0-9a-f]+\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 2**26
_MOST_TOKENS = 2**40
_MOST_FILE_BYTES = 2**53
_MOST_DEPTH = 50


@dataclass(frozen=True)
class SessionIdentity:
    """What must be equal for a saved cache to mean the same: checked field by field on load.

    Attributes:
        reaches: of heads in the model's order, where bytes decided them: what the hash `head_split` stands for, so
            that a session can be loaded with them again. Not compared.
        yarn: factor by which the model's window was stretched; None is none, as in older sessions, which name none.
        keep: first tokens that no head drops, where a run asked for more than the head map's sinks. Not compared: the
            hash stands for it.
        selection: which pages a decode step read when the session was saved; None is all. Not compared: what is saved
            is the same under any.
    """

    model: str
    head_split: str
    kv_format: str
    page_size: int
    weight_format: str
    reaches: tuple[tuple[int, ...], ...] | None = field(default=None, compare=False)
    yarn: float | None = None
    keep: int | None = field(default=None, compare=False)
    selection: Selection | None = field(default=None, compare=False)

    _ADVICE: ClassVar[dict[str, str]] = {
        "model": "load the checkpoint it was made with",
        "yarn": "load the model with the --yarn it was made with, or with none",
        "head_split": "give the head map, ratio or kv_bytes and window it was made with",
        "kv_format": "give --kv {saved}",
        "page_size": "give the page_size it was made with",
        "weight_format": "give the weight format it was made with",
    }

    def check(self, saved: dict[str, Any], folder: Path) -> None:
        """Raises SessionError naming the first field of `saved` that differs."""
        for name, advice in self._ADVICE.items():
            own = getattr(self, name)
            if saved.get(name) != own:
                said, has = ("none" if value is None else shortened(value) for value in (saved.get(name), own))
                if name == "head_split" and saved.get("reaches") and self.reaches:
                    advice = "load the model with this session named (session=), and it keeps its reaches"
                elif name == "head_split" and saved.get("keep") != self.keep:
                    advice = "load the model with this session named (session=), and it keeps its first tokens"
                raise SessionError(
                    f"session {shown(folder)} was saved with {name.replace('_', ' ')} {said}, but this runtime has "
                    f"{has}: {advice.format(saved=said)}"
                )


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder.

    Attributes:
        first, stop: the pooled pages in it, 0 and 0 for the state.
        seq_len: tokens of the session when it was written: heads of a finite reach have only the pages in it that
            are in reach there.
    """

    name: str
    bytes: int
    sha256: str
    first: int = 0
    stop: int = 0
    seq_len: int = 0


@dataclass(frozen=True)
class Manifest:
    """A session as it was saved. `sha256` is the manifest's own checksum; `sparse_tokens` of its tokens were read
    sparsely, none in older ones."""

    identity: dict[str, Any]
    seq_len: int
    num_tokens: int
    capacity: int
    state: StoredFile
    pages: tuple[StoredFile, ...]
    extra: dict[str, Any]
    sparse_tokens: int = 0
    version: int = VERSION
    sha256: str = ""

    @property
    def file_names(self) -> set[str]:
        return {self.state.name, *(file.name for file in self.pages)}

    def encoded(self) -> tuple[bytes, str]:
        """The file's bytes, and the checksum in it.

        Raises:
            SessionError: `extra` is too large.
        """
        fields = {"kind": _KIND, **asdict(self)}
        del fields["sha256"]
        sha256 = _digest(fields)
        data = json.dumps({**fields, "sha256": sha256}, indent=1).encode()
        if len(data) > _MOST_BYTES:
            raise SessionError(
                f"the session cannot be saved: its manifest with `extra` has {len(data):,} bytes, more than "
                f"{_MOST_BYTES:,}: keep large data elsewhere"
            )
        return data, sha256

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`.

        Raises:
            SessionError: it cannot be read, is of another version, or a value is none that a session has.
        """
        path = folder / MANIFEST
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
            fields = json.loads(data)
            version = fields["version"] if fields["kind"] == _KIND else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SessionError(
                f"{shown(path)} cannot be read as a session manifest ({shortened(error)}): restore it from a copy"
            ) from error
        if type(version) is not int or version not in (1, VERSION):
            raise SessionError(
                f"session {shown(folder)} is of version {quoted(version)}, this longrun reads version {VERSION}: "
                f"read the text again into a new session, or use the longrun that wrote it"
            )
        stored = fields.pop("sha256", None)
        try:
            if stored != _digest(fields):
                raise SessionError(f"{shown(path)} is damaged (its checksum does not match): restore it from a copy")
            return _checked(fields, stored)
        except (_WrongValue, ValueError, RecursionError) as error:
            raise SessionError(
                f"{shown(path)} is no session of longrun's ({shortened(error)}): restore it from a copy"
            ) from error


def check_extra(extra: object) -> None:
    """Raises SessionError where `extra` would not come back from JSON as it is."""
    for fault in _not_kept(extra, "extra", 0):
        raise SessionError(
            f"the session cannot be saved: {fault}, and its files keep text, finite numbers, True, False, None, lists "
            f"and dictionaries with keys of text"
        )


def shown(path: str | Path) -> str:
    """A path as it stands in a message: whole as a rule, so that people find it."""
    return shortened(path, 240)


class _WrongValue(Exception):
    """A value of a manifest that no session has."""


def _checked(fields: dict[str, Any], sha256: str) -> Manifest:
    capacity = _whole(fields, "capacity", 1, _MOST_TOKENS)
    seq_len = _whole(fields, "seq_len", 0, capacity)
    num_tokens = _whole(fields, "num_tokens", seq_len, seq_len + 1)
    pages, stop = [], 0
    for entry in _of_type(fields, "pages", list):
        file = _stored_file(entry, _PAGES_NAME)
        if file.first != stop or file.stop <= file.first:
            raise _WrongValue(f"{file.name} does not begin with page {stop:,}")
        pages.append(file)
        stop = file.stop
    return Manifest(
        _of_type(fields, "identity", dict), seq_len, num_tokens, capacity,
        _stored_file(fields.get("state"), _STATE_NAME), tuple(pages), _of_type(fields, "extra", dict),
        _whole({"sparse_tokens": 0, **fields}, "sparse_tokens", 0, num_tokens), fields["version"], sha256,
    )  # fmt: skip


def _stored_file(entry: object, pattern: re.Pattern[str]) -> StoredFile:
    if not isinstance(entry, dict):
        raise _WrongValue(f"{quoted(entry)} is no file")
    name, sha256 = _of_type(entry, "name", str), _of_type(entry, "sha256", str)
    if pattern.fullmatch(name) is None or len(name) > 200:
        raise _WrongValue(f"name is {quoted(name)}")
    if _DIGEST.fullmatch(sha256) is None:
        raise _WrongValue(f"sha256 is {quoted(sha256)}")
    return StoredFile(
        name, _whole(entry, "bytes", 0, _MOST_FILE_BYTES), sha256,
        _whole(entry, "first", 0, _MOST_TOKENS), _whole(entry, "stop", 0, _MOST_TOKENS),
        _whole({"seq_len": 0, **entry}, "seq_len", 0, _MOST_TOKENS),
    )  # fmt: skip


def _whole(fields: dict[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise _WrongValue(f"{name} is {quoted(value)}")
    return value


def _of_type(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        raise _WrongValue(f"{name} is {quoted(value)}")
    return value


def _not_kept(value: object, where: str, depth: int) -> Iterator[str]:
    """What of `value` would not come back from JSON as it is."""
    if depth > _MOST_DEPTH:
        yield f"{where} is nested deeper than {_MOST_DEPTH} levels"
    elif depth == 0 and not isinstance(value, dict):
        yield f"{where} is {quoted(value)}"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"a key of {where} is {quoted(key)}"
            yield from _not_kept(inner, f"{where}[{quoted(key)}]", depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_kept(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}"
    elif not (value is None or isinstance(value, str | int | float)) or (
        isinstance(value, int) and value.bit_length() > 1024
    ):
        yield f"{where} is {quoted(value)}"


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
