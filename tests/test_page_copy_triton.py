"""Copies of pages between pools: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

import pytest
import torch
from interpreted import INTERPRETED, accesses, compiled, interpreted_tests, not_interpreted

from longrun.errors import ConfigError

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

PAYLOADS = (8448, 4352)


def pools(payload, num_src, num_dst, device="cpu", dst_device=None, seed=0):
    """A pool of random bytes and a poisoned one."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(0, 256, (num_src, payload), dtype=torch.uint8, generator=g)
    return src.to(device), torch.full((num_dst, payload), 0xAA, dtype=torch.uint8, device=dst_device or device)


def scattered(count, of, device="cpu", seed=1):
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].int().to(device)


def check_fetch(storage, heads, per_round, first, limit, device="cpu", slot_offset=1000, **how):
    max_pages = first + per_round + 3
    wide = torch.full((heads, max_pages + 5), -1, dtype=torch.int32, device=device)
    table = wide[:, 2 : 2 + max_pages]
    if limit:
        slots = scattered(heads * limit, len(storage), device).view(heads, limit) + slot_offset
        table[:, :limit] = slots
    lengths = torch.tensor([7, limit, 9], dtype=torch.int32, device=device)
    buffer = torch.full((heads * per_round + 2, storage.shape[1]), 0xAA, dtype=torch.uint8, device=device)
    expected = buffer.clone()
    fetch_pages(storage, table, lengths[1:2], buffer, first, per_round, slot_offset=slot_offset, **how)
    fetch_pages_reference(storage, table, lengths[1:2], expected, first, per_round, slot_offset=slot_offset)
    assert torch.equal(buffer, expected)
    for head in range(heads):  # by hand
        for i in range(per_round):
            row = buffer[head * per_round + i].cpu()
            page = first + i
            assert torch.equal(
                row, storage[int(table[head, page]) - slot_offset].cpu() if page < limit else row * 0 + 0xAA
            )


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

    @pytest.mark.parametrize("payload", PAYLOADS)
    @pytest.mark.parametrize(
        ("heads", "per_round", "first", "limit"),
        [(3, 4, 0, 3), (1, 5, 0, 0), (2, 4, 4, 3), (2, 4, 4, 6), (3, 3, 5, 99), (1, 1, 0, 1)],
    )
    def test_interpreted_fetch_pages(heads, per_round, first, limit, payload):
        limit = min(limit, first + per_round + 1)
        storage, _ = pools(payload, 41, 1)
        check_fetch(storage, heads, per_round, first, limit, num_programs=4)
        check_fetch(storage, heads, per_round, first, limit, num_programs=2, pages_per_step=2, num_warps=2)


@not_interpreted
def test_kernels_through_the_interpreter():
    assert interpreted_tests(__file__) >= 27


@not_interpreted
def test_payloads_that_are_not_served_are_refused():
    src, dst = pools(8440, 2, 2)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="8440 bytes"):
        copy_pages(src, slots, dst, slots)
    with pytest.raises(ConfigError, match="8440 bytes"):
        fetch_pages(src, slots[None], slots, dst, 0, 1)


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("pages", [1, 2])
def test_page_copies_compile_without_a_gpu(pages, payload, capability):
    """16 bytes an access, and every load of a step before its first store."""
    names = ("src", "src_slots", "dst", "dst_slots", "storage", "table", "limit", "buffer")
    for kernel in (copy_kernel, fetch_kernel):
        constants = row_tiles(payload, 4) | {"PAGES": pages}
        pointers = {f"{name}_ptr": "*i32" for name in names if f"{name}_ptr" in kernel.arg_names}
        found = accesses(compiled(kernel, capability, pointers, constants, 4))
        wide = [kind for kind, number in found if number == 16]
        per_thread = pages * (payload // 2048 + 1)
        assert wide == ["ld"] * per_thread + ["st"] * per_thread
        assert {number for kind, number in found if kind == "st"} == {16}


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
    limit = torch.tensor([len(slots)], dtype=torch.int32, device="cuda")
    fetch_pages(pool, slots[None] + 9, limit, back, 0, len(slots), slot_offset=9)
    assert torch.equal(back, pages)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(("per_round", "first", "limit"), [(64, 0, 64), (64, 64, 100), (64, 128, 100), (33, 7, 22)])
def test_fetch_pages_from_pinned_memory(per_round, first, limit, payload):
    storage, _ = pools(payload, 1024, 1)
    check_fetch(storage.pin_memory(), 8, per_round, first, limit, "cuda")
    check_fetch(storage.pin_memory(), 8, per_round, first, limit, "cuda", num_programs=5, pages_per_step=4)


@pytest.mark.gpu
@not_interpreted
def test_a_captured_fetch_follows_limit_table_and_host_pages():
    storage = pools(8448, 900, 1)[0].pin_memory()
    table = scattered(800, 900, "cuda").view(8, 100)
    limit = torch.ones(1, dtype=torch.int32, device="cuda")
    buffers = [torch.zeros(8 * 40, 8448, dtype=torch.uint8, device="cuda") for _ in range(3)]

    def rounds(fetch):
        for i, buffer in enumerate(buffers):
            fetch(storage, table, limit, buffer, 40 * i, 40)

    rounds(fetch_pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds(fetch_pages)
    for step, number in enumerate((1, 39, 0, 40, 41, 99, 100)):
        limit.fill_(number)
        table.copy_(scattered(800, 900, "cuda", seed=step).view(8, 100))
        torch.cuda.synchronize()
        storage[step * 100 : step * 100 + 50] ^= 0x5A  # the host writes between replays
        for buffer in buffers:
            buffer.fill_(0xAA)
        graph.replay()
        found = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.fill_(0xAA)
        rounds(fetch_pages_reference)
        assert all(torch.equal(x, y) for x, y in zip(found, buffers, strict=True))


@pytest.mark.gpu
@not_interpreted
def test_host_memory_that_cuda_does_not_know_is_refused():
    src, dst = pools(8448, 4, 4, "cpu", "cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed"):
        copy_pages(src, slots, dst, slots)
