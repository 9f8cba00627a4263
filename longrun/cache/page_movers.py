"""Quantizing finished pages and moving them between pools: one small interface, in torch and in GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longrun.cache.pool import PagePool
from longrun.kernels.page_digest import digest_pages_reference
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import encode_pages

# Programs of a copy from or to host memory: enough to fill PCIe, few enough to leave the multiprocessors to others.
HOST_PROGRAMS = 32


class PageMover(Protocol):
    """Quantizes, moves and fetches pages; the caller has allocated the slots."""

    def quantize(
        self, k: Tensor, v: Tensor, pool: PagePool, slots: Tensor, index: Tensor | None, first: int, fmt: PageFormat
    ) -> None:
        """Write pages [first, first + n) to `slots` (int32 [num_heads, n]) of `pool`, their key scales to `index`.

        Args:
            k, v: exact tokens, [num_heads, n, page_size, head_dim].
            index: float16 [num_heads, max_pages, 2, head_dim], or None for the exact formats.
        """
        ...

    def digest(
        self, pool: PagePool, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat
    ) -> None:
        """Write the digests of the stored pages at `slots` (int32 [num_heads, n]) of `pool`.

        Args:
            index: float16 [num_heads, n, 2, head_dim], their key scales and minima.
            out: uint8 [num_heads, n, digest_format.page_bytes].
        """
        ...

    def copy(self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor) -> None:
        """Copy payloads from pool to pool; both slots int32 of one shape on the compute device."""
        ...

    def copy_behind(
        self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor
    ) -> Callable[[], None]:
        """`copy` at the same time as what is queued from now on; the result makes the current stream wait for its end.

        Until then neither the source's pages nor the target's may be written.
        """
        ...

    def fetch(self, pool: PagePool, slots: Tensor, out: Tensor) -> None:
        """Payloads at `slots` (int32, any shape) in order to `out`, uint8 [n, payload_bytes] on the compute device."""
        ...


class TorchPageMover:
    """Plain torch, on any device."""

    def quantize(
        self, k: Tensor, v: Tensor, pool: PagePool, slots: Tensor, index: Tensor | None, first: int, fmt: PageFormat
    ) -> None:
        payload, scales = encode_pages(k, v, fmt)
        pool.write(slots, payload)
        if index is not None:
            index[:, first : first + k.shape[1]] = scales

    def digest(
        self, pool: PagePool, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat
    ) -> None:
        digest_pages_reference(pool.storage, slots, index, out, fmt, digest_format, slot_offset=pool.first_slot)

    def copy(self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor) -> None:
        target.write(target_slots, source.read(source_slots))

    def copy_behind(
        self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor
    ) -> Callable[[], None]:
        self.copy(source, source_slots, target, target_slots)
        return lambda: None

    def fetch(self, pool: PagePool, slots: Tensor, out: Tensor) -> None:
        pool.read(slots, out=out)


class KernelPageMover:
    """GPU kernels: pools on the GPU, or in host memory that the GPU reaches (`longrun.cache.pinned`).

    Args:
        store_pages, copy_pages, digest_pages: those of `kernels.page_store`, `kernels.page_copy` and
            `kernels.page_digest`, or their references.
        on_gpu: copies behind run on a stream of their own.
    """

    def __init__(
        self, store_pages: Callable[..., None], copy_pages: Callable[..., None], digest_pages: Callable[..., None],
        on_gpu: bool,
    ) -> None:  # fmt: skip
        self._store_pages, self._copy_pages, self._digest_pages = store_pages, copy_pages, digest_pages
        self._stream = torch.cuda.Stream() if on_gpu else None

    def quantize(
        self, k: Tensor, v: Tensor, pool: PagePool, slots: Tensor, index: Tensor | None, first: int, fmt: PageFormat
    ) -> None:
        count = k.shape[1]
        numbers = torch.arange(first, first + count, dtype=torch.int32, device=slots.device)
        k, v = k.flatten(1, 2), v.flatten(1, 2)
        self._store_pages(k, v, pool.storage, slots, index, numbers, fmt, slot_offset=pool.first_slot)

    def digest(
        self, pool: PagePool, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat
    ) -> None:
        self._digest_pages(pool.storage, slots, index, out, fmt, digest_format, slot_offset=pool.first_slot)

    def copy(self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor) -> None:
        self._copy_pages(
            source.storage, source_slots.contiguous(), target.storage, target_slots.contiguous(),
            src_offset=source.first_slot, dst_offset=target.first_slot, num_programs=HOST_PROGRAMS,
        )  # fmt: skip

    def copy_behind(
        self, source: PagePool, source_slots: Tensor, target: PagePool, target_slots: Tensor
    ) -> Callable[[], None]:
        stream = self._stream
        if stream is None:
            self.copy(source, source_slots, target, target_slots)
            return lambda: None
        slots = source_slots.contiguous(), target_slots.contiguous()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.copy(source, slots[0], target, slots[1])
        for used in slots:
            used.record_stream(stream)
        return lambda: torch.cuda.current_stream().wait_stream(stream)

    def fetch(self, pool: PagePool, slots: Tensor, out: Tensor) -> None:
        to = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device).view(slots.shape)
        self._copy_pages(
            pool.storage, slots.contiguous(), out, to, src_offset=pool.first_slot, num_programs=HOST_PROGRAMS
        )
