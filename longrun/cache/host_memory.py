"""How much main memory can still be taken: the machine's, or the container's where that is less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Bytes that can be taken without swapping and without the out-of-memory killer.

    The least of what psutil calls available and of what every memory cgroup above this process leaves (its limit less
    its usage, file cache not counted, as that gives way). Linux counts a container's limit nowhere else.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups(_CGROUPS, _OWN_CGROUPS)]))


def _left_in_cgroups(mount: Path, own: Path) -> Iterator[int]:
    """Bytes left in every memory cgroup from this process's own up to the root, versions 1 and 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted here: the root is then the own group.
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            yield from _left_in(place, *names)
            if place == root:
                break


def _left_in(folder: Path, limit_name: str, usage_name: str, prefix: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit, usage = int((folder / limit_name).read_text()), int((folder / usage_name).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        file_cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield limit - max(0, usage - file_cache)
