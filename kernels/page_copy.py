"""Whole page payloads from pool to pool in Triton: gather and scatter by slot, also to and from mapped host memory.

A pool in pinned (or CUDA-registered) host memory is addressed by the kernel itself, through unified addressing: pages
scattered over the host pool need no packing by the CPU, no list of copies and no synchronization, and a captured CUDA
graph may fetch what a device tensor names when it runs. A persistent grid of few programs does it, so that the other
multiprocessors stay with attention. Moves each payload once in and once out; the ceiling is the PCIe link.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.page_view import PageView, check_view

ALIGNMENT = 16  # bytes of one vector access
FETCH_PROGRAMS = 32
_WAVES = 4  # programs a multiprocessor where the device's own memory is the limit


@triton.jit
def _copy_rows(src, dst, inside, WORDS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of WORDS int32 at src [n] to dst [n] where `inside`: MAIN of them, then WORDS - MAIN in a tile of REST.
    Everything is loaded before anything is stored, or the stores would hold the loads back."""
    word, rest = tl.arange(0, MAIN)[None, :], tl.arange(0, REST)[None, :]
    if MAIN < WORDS:
        late = inside[:, None] & (rest < WORDS - MAIN)
        main = tl.load(src[:, None] + word, mask=inside[:, None])
        more = tl.load(src[:, None] + MAIN + rest, mask=late)
        tl.store(dst[:, None] + word, main, mask=inside[:, None])
        tl.store(dst[:, None] + MAIN + rest, more, mask=late)
    else:
        tl.store(dst[:, None] + word, tl.load(src[:, None] + word, mask=inside[:, None]), mask=inside[:, None])


