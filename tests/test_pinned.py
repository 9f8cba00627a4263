"""Pinned host memory: sizes, progress, order of unregistering and unmapping, failures; on a GPU, the real thing."""

import ctypes
import gc
import mmap
import threading
import time

import psutil
import pytest
import torch

from longrun.cache import host_memory, pinned
from longrun.cache.pinned import CannotPin, CudaRegistrar, PinnedBuffer, pinned_bytes
from longrun.cache.pinned_pool import PinnedMemory
from longrun.cache.pool import PagePool
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


PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")


def is_mapped(address):
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return any(begin <= address < end for begin, end in ranges)


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


def resident_pages(address, size):
    """Pages of the range that stand in memory (mincore)."""
    found = (ctypes.c_ubyte * (size // PAGE))()
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
    return sum(byte & 1 for byte in found)


@pytest.mark.parametrize(
    ("num_bytes", "pinned_size", "pieces"),
    [
        (1, PAGE, [PAGE]),
        (PAGE, PAGE, [PAGE]),
        (PAGE + 1, 2 * PAGE, [2 * PAGE]),
        (8448 * 5, 11 * PAGE, [4 * PAGE, 4 * PAGE, 3 * PAGE]),
        (8 * PAGE, 8 * PAGE, [4 * PAGE, 4 * PAGE]),
    ],
)
def test_size_pieces_and_progress(num_bytes, pinned_size, pieces):
    registrar, seen = FakeRegistrar(), []
    buffer = pinned_bytes(num_bytes, lambda *step: seen.append(step), registrar, piece_bytes=4 * PAGE)
    assert buffer.tensor.shape == (num_bytes,) and buffer.tensor.dtype == torch.uint8
    assert buffer.nbytes == pinned_size == sum(registrar.alive.values())
    assert [size for _, size in registrar.log] == pieces
    first = buffer.tensor.data_ptr()
    assert [address for address, _ in registrar.log] == [first + i * 4 * PAGE for i in range(len(pieces))]
    assert seen == [(min((i + 1) * 4 * PAGE, pinned_size), pinned_size) for i in range(len(pieces))]
    assert resident_pages(first, pinned_size) == pinned_size // PAGE
    assert not buffer.tensor.any()
    buffer.tensor.fill_(7)
    assert buffer.tensor.sum() == 7 * num_bytes


def test_a_piece_is_registered_once_all_its_slices_are_touched(monkeypatch):
    """Threads that are slow to touch; without huge pages, which make more resident than was touched."""
    memset, threads = ctypes.memset, set()

    def slow(*args):
        time.sleep(0.01)
        threads.add(threading.current_thread())
        return memset(*args)

    monkeypatch.setattr(pinned.ctypes, "memset", slow)
    monkeypatch.setattr(pinned.os, "sched_getaffinity", lambda pid: range(3))
    monkeypatch.setattr(pinned, "_TOUCH_BYTES", 3 * PAGE)
    registrar = FakeRegistrar()
    buffer = pinned_bytes(100 * PAGE, None, registrar, piece_bytes=20 * PAGE, huge_pages=False)
    assert len(registrar.log) == 5 and len(threads) == 3
    assert threading.main_thread() not in threads
    assert not buffer.tensor.any()


def test_nothing_is_asked_for():
    registrar = FakeRegistrar()
    buffer = pinned_bytes(0, None, registrar)
    assert buffer.tensor.shape == (0,) and buffer.nbytes == 0
    buffer.close()
    assert registrar.log == []


@pytest.mark.parametrize("piece", [PAGE, 4 * PAGE])
def test_memory_goes_with_the_last_tensor(piece):
    registrar = FakeRegistrar()
    buffer = pinned_bytes(10 * PAGE, None, registrar, piece_bytes=piece)
    view = buffer.tensor.view(10, PAGE)[3:]
    address = buffer.tensor.data_ptr()
    del buffer
    gc.collect()
    assert registrar.alive and is_mapped(address)
    view.fill_(1)
    del view
    assert not registrar.alive
    assert not is_mapped(address)


def test_close_unregisters_at_once_and_only_once():
    registrar = FakeRegistrar()
    buffer = pinned_bytes(10 * PAGE, None, registrar, piece_bytes=4 * PAGE)
    view, address = buffer.tensor[5:], buffer.tensor.data_ptr()
    buffer.close()
    assert not registrar.alive
    assert buffer.tensor.numel() == 0 and buffer.nbytes == 0
    assert is_mapped(address) and not view.any()  # a view that somebody kept must not crash the process
    buffer.close()
    del view
    assert not is_mapped(address)


def test_a_cycle_collected_in_another_thread_gives_the_memory_back():
    registrar = FakeRegistrar()
    holder = {"buffer": pinned_bytes(PAGE, None, registrar)}
    holder["self"] = holder
    del holder
    worker = threading.Thread(target=gc.collect)
    worker.start()
    worker.join()
    assert not registrar.alive
    assert registrar.threads <= {worker, threading.main_thread()}


def test_a_piece_that_cannot_be_registered_gives_everything_back():
    registrar, seen = FakeRegistrar(limit=10 * 10**6), []
    before = psutil.Process().memory_info().rss
    with pytest.raises(PlanError) as raised:
        pinned_bytes(64 * 2**20, lambda *step: seen.append(step), registrar, piece_bytes=2**20)
    assert len(registrar.log) == 9 and registrar.alive == {}
    assert seen[-1] == (9 * 2**20, 64 * 2**20)
    address = registrar.log[0][0]
    assert not is_mapped(address)
    assert psutil.Process().memory_info().rss < before + 32 * 2**20
    text = str(raised.value)
    assert "\n" not in text
    for part in ("67.1 MB", "only 9.44 MB", "(out of memory)", "host", "[memory]", "ctx", "ulimit -l", "container"):
        assert part in text


def test_the_first_piece_fails():
    registrar = FakeRegistrar(limit=0)
    with pytest.raises(PlanError, match="only 0 B could be"):
        pinned_bytes(PAGE, None, registrar)


def test_an_interrupt_gives_everything_back():
    registrar = FakeRegistrar()

    def interrupt(done, total):
        if done == 8 * PAGE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pinned_bytes(100 * PAGE, interrupt, registrar, piece_bytes=4 * PAGE)
    assert len(registrar.log) == 2 and registrar.alive == {}
    assert not is_mapped(registrar.log[0][0])


def test_a_mapping_that_the_system_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(PlanError, match=r"only 0 B could be \(\[Errno 12\] Cannot allocate memory\)"):
        pinned_bytes(PAGE, None, FakeRegistrar())


def test_more_than_is_available_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 10**9})())
    registrar, started = FakeRegistrar(), time.perf_counter()
    with pytest.raises(PlanError, match=r"107 GB of host memory .* 1\.00 GB are available: lower host"):
        pinned_bytes(100 * 2**30, None, registrar)
    assert registrar.log == [] and time.perf_counter() - started < 1


