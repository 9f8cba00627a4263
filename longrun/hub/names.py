"""Names of models on the Hugging Face hub, and how they are distinguished from paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from longrun.errors import InputError, short_path
from longrun.paths import user_path

FORMS = "user/repo, user/repo/file.gguf or user/repo:Q4_K_M"

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?::({_PART})|/((?:{_PART}/)*{_PART}\.gguf))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository, or one GGUF file of it.

    Attributes:
        repo: `user/repo`.
        file: path of a GGUF file within it, or None.
        tag: the quantization of the GGUF file to take, such as `Q4_K_M`, or None.
    """

    repo: str
    file: str | None = None
    tag: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.file is not None or self.tag is not None

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else f":{self.tag}" if self.tag else "")


def parse_name(model: str | os.PathLike[str], what: str = "--model") -> HubName | None:
    """The hub's name that `model` is, or None where it is a path: one that exists, one whose parent folder exists, or
    one that begins like a path (`/`, `.`, `~`).

    Raises:
        InputError: it can be neither; nothing that a path could be (see `user_path`).
    """
    path = user_path(model, what)
    text = os.fspath(model)
    if text.startswith(("/", ".", "~")) or os.path.lexists(path) or path.parent.is_dir():
        return None
    match = _NAME.fullmatch(text.rstrip("/"))
    if match is None or ".." in match[1] or "--" in match[1]:  # the hub allows neither
        raise InputError(
            f"{what} {short_path(text)} is no path (there is no folder {short_path(path.parent)}) and no name on the "
            f"Hugging Face hub: give a checkpoint folder, or {FORMS}"
        )
    repo, tag, file = match.groups()
    return HubName(repo, file, tag)


def has_tag(file: str, tag: str) -> bool:
    """Whether a GGUF file's name ends with this quantization: `model-q4_k_m.gguf` has the tag Q4_K_M."""
    stem = file.lower().rpartition("/")[2].removesuffix(".gguf")
    return re.search(rf"(^|[-._]){re.escape(tag.lower())}$", stem) is not None


def model_name(path: str | os.PathLike[str]) -> str:
    """What to call the model at `path`: the repository's name for a folder or file of the local hub cache, whose own
    name is a commit, otherwise the name of the folder or file."""
    path = Path(path)
    for number, folder in enumerate(path.parents):
        if folder.name in ("snapshots", "blobs") and folder.parent.name.startswith("models--"):
            repo = folder.parent.name.removeprefix("models--").replace("--", "/")
            within = path.parts[len(path.parts) - number :]
            return "/".join((repo, *within))
    return path.name