@triton.jit(do_not_specialize=["count", "src_offset", "dst_offset", "num_programs"])
def copy_kernel(
    src_ptr, src_slots_ptr, dst_ptr, dst_slots_ptr, count, src_offset, dst_offset, num_programs,
    WORDS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Grid: num_programs, each PAGES pages a step; pools seen as int32."""
    for begin in range(tl.program_id(0) * PAGES, count, num_programs * PAGES):
        page = begin + tl.arange(0, PAGES)
        inside = page < count
        src = tl.load(src_slots_ptr + page, mask=inside, other=0).to(tl.int64) - src_offset
        dst = tl.load(dst_slots_ptr + page, mask=inside, other=0).to(tl.int64) - dst_offset
        _copy_rows(src_ptr + src * WORDS, dst_ptr + dst * WORDS, inside, WORDS, MAIN, REST)


@triton.jit(
    do_not_specialize=[
        "table_stride", "to_table_stride", "pages_stride", "num_heads", "skip", "limit", "per_round", "other_slot",
        "num_programs",
    ]
)  # fmt: skip
def fetch_kernel(
    other_ptr, table_ptr, table_stride, pages_ptr, pages_stride, begins_ptr, counts_ptr, buffer_ptr, to_table_ptr,
    to_table_stride, num_heads, skip, limit, per_round, other_slot, num_programs,
    WORDS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Grid: num_programs, each PAGES entries a step, head by head; pools seen as int32. HEADS: a power of two, at least
    num_heads."""
    heads = tl.arange(0, HEADS)
    counts = tl.load(counts_ptr + heads, mask=heads < num_heads, other=0) - skip
    longest = tl.minimum(tl.max(counts, 0), limit)
    for begin in range(tl.program_id(0) * PAGES, num_heads * tl.maximum(longest, 0), num_programs * PAGES):
        entry = begin + tl.arange(0, PAGES)
        head, number = entry // longest, entry % longest
        inside = head < num_heads
        inside &= number < tl.load(counts_ptr + head, mask=inside, other=0) - skip
        wide = head.to(tl.int64)
        at = pages_ptr + wide * pages_stride + tl.load(begins_ptr + head, mask=inside, other=0) + skip + number
        page = tl.load(at, mask=inside, other=0).to(tl.int64)
        slot = tl.load(table_ptr + wide * table_stride + page, mask=inside, other=0)
        fetched = inside & (slot >= other_slot)
        src, dst = (slot - other_slot).to(tl.int64), wide * per_round + number
        _copy_rows(other_ptr + src * WORDS, buffer_ptr + dst * WORDS, fetched, WORDS, MAIN, REST)
        slot = tl.where(fetched, other_slot + dst, slot).to(tl.int32)
        tl.store(to_table_ptr + wide * to_table_stride + page, slot, mask=inside)


def row_tiles(payload_bytes: int, num_warps: int) -> dict[str, int]:
    """WORDS of a row, the largest power of two in them, and a tile for the rest: no smaller than 16 bytes a thread,
    or several warps would load the same words."""
    words = payload_bytes // 4
    main = 1 << (words.bit_length() - 1)
    return {
        "WORDS": words, "MAIN": main, "REST": max(triton.next_power_of_2(max(words - main, 1)), num_warps * 32 * 4)
    }  # fmt: skip


def _words(pool: Tensor) -> Tensor:
    """A pool of payloads as int32, or ConfigError where a payload is no multiple of 16 bytes."""
    if pool.shape[1] % ALIGNMENT or pool.shape[1] == 0:
        raise ConfigError(
            f"a payload of {pool.shape[1]} bytes has no page copy kernel: use a page_size and head_dim that make it a "
            f"multiple of {ALIGNMENT}, or the torch backend"
        )
    assert pool.dtype == torch.uint8 and pool.is_contiguous() and pool.data_ptr() % ALIGNMENT == 0
    return pool.view(torch.int32)


def _default_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return _WAVES * torch.cuda.get_device_properties(device).multi_processor_count


def copy_pages(
    src: Tensor, src_slots: Tensor, dst: Tensor, dst_slots: Tensor, *, src_offset: int = 0, dst_offset: int = 0,
    num_programs: int | None = None, pages_per_step: int = 1, num_warps: int = 4,
) -> None:  # fmt: skip
    """dst[dst_slots[i] - dst_offset] = src[src_slots[i] - src_offset] for every i.

    Args:
        src, dst: uint8 [num_slots, payload_bytes], contiguous, 16-byte aligned; on the device, or host memory that CUDA
            has pinned or registered. Not the same memory at slots that meet: pages are copied in no order.
        src_slots, dst_slots: int32 on the device, of any shape but the same number, contiguous. Slots of `dst_slots`
            must differ from one another.
        src_offset, dst_offset: number of the first slot of each pool.
        num_programs: thread blocks; None takes one a step, at most 4 a multiprocessor. Where a pool is on the host,
            the link is full with few.
        pages_per_step: payloads a program loads before it stores, a power of two; num_warps: warps a program.

    Raises:
        ConfigError: payloads that are no multiple of 16 bytes.
        ValueError: from Triton, where a pool is host memory that CUDA does not know.
    """
    assert src.shape[1] == dst.shape[1] and src_slots.numel() == dst_slots.numel()
    for slots in (src_slots, dst_slots):
        assert slots.dtype == torch.int32 and slots.is_contiguous() and slots.device == src_slots.device
    words = _words(src), _words(dst)
    count = src_slots.numel()
    if count == 0:
        return
    limit = _default_programs(src_slots.device) if num_programs is None else num_programs
    programs = min(triton.cdiv(count, pages_per_step), limit)
    copy_kernel[(programs,)](
        words[0], src_slots, words[1], dst_slots, count, src_offset, dst_offset, programs,
        **row_tiles(src.shape[1], num_warps), PAGES=pages_per_step, num_warps=num_warps,
    )  # fmt: skip


def copy_pages_reference(
    src: Tensor, src_slots: Tensor, dst: Tensor, dst_slots: Tensor, *, src_offset: int = 0, dst_offset: int = 0,
    num_programs: int | None = None, pages_per_step: int = 1, num_warps: int = 4,
) -> None:  # fmt: skip
    """`copy_pages` in torch."""
    of = src_slots.reshape(-1).to(src.device).long() - src_offset
    to = dst_slots.reshape(-1).to(dst.device).long() - dst_offset
    dst[to] = src[of].to(dst.device)


def _check_fetch(view: PageView, buffer: Tensor, table: Tensor, per_round: int) -> tuple[Tensor, Tensor]:
    check_view(view)
    assert view.other is not None and per_round >= view.limit
    assert table.dtype == torch.int32 and table.shape == view.table.shape and table.stride(1) == 1
    assert buffer.shape[0] >= view.num_heads * per_round and buffer.shape[1] == view.other.shape[1]
    assert view.other_slot + len(buffer) < 2**31
    return _words(view.other), _words(buffer)


def fetch_pages(
    view: PageView, buffer: Tensor, table: Tensor, per_round: int, *, num_programs: int = FETCH_PROGRAMS,
    pages_per_step: int = 1, num_warps: int = 4,
) -> None:  # fmt: skip
    """One round of pages of the second memory into a fetch buffer, so that `view.fetched(buffer, table)` can be read.

    For entry e of head h, page p = the listed page: where it stands in `view.other`, its payload goes to
    buffer[h * per_round + e], and table[h, p] is the slot other_slot + h * per_round + e; where it stands in
    `view.storage`, table[h, p] is the slot it has. Everything else in `buffer` and `table` stays.

    Args:
        view: `other` is host memory that CUDA has pinned or registered (or device memory), contiguous, 16-byte
            aligned; everything else is on the device. Lists, lengths and slots are read when the kernel runs, so that a
            captured CUDA graph serves every length; programs without an entry end at once.
        buffer: uint8 [at least num_heads * per_round, payload_bytes] on the device, contiguous, 16-byte aligned.
        table: int32, shape of `view.table`, on the device; another memory.
        per_round: rows of `buffer` that a head has, at least `view.limit`.
        num_programs, pages_per_step, num_warps: as in `copy_pages`.

    Raises:
        ValueError: from Triton, where `view.other` is host memory that CUDA does not know.
    """
    source, target = _check_fetch(view, buffer, table, per_round)
    most = view.num_heads * min(view.limit, max(0, view.pages.shape[1] - view.skip))
    if most == 0:
        return
    programs = min(triton.cdiv(most, pages_per_step), num_programs)
    fetch_kernel[(programs,)](
        source, view.table, view.table.stride(0), view.pages, view.pages.stride(0), view.begins, view.counts, target,
        table, table.stride(0), view.num_heads, view.skip, view.limit, per_round, view.other_slot, programs,
        **row_tiles(buffer.shape[1], num_warps), PAGES=pages_per_step, HEADS=triton.next_power_of_2(view.num_heads),
        num_warps=num_warps,
    )  # fmt: skip


def fetch_pages_reference(
    view: PageView, buffer: Tensor, table: Tensor, per_round: int, *, num_programs: int = FETCH_PROGRAMS,
    pages_per_step: int = 1, num_warps: int = 4,
) -> None:  # fmt: skip
    """`fetch_pages` in torch; waits for the device to read the lists."""
    _check_fetch(view, buffer, table, per_round)
    assert view.other is not None
    for head, (begin, count) in enumerate(zip(view.begins.tolist(), view.num_entries().tolist(), strict=True)):
        pages = view.pages[head, begin + view.skip :][:count].long()
        slots, to = view.table[head, pages].long(), torch.arange(count, device=table.device) + head * per_round
        fetched = slots >= view.other_slot
        source = view.other[(slots[fetched] - view.other_slot).to(view.other.device)]
        buffer[to[fetched]] = source.to(buffer.device)
        table[head, pages] = torch.where(fetched, to + view.other_slot, slots).int()
