"""What torch's CUDA allocator takes from the driver beyond the bytes of the tensors: plain arithmetic, without torch.

The rules are those of torch 2.11 to 2.13 (`c10/core/AllocatorConfig.h`, `c10/cuda/CUDACachingAllocator.cpp`) with its
default settings. Blocks are multiples of 512 bytes. Those of up to 1 MiB are cut from segments of 2 MiB, larger ones
below 10 MiB from segments of 20 MiB, and any other has a segment of its own, rounded up to 2 MiB. A block comes from
the smallest rest that holds it; a rest of a large segment is kept only where it is above 1 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

_MIB = 2**20
_BLOCK = 512
_SMALL, _SMALL_SEGMENT = _MIB, 2 * _MIB
_LARGE, _LARGE_SEGMENT, _LARGE_STEP = 10 * _MIB, 20 * _MIB, 2 * _MIB


def rounding_bytes(sizes: Iterable[int]) -> int:
    """Bytes of segments that hold no tensor, for tensors of these bytes, allocated in this order and all kept.

    What is allocated and freed between them may change where they stand, and so the result by some segments.
    """
    rests: dict[bool, list[int]] = {True: [], False: []}  # of small and of large segments, rising
    reserved = held = 0
    for size in sizes:
        if not size:
            continue
        held += size
        block = _up(size, _BLOCK)
        small = block <= _SMALL
        fitting = bisect_left(rests[small], block)
        if fitting < len(rests[small]):
            room = rests[small].pop(fitting)
        else:
            room = _segment_bytes(block)
            reserved += room
        if room - block >= (_BLOCK if small else _SMALL + 1):
            insort(rests[small], room - block)
    return reserved - held


def _segment_bytes(block: int) -> int:
    if block <= _SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if block < _LARGE else _up(block, _LARGE_STEP)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