STAT = "anon 5\ninactive_file 300\nactive_file 200\ntotal_inactive_file 300\ntotal_active_file 200\n"


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/a/b\n", "a", ("memory.max", "memory.current")),
        ("4:cpu,memory:/a/b\n0::/\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/host/path/not/mounted/here\n", "", ("memory.max", "memory.current")),
    ],
)
def test_a_container_leaves_its_limit_less_its_usage(tmp_path, monkeypatch, own, folder, names):
    """The group above the own one counts too; file cache gives way; a group without a limit says `max`."""
    (tmp_path / "own").write_text(own)
    group = tmp_path / "mount" / folder
    (group / "b").mkdir(parents=True)
    for place, limit in ((group, "10000"), (group / "b", "max")):
        (place / names[0]).write_text(limit + "\n")
        (place / names[1]).write_text("1500\n")
        (place / "memory.stat").write_text(STAT)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "mount")
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory.available_bytes() == 10000 - (1500 - 500)
    (group / names[0]).write_text("900")
    assert host_memory.available_bytes() == 0
    (group / names[0]).write_text("max")
    assert host_memory.available_bytes() > 10**6


def test_without_cgroups_psutil_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 12345})())
    assert host_memory.available_bytes() == 12345


def test_a_pool_works_in_storage_from_outside():
    registrar = FakeRegistrar()
    storage = pinned_bytes(6 * 8448, None, registrar).tensor.view(6, 8448)
    pool, plain = PagePool(6, 8448, CPU, 10, storage=storage), PagePool(6, 8448, CPU, 10)
    assert pool.storage.data_ptr() == storage.data_ptr()
    assert (pool.num_slots, pool.num_free, pool.nbytes, pool.free_list_bytes) == (
        plain.num_slots, plain.num_free, plain.nbytes, plain.free_list_bytes,
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


class FakeDriver:
    """libcuda's part that is used: one context, device pointers `shift` away from the host's."""

    def __init__(self, status=0, shift=0):
        self.status, self.shift, self.calls, self.depth = status, shift, [], 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = 0xC0
        return 0

    def cuCtxPushCurrent_v2(self, context):
        assert context.value == 0xC0
        self.depth += 1

    def cuCtxPopCurrent_v2(self, context):
        self.depth -= 1

    def cuMemHostRegister_v2(self, address, size, flags):
        assert self.depth == 1
        self.calls.append(("register", address.value, size.value, flags.value))
        return self.status

    def cuMemHostGetDevicePointer_v2(self, pointer, address, flags):
        assert self.depth == 1
        pointer._obj.value = address.value + self.shift
        return 0

    def cuCtxSynchronize(self):
        assert self.depth == 1
        self.calls.append(("synchronize",))

    def cuMemHostUnregister(self, address):
        assert self.depth == 1
        self.calls.append(("unregister", address.value))

    def cuGetErrorString(self, status, text):
        text._obj.value = {2: b"out of memory"}.get(status)


@pytest.fixture
def driver(monkeypatch):
    """Makes a registrar of a fake driver."""
    fake = FakeDriver()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("S", (), {"synchronize": lambda self: None})())
    monkeypatch.setattr(pinned.ctypes, "CDLL", lambda name: fake)
    return fake


