"""Copies of pages between pools: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

from dataclasses import replace

import pytest
import torch
from interpreted import INTERPRETED, accesses, compiled, interpreted_tests, not_interpreted
from page_views import FEW_AND_MANY, UNREAD, listed, scattered_view

from longrun.errors import ConfigError
from longrun.kernels.page_view import PageView
from longrun.quant.kv_format import PageFormat

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.page_copy import (
    copy_kernel,
    copy_pages,
    copy_pages_reference,
    fetch_kernel,
    fetch_pages,
    fetch_pages_reference,
    row_tiles,
)
from longrun.kernels.page_dequantize import dequantize_pages

PAYLOADS = (8448, 4352)


def pools(payload, num_src, num_dst, device="cpu", dst_device=None, seed=0):
    """A pool of random bytes and a poisoned one."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(0, 256, (num_src, payload), dtype=torch.uint8, generator=g)
    return src.to(device), torch.full((num_dst, payload), 0xAA, dtype=torch.uint8, device=dst_device or device)


def scattered(count, of, device="cpu", seed=1):
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].int().to(device)


def fetch_case(fmt, counts, skip, limit, shared=False, other_slot=1000, device="cpu", seed=0):
    """A view of pages in both memories; a poisoned buffer with two rows too many; a poisoned table."""
    how = {"skip": skip, "limit": limit, "shared": shared, "other_slot": other_slot}
    view = scattered_view(fmt, counts, device=device, seed=seed, **how)
    buffer = torch.full((len(counts) * limit + 2, fmt.payload_bytes), 0xAA, dtype=torch.uint8, device=device)
    wide = torch.full((len(counts), view.table.shape[1] + 5), UNREAD, dtype=torch.int32, device=device)
    return view, buffer, wide[:, 2 : 2 + view.table.shape[1]]


def check_fetch(view, buffer, table, per_round, **how):
    expected = buffer.clone(), table.clone()
    fetch_pages_reference(view, *expected, per_round)
    by_hand = buffer.clone(), table.clone()
    for head in range(view.num_heads):
        for e, page in enumerate(listed(view, head)):
            slot = int(view.table[head, page])
            if slot >= view.other_slot:
                by_hand[0][head * per_round + e] = view.other[slot - view.other_slot].to(buffer.device)
                slot = view.other_slot + head * per_round + e
            by_hand[1][head, page] = slot
    fetch_pages(view, buffer, table, per_round, **how)
    for x, y, z in zip((buffer, table), expected, by_hand, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


# pages a head, skip, limit, one list for all heads
ROUNDS = [((3, 3, 3), 0, 4, False), ((0,), 0, 5, False), ((3, 1), 4, 4, False), ((6, 4, 9, 5, 0), 4, 4, False),
          ((20, 20, 20), 5, 3, True), ((1,), 0, 1, False)]  # fmt: skip


if INTERPRETED:

    @pytest.mark.parametrize("payload", [*PAYLOADS, 4096, 16, 16400])
    @pytest.mark.parametrize(("programs", "step"), [(None, 1), (3, 1), (2, 4)])
    def test_interpreted_copy_pages(payload, programs, step):
        src, dst = pools(payload, 31, 23)
        of, to = scattered(13, 31) + 100, scattered(13, 23, seed=2) + 7
        expected = dst.clone()
        for i, j in zip(of.tolist(), to.tolist(), strict=True):
            expected[j - 7] = src[i - 100]
        reference = dst.clone()
        copy_pages(
            src, of, dst, to.view(13, 1), src_offset=100, dst_offset=7, num_programs=programs, pages_per_step=step
        )
        copy_pages_reference(src, of, reference, to, src_offset=100, dst_offset=7)
        assert torch.equal(dst, expected) and torch.equal(reference, expected)

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(("counts", "skip", "limit", "shared"), ROUNDS)
    @pytest.mark.parametrize("other_slot", [0, 1000, 2**31 - 1000])
    def test_interpreted_fetch_pages(counts, skip, limit, shared, other_slot, head_dim):
        case = fetch_case(PageFormat("k5v3", 64, head_dim), counts, skip, limit, shared, other_slot)
        check_fetch(*case, limit, num_programs=4)
        case = fetch_case(PageFormat("k5v3", 64, head_dim), counts, skip, limit, shared, other_slot)
        check_fetch(*case, limit, num_programs=2, pages_per_step=2, num_warps=2)

    def test_interpreted_fetch_makes_the_view_readable():
        """Dequantized through the buffer, after host memory is overwritten: the same keys and values."""
        view, buffer, table = fetch_case(PageFormat("int4", 64, 64), (6, 0, 9), 1, 4)
        expected, found = torch.full((2, 2, 3, 4 * 64, 64), float("nan"))
        dequantize_pages(view, *expected)
        fetch_pages(view, buffer, table, 4)
        view.other.fill_(0xAA)
        dequantize_pages(view.fetched(buffer, table), *found)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 52


@not_interpreted
def test_payloads_that_are_not_served_are_refused():
    src, dst = pools(8440, 2, 2)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="8440 bytes"):
        copy_pages(src, slots, dst, slots)


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("pages", [1, 2])
def test_page_copies_compile_without_a_gpu(pages, payload, capability):
    """16 bytes an access, and every load of a step before its first store."""
    names = ("src", "src_slots", "dst", "dst_slots")
    names += ("other", "table", "pages", "begins", "counts", "buffer", "to_table")
    for kernel in (copy_kernel, fetch_kernel):
        constants = row_tiles(payload, 4) | {"PAGES": pages}
        if kernel is fetch_kernel:
            constants["HEADS"] = 8 if pages == 1 else 1
        pointers = {f"{name}_ptr": "*i32" for name in names if f"{name}_ptr" in kernel.arg_names}
        found = accesses(compiled(kernel, capability, pointers, constants, 4))
        wide = [kind for kind, number in found if number == 16]
        per_thread = pages * (payload // 2048 + 1)
        assert wide == ["ld"] * per_thread + ["st"] * per_thread
        small = [number for kind, number in found if kind == "st" and number != 16]
        assert small == ([4] if kernel is fetch_kernel else [])  # the slot


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("pinned", "cuda"), ("cuda", "pinned")])
def test_copy_pages_on_the_gpu(source, target, payload):
    src, dst = pools(payload, 3001, 2003)
    wanted = dst.clone()
    src, dst = (pool.pin_memory() if kind == "pinned" else pool.cuda() for pool, kind in ((src, source), (dst, target)))
    of, to = scattered(1500, 3001, "cuda") + 100, scattered(1500, 2003, "cuda", seed=2) + 7
    wanted[(to.cpu() - 7).long()] = src.cpu()[(of.cpu() - 100).long()]
    for programs, step, warps in ((None, 1, 4), (32, 1, 4), (7, 2, 2), (64, 4, 8)):
        dst.fill_(0xAA)
        copy_pages(
            src, of, dst, to, src_offset=100, dst_offset=7, num_programs=programs, pages_per_step=step, num_warps=warps
        )
        torch.cuda.synchronize()  # the host's pool is read next
        assert torch.equal(dst.cpu(), wanted)


