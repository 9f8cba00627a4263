"""A registrar of host memory that needs no GPU, and what the system says of a range of memory."""

import ctypes
import mmap
import threading

from longrun.cache.pinned import CannotPin

PAGE = mmap.PAGESIZE


def is_mapped(address):
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return any(begin <= address < end for begin, end in ranges)


def resident_pages(address, size):
    """Pages of the range that stand in memory (mincore)."""
    found = (ctypes.c_ubyte * (size // PAGE))()
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
    return sum(byte & 1 for byte in found)


class FakeRegistrar:
    """Registers up to `limit` bytes, and looks at what it is given."""

    def __init__(self, limit=2**60):
        self.limit, self.alive, self.log, self.threads = limit, {}, [], set()

    def register(self, address, size):
        assert address % PAGE == 0 and size % PAGE == 0
        assert all(address + size <= other or address >= other + length for other, length in self.alive.items())
        if sum(self.alive.values()) + size > self.limit:
            raise CannotPin("out of\nmemory.")
        assert resident_pages(address, size) == size // PAGE, "registered before it was touched"
        self.alive[address] = size
        self.log.append((address, size))

    def unregister(self, address):
        assert is_mapped(address), "unmapped while it was still registered"
        del self.alive[address]
        self.threads.add(threading.current_thread())
