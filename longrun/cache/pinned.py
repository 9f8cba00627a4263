"""Host memory for page payloads that the GPU reads and writes directly: page-locked, and mapped for the GPU.

The sizes are exact (torch's own pinned allocator rounds up to a power of two, which 100 GiB cannot afford), nothing is
left half done on failure, and the slow part, touching every page for the first time, is done by several threads while
the driver registers what has been touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from longrun.errors import PlanError
from longrun.machine.host_memory import available_bytes
from longrun.units import format_bytes

PIECE_BYTES = 2**30  # registered at once, and the step of the progress
_TOUCH_BYTES = 2**26  # touched at once by one thread
_MOST_THREADS = 16
_REMEDY = "lower host in the budget's [memory] section, or the context (ctx)"


class CannotPin(Exception):
    """The driver refuses to register a piece of memory; the message is the driver's own."""


class Registrar(Protocol):
    """Page-locks memory for the GPU."""

    def register(self, address: int, size: int) -> None:
        """Page-lock [address, address + size) and map it for the GPU at the same address; raise CannotPin if not."""

    def unregister(self, address: int) -> None:
        """Undo `register` of the piece that starts at `address`, once the GPU has finished its work; never raises."""


class CudaRegistrar:
    """The driver's cuMemHostRegister, in the context that torch uses.

    The driver is called directly: after a failed cudaHostRegister the runtime library reports the same error once
    more, at torch's next kernel launch.

    Raises:
        CannotPin: there is no CUDA driver to ask.
    """

    _PORTABLE_AND_MAPPED = 0x01 | 0x02  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP

    def __init__(self) -> None:
        torch.cuda.init()
        torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CannotPin(f"libcuda.so.1 cannot be loaded: {error}") from error
        self._context = ctypes.c_void_p()
        self._check(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))

    def register(self, address: int, size: int) -> None:
        with self._current_context():
            self._check(
                self._driver.cuMemHostRegister_v2(
                    ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(self._PORTABLE_AND_MAPPED)
                )
            )
            seen = ctypes.c_uint64()
            status = self._driver.cuMemHostGetDevicePointer_v2(
                ctypes.byref(seen), ctypes.c_void_p(address), ctypes.c_uint(0)
            )
        if status or seen.value != address:
            self.unregister(address)
            self._check(status)
            raise CannotPin("this GPU sees host memory at another address than the CPU, which is not supported")

    def unregister(self, address: int) -> None:
        with self._current_context():
            self._driver.cuCtxSynchronize()
            self._driver.cuMemHostUnregister(ctypes.c_void_p(address))

    @contextlib.contextmanager
    def _current_context(self) -> Iterator[None]:
        """A finalizer may run in a thread that has never used CUDA."""
        self._driver.cuCtxPushCurrent_v2(self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise CannotPin((text.value or f"CUDA error {status}".encode()).decode())


class PinnedBuffer:
    """Page-locked memory. Made by `pinned_bytes`.

    The memory is unregistered and returned to the system when the last tensor over it is gone, so `tensor` and its
    views may outlive this object; the GPU's work is waited for first.

    Attributes:
        tensor: uint8 [num_bytes] on the CPU, zeros at first. Kernels take its `data_ptr()` as it is.
        nbytes: bytes that are pinned: num_bytes, rounded up to whole pages of the system (4 KiB).
    """

    def __init__(self, tensor: Tensor, nbytes: int, unregister: Callable[[], None]) -> None:
        self.tensor, self.nbytes, self._unregister = tensor, nbytes, unregister

    def close(self) -> None:
        """Unregister now. `tensor` is empty from then on; views of it that are alive stay readable by the CPU."""
        self._unregister()
        self.tensor, self.nbytes = torch.empty(0, dtype=torch.uint8), 0


def pinned_bytes(
    num_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
    registrar: Registrar | None = None,
    piece_bytes: int = PIECE_BYTES,
    huge_pages: bool = True,
) -> PinnedBuffer:
    """Page-locked host memory of `num_bytes` (rounded up to whole pages), touched, zeroed and mapped for the GPU.

    Kernels may read and write it anywhere. A single cudaMemcpy should not cross from one piece into the next: pieces
    are registered apart from each other.

    Args:
        num_bytes: bytes; 0 gives an empty tensor.
        on_progress: called with (bytes pinned, bytes asked for) after every piece.
        registrar: default `CudaRegistrar`.
        piece_bytes: bytes registered at once, a multiple of the system's page.
        huge_pages: ask the system for pages of 2 MiB where it can, so that CPU and GPU have fewer addresses to
            translate; `scripts/bench/bench_pinning.py` measures both ways.

    Raises:
        PlanError: more than is available, or the system or the driver refuses; everything has been given back.
    """
    assert num_bytes >= 0 and piece_bytes > 0 and piece_bytes % mmap.PAGESIZE == 0
    if num_bytes == 0:
        return PinnedBuffer(torch.empty(0, dtype=torch.uint8), 0, lambda: None)
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    available = available_bytes()
    if size > available:
        raise PlanError(
            f"{format_bytes(size)} of host memory are to be pinned for pages and {format_bytes(available)} are "
            f"available: {_REMEDY}, or free memory"
        )
    try:
        registrar = CudaRegistrar() if registrar is None else registrar
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (CannotPin, OSError) as error:
        raise _refused(size, 0, error) from error
    # A fork would copy what is pinned. Not every kernel knows these.
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE"):
        with contextlib.suppress(AttributeError, OSError):
            mapping.madvise(getattr(mmap, advice))
    # The array, not the mmap object, is what the tensor keeps alive: an mmap object unmaps before its finalizers run.
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    memory = (ctypes.c_char * num_bytes).from_address(address)
    registered: list[int] = []
    release = weakref.finalize(memory, _release, mapping, registrar, registered)
    release.atexit = False  # a process that ends gives everything back, while tensors may still be in use
    try:
        _pin(address, size, piece_bytes, registrar, registered, on_progress)
    except BaseException as error:
        done = min(size, len(registered) * piece_bytes)
        release()
        if isinstance(error, CannotPin):
            raise _refused(size, done, error) from error
        raise
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return PinnedBuffer(tensor, size, lambda: _unregister_all(registrar, registered))


def _pin(
    address: int, size: int, piece_bytes: int, registrar: Registrar, registered: list[int],
    on_progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Touch and register piece by piece; threads touch the next piece while one is registered."""
    workers = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    begins = range(0, size, piece_bytes)

    def touch(begin: int) -> list[Future[int]]:
        end = min(begin + piece_bytes, size)
        # ctypes lets go of the interpreter lock
        return [
            threads.submit(ctypes.memset, address + at, 0, min(_TOUCH_BYTES, end - at))
            for at in range(begin, end, _TOUCH_BYTES)
        ]

    # Leaving the block waits for what is being touched: nothing may be unmapped while a thread uses it.
    with ThreadPoolExecutor(workers, "pinning") as threads:
        try:
            touching = touch(0)
            for begin in begins:
                for slice_touched in touching:
                    slice_touched.result()
                end = min(begin + piece_bytes, size)
                touching = touch(end) if end < size else []
                registrar.register(address + begin, end - begin)
                registered.append(address + begin)
                if on_progress is not None:
                    on_progress(end, size)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _unregister_all(registrar: Registrar, registered: list[int]) -> None:
    while registered:
        registrar.unregister(registered.pop())


def _release(mapping: mmap.mmap, registrar: Registrar, registered: list[int]) -> None:
    _unregister_all(registrar, registered)
    mapping.close()


def _refused(size: int, done: int, error: Exception) -> PlanError:
    reason = " ".join(str(error).split()).rstrip(".")
    return PlanError(
        f"{format_bytes(size)} of host memory were to be pinned for pages, and only {format_bytes(done)} could be "
        f"({reason}): {_REMEDY}, or raise the limits on locked memory (`ulimit -l`) and on the container's memory"
    )
