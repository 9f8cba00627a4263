"""Pinned host memory: sizes, progress, order of unregistering and unmapping, failures; without a GPU."""

import ctypes
import gc
import mmap
import threading
import time

import psutil
import pytest
import torch
from fake_pinning import PAGE, FakeRegistrar, is_mapped, resident_pages

from longrun.cache import pinned
from longrun.cache.pinned import pinned_bytes
from longrun.errors import PlanError


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
