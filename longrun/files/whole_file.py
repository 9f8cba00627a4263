"""Files that appear whole or not at all, written under a name that nobody else uses."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def fresh_path(path: Path, suffix: str = "new") -> Path:
    """A new hidden name next to `path`, for what will be renamed to it or was renamed from it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{suffix}")


def leftovers(path: Path, suffix: str = "new") -> list[Path]:
    """What killed writers have left of `fresh_path(path, suffix)`. Only who owns `path` may remove it."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\." + suffix)
    if not path.parent.is_dir():
        return []
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Give the file `path` new content, on the disk when this returns. A link at `path` is replaced, not followed.

    Args:
        content: the bytes, or a function that writes them to an open file.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    fresh = fresh_path(path)
    try:
        with fresh.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until renames in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
