"""Host memory that the driver has pinned: `pytest -m gpu`. Copies, kernels on host addresses, refusals, threads."""

import ctypes
import mmap
import threading
import time

import pytest
import torch
from fake_pinning import is_mapped

from longrun.cache.pinned import CannotPin, CudaRegistrar, pinned_bytes
from longrun.errors import PlanError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:

    @triton.jit
    def copy_kernel(source, target, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


pytestmark = pytest.mark.gpu


def test_torch_copies_from_and_to_pinned_memory():
    """Copies that stay within one piece; the last of the three pieces is short."""
    seen = []
    num_bytes = 2**30 + 2**28 + 8448
    begin = time.perf_counter()
    buffer = pinned_bytes(num_bytes, lambda *step: seen.append(step), piece_bytes=2**29)
    print(f"\npinned {buffer.nbytes / 2**30:.2f} GiB in {time.perf_counter() - begin:.2f} s")
    assert len(seen) == 3 and seen[-1] == (buffer.nbytes, buffer.nbytes)
    assert buffer.tensor.is_pinned()
    expected = torch.randint(0, 256, (2**28,), dtype=torch.uint8, device="cuda")
    for at in (0, 2**28, 2**29, 2**30):  # each within one piece
        buffer.tensor[at : at + 2**28].copy_(expected, non_blocking=True)
        torch.cuda.synchronize()
        back = buffer.tensor[at : at + 2**28].to("cuda", non_blocking=True)
        assert torch.equal(back, expected)
    assert torch.equal(buffer.tensor[2**30 : 2**30 + 2**28], expected.cpu())


@pytest.mark.skipif(triton is None, reason="needs triton")
@pytest.mark.parametrize("piece", [2**30, 2**26])
def test_kernels_read_and_write_host_memory_directly(piece):
    """Straight to and from the host address, also where a page straddles two pieces."""
    num_slots, payload = 160_000, 8448
    storage = pinned_bytes(num_slots * payload, piece_bytes=piece).tensor.view(num_slots, payload)
    words = storage.view(-1).view(torch.int32)
    g = torch.Generator("cuda").manual_seed(0)
    expected = torch.randint(-(2**31), 2**31 - 1, words.shape, dtype=torch.int32, device="cuda", generator=g)
    back = torch.zeros_like(expected)
    grid = (triton.cdiv(words.numel(), 4096),)
    copy_kernel[grid](expected, words, words.numel(), 4096)
    torch.cuda.synchronize()
    assert torch.equal(words, expected.cpu())
    begin = time.perf_counter()
    copy_kernel[grid](words, back, words.numel(), 4096)
    torch.cuda.synchronize()
    print(f"\nread by a kernel: {storage.nbytes / 1e9 / (time.perf_counter() - begin):.1f} GB/s")
    assert torch.equal(back, expected)


def test_a_refusal_of_the_driver_leaves_nothing_behind():
    """The driver's own text in one sentence; afterwards torch works, and the same memory can be registered again."""
    given = []

    class RefusesTheThird(CudaRegistrar):
        def register(self, address, size):
            given.append((address, size))
            super().register(given[0][0] if len(given) == 3 else address, size)

    with pytest.raises(PlanError, match=r"2\.10 MB could be .*already.*ulimit") as raised:
        pinned_bytes(2**23, None, RefusesTheThird(), piece_bytes=2**20)
    print(f"\n{raised.value}")
    assert not is_mapped(given[0][0])
    assert torch.ones(10, device="cuda").sum().item() == 10
    buffer = pinned_bytes(2**23, piece_bytes=2**20)
    assert buffer.tensor.is_pinned()
    view = buffer.tensor[:10]
    buffer.close()
    assert not view.is_pinned()
    with pytest.raises(CannotPin):
        CudaRegistrar().register(2**40 + 4096, 4096)  # nothing is mapped there
    assert torch.ones(10, device="cuda").sum().item() == 10


def test_unregistered_from_a_thread_without_cuda():
    holder = [pinned_bytes(2**20).tensor]
    address = holder[0].data_ptr()
    worker = threading.Thread(target=holder.clear)
    worker.start()
    worker.join()
    assert not is_mapped(address)
    memory = mmap.mmap(-1, 2**20)
    registrar = CudaRegistrar()
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    registrar.register(at, 2**20)  # the driver has no stale entry, also where the system gives the same address again
    registrar.unregister(at)
