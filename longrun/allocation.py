"""An allocation that fails, as one sentence, whatever library it fails in; and memory given back."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from longrun.errors import PlanError
from longrun.units import format_bytes

_NO_ROOM_FOR_LIBRARY = "failed to map segment"
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed", "cannot allocate memory")
_REMEDY = "end what else uses memory, raise the limit (ulimit -v, the container's), or ask for a smaller context"


def is_failed_allocation(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: torch's on CPU and GPU, Python's own, the system's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):
        return _NO_ROOM_FOR_LIBRARY in str(error)
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def allocation_sentence(error: BaseException, when: str) -> str:
    """One sentence: that memory ran out `when`, how much was asked for where the error says so, and what to do."""
    asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
    size = ""
    if asked is not None:
        size = f" ({format_bytes(int(asked[1])) if asked[1] else asked[2]} more were asked for)"
    return f"memory ran out {when}{size}: {_REMEDY}"


@contextmanager
def failed_allocations(when: str) -> Iterator[None]:
    """Raise an allocation that fails inside as PlanError.

    Args:
        when: what was being done, like "while the weights were loaded".

    Raises:
        PlanError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        if not is_failed_allocation(error):
            raise
        raise PlanError(allocation_sentence(error, when)) from error


def keep_freed_memory() -> None:
    """Have glibc keep up to 16 MiB that were freed for what is allocated next, until `return_freed_memory`.

    By itself it gives every temporary of more than 128 KiB back at once, and the next one is fetched page by page,
    which took longer than the work on it. It learns from the largest block freed so far, up to 32 MiB: here from one
    that nobody uses. Other C libraries do not care."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    library.free(library.malloc(8 * 2**20))


def ask_for_huge_pages(address: int, length: int) -> None:
    """Have Linux fetch the whole pages of this memory 2 MiB at a time when they are first written, where it can: by
    4 KiB, fetching a model's weights takes longer than filling them. Advice: nothing is lost where it is not taken."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    start = address + -address % mmap.PAGESIZE
    if advise is not None and address + length > start:
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(start, address + length - start, mmap.MADV_HUGEPAGE)


def return_freed_memory() -> None:
    """Give what was freed in main memory back to the system: glibc keeps it (200 MB were seen with nf4, 400 MB with a
    GGUF file), and the plan does not count it. Other C libraries have no such call and do not need it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