@pytest.mark.gpu
@not_interpreted
def test_page_copies_beyond_two_gib_and_four():
    bounds = [2**31 // 8448, 2**32 // 8448]
    slots = torch.tensor([0, *(b + d for b in bounds for d in (-1, 0, 1))], dtype=torch.int32, device="cuda")
    pages, _ = pools(8448, len(slots), 1, "cuda")
    order = torch.arange(len(slots), dtype=torch.int32, device="cuda")
    pool = torch.full((bounds[1] + 2, 8448), 0xAA, dtype=torch.uint8, device="cuda")
    copy_pages(pages, order, pool, slots + 9, dst_offset=9)
    assert torch.equal(pool[slots.long()], pages) and (pool == 0xAA).all(1).sum() == len(pool) - len(slots)
    back = torch.zeros_like(pages)
    copy_pages(pool, slots + 9, back, order, src_offset=9)
    assert torch.equal(back, pages)
    back = torch.zeros_like(pages)
    zero, count = slots.new_zeros(1), slots.new_tensor([len(slots)])
    fmt = PageFormat("k5v3", 64, 128)
    index = torch.zeros(1, len(slots), 2, 128, dtype=torch.float16, device="cuda")
    view = PageView(pages, slots[None] + 9, index, order[None], zero, count, zero, fmt, 0, pool, 9, 0, len(slots))
    fetch_pages(view, back, torch.empty_like(view.table), len(slots))
    assert torch.equal(back, pages)


def pinned(view):
    return replace(view, other=view.other.cpu().pin_memory())


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("skip", "limit"), [(0, 64), (64, 64), (7, 22)])
@pytest.mark.parametrize("counts", [(64,) * 8, FEW_AND_MANY])
def test_fetch_pages_from_pinned_memory(counts, skip, limit, head_dim):
    for how in ({}, {"num_programs": 5, "pages_per_step": 4}):
        view, *room = fetch_case(PageFormat("int4", 64, head_dim), counts, skip, limit, device="cuda")
        check_fetch(pinned(view), *room, limit, **how)


@pytest.mark.gpu
@not_interpreted
def test_a_captured_fetch_follows_lists_table_and_host_pages():
    fmt = PageFormat("int4", 64, 128)
    make = lambda seed, counts: pinned(scattered_view(fmt, counts, device="cuda", seed=seed))  # noqa: E731
    view = make(0, (100,) * 8)
    rows = [torch.zeros(8 * 40, fmt.payload_bytes, dtype=torch.uint8, device="cuda") for _ in range(3)]
    tables = [torch.zeros_like(view.table) for _ in range(3)]

    def rounds(fetch):
        for i, (buffer, table) in enumerate(zip(rows, tables, strict=True)):
            fetch(view.part(40 * i, 40), buffer, table, 40)

    def poisoned_rounds(work):
        for x in (*rows, *tables):
            x.fill_(0x55)
        work()
        return [x.clone() for x in (*rows, *tables)]

    rounds(fetch_pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds(fetch_pages)
    for seed, counts in enumerate([(100,) * 8, (1, 39, 0, 40, 41, 99, 100, 80), (0,) * 8, (0, 0, 100, 0, 0, 3, 0, 0)]):
        other = make(seed, (100,) * 8)  # of the same shapes
        for to, of in ((view.table, other.table), (view.pages, other.pages), (view.begins, other.begins)):
            to.copy_(of)
        view.counts.copy_(torch.tensor(counts))
        torch.cuda.synchronize()
        view.other.copy_(other.other)  # the host writes between replays
        found = poisoned_rounds(graph.replay)
        assert all(map(torch.equal, found, poisoned_rounds(lambda: rounds(fetch_pages_reference))))


@pytest.mark.gpu
@not_interpreted
def test_host_memory_that_cuda_does_not_know_is_refused():
    src, dst = pools(8448, 4, 4, "cpu", "cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed"):
        copy_pages(src, slots, dst, slots)