def test_the_driver_is_asked_in_torchs_context(driver):
    registrar = CudaRegistrar()
    buffer = pinned_bytes(3 * PAGE, None, registrar, piece_bytes=2 * PAGE)
    at = buffer.tensor.data_ptr()
    assert driver.calls == [("register", at, 2 * PAGE, 3), ("register", at + 2 * PAGE, PAGE, 3)]
    del driver.calls[:]
    buffer.close()
    assert driver.calls == [("synchronize",), ("unregister", at + 2 * PAGE), ("synchronize",), ("unregister", at)]
    assert driver.depth == 0


def test_what_the_driver_says_of_a_failure(driver):
    driver.status = 2
    with pytest.raises(PlanError, match=r"only 0 B could be \(out of memory\)"):
        pinned_bytes(PAGE)
    driver.status = 999
    with pytest.raises(PlanError, match=r"\(CUDA error 999\)"):
        pinned_bytes(PAGE)
    assert [call[0] for call in driver.calls] == ["register", "register"] and driver.depth == 0


def test_another_address_on_the_gpu_is_refused(driver):
    driver.shift = 4096
    with pytest.raises(PlanError, match="another address than the CPU"):
        pinned_bytes(PAGE)
    assert [call[0] for call in driver.calls] == ["register", "synchronize", "unregister"] and driver.depth == 0


def test_without_a_driver(monkeypatch, driver):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pinned.ctypes, "CDLL", missing)
    with pytest.raises(PlanError, match=r"libcuda\.so\.1"):
        pinned_bytes(PAGE)


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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
