"""What stands in pinned host memory: a pool of pages, and sessions one after another."""

import pytest
import torch
from fake_pinning import FakeRegistrar

from longrun.cache.pinned import PinnedBuffer, pinned_bytes
from longrun.cache.pinned_pool import PinnedMemory
from longrun.cache.pool import PagePool

CPU = torch.device("cpu")


def test_a_pool_works_in_storage_from_outside():
    registrar = FakeRegistrar()
    storage = pinned_bytes(6 * 8448, None, registrar).tensor.view(6, 8448)
    pool, plain = PagePool(6, 8448, CPU, 10, storage=storage), PagePool(6, 8448, CPU, 10)
    assert pool.storage.data_ptr() == storage.data_ptr()
    assert (pool.num_slots, pool.num_used, pool.nbytes, pool.free_list_bytes) == (
        plain.num_slots, plain.num_used, plain.nbytes, plain.free_list_bytes,
    )  # fmt: skip
    del storage
    payload = torch.randint(0, 256, (2, 2, 8448), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for each in (pool, plain):
        slots = each.allocate(4).view(2, 2)
        each.write(slots, payload)
        assert torch.equal(each.read(slots), payload)
        each.check(slots)
    assert torch.equal(pool.storage, plain.storage)
    assert registrar.alive
    del pool, each
    assert not registrar.alive


@pytest.mark.parametrize(
    "storage", [torch.empty(6, 100, dtype=torch.uint8), torch.empty(5, 99, dtype=torch.uint8), torch.empty(6, 99)]
)
def test_a_pool_refuses_storage_of_another_shape(storage):
    with pytest.raises(AssertionError):
        PagePool(6, 99, CPU, storage=storage)


@pytest.mark.gpu
def test_a_pool_in_pinned_memory_takes_and_gives_device_payloads():
    storage = pinned_bytes(64 * 8448).tensor.view(64, 8448)
    pool = PagePool(64, 8448, CPU, 100, storage=storage)
    payload = torch.randint(0, 256, (4, 8, 8448), dtype=torch.uint8, device="cuda")
    slots = pool.allocate(32).view(4, 8)
    pool.write(slots.cuda(), payload)
    out = torch.empty(32, 8448, dtype=torch.uint8, device="cuda")
    assert torch.equal(pool.read(slots.cuda(), out=out), payload)
    assert torch.equal(pool.read(slots), payload.cpu())
    pool.check(slots)


class Owner:
    pass


def test_pinned_memory_is_kept_for_the_next_session():
    asked = []

    def pin(num_bytes, on_progress):
        asked.append(num_bytes)
        return PinnedBuffer(torch.zeros(num_bytes, dtype=torch.uint8), num_bytes, lambda: None)

    memory, first = PinnedMemory(pin=pin), Owner()
    address = memory.take(1000, first).data_ptr()
    second = Owner()
    assert memory.take(400, second).data_ptr() != address  # the first owner is alive
    del first, second
    third = Owner()
    taken = memory.take(300, third)
    assert len(taken) == 300 and asked == [1000, 400]
    del third
    fourth = Owner()
    assert len(memory.take(500, fourth)) == 500 and asked == [1000, 400, 500]
