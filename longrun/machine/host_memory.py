"""How much main memory can still be taken: the machine's, the container's, or the process's own limit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")

# Address space that libraries and their threads take on their way and never touch (350 MB were seen with torch 2.13 and
# two threads): it counts in `ulimit -v`, and in no other limit.
_UNTOUCHED_BYTES = 400 * 10**6


def available_bytes() -> int:
    """Bytes that can be taken without swapping, without the out-of-memory killer and within `ulimit`.

    The least of what psutil calls available, of what every memory cgroup above this process leaves (its limit, or the
    mark above which it is throttled, less its usage, file cache not counted, as that gives way), and of what the
    process's limits on address space and data leave. Linux counts a container's limit nowhere else.
    """
    return max(0, min([_machine_bytes(), *_left_in_limits()]))


def resident_bytes() -> int:
    """Main memory of this process, pages of files included."""
    return psutil.Process().memory_info().rss


def still_needed(planned: int, held: int, libraries_loaded: bool = False) -> tuple[int, int]:
    """What must still be taken of `planned` bytes, and what can be, of the limit that comes closest.

    Args:
        planned: bytes of main memory in all.
        held: bytes of them that stand in this process already, as planned. What the system does not see there (a
            library that is not loaded yet) is still needed. Pages of files are not held for the machine and its
            containers, as they count them as free.
        libraries_loaded: no more libraries are to come.
    """
    own = psutil.Process().memory_info()
    own_memory = own.rss - getattr(own, "shared", 0)
    pairs = [(planned - min(held, own_memory), _machine_bytes())]
    untouched = 0 if libraries_loaded else _UNTOUCHED_BYTES
    pairs += [(planned - min(held, own.rss), left - untouched) for left in _left_in_limits()]
    needed, free = max(pairs, key=lambda pair: pair[0] - pair[1])
    return needed, max(0, free)


def _machine_bytes() -> int:
    return min([psutil.virtual_memory().available, *_left_in_cgroups(_CGROUPS, _OWN_CGROUPS)])


def _left_in_limits() -> Iterator[int]:
    """Bytes left within `ulimit -v` (address space) and `ulimit -d` (data), where they are set."""
    import resource  # not at the top: Windows lacks it, and is refused in a sentence of its own

    own = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, getattr(own, "data", 0))):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - used


def _left_in_cgroups(mount: Path, own: Path) -> Iterator[int]:
    """Bytes left in every memory cgroup from this process's own up to the root, versions 1 and 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, (("memory.max", "memory.high"), "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted here: the root is then the own group.
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            yield from _left_in(place, *names)
            if place == root:
                break


def _left_in(folder: Path, limit_names: tuple[str, ...], usage_name: str, prefix: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        file_cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        held = max(0, usage - file_cache)
        if "hierarchical_memory_limit" in stat:  # version 1: also of groups above that are not mounted here
            yield int(stat["hierarchical_memory_limit"]) - held
        for name in limit_names:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                yield int((folder / name).read_text()) - held
