"""The retrieval heads' cache of one layer: exact sink page, pooled pages behind a page table, exact tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.cache.page_movers import PageMover, TorchPageMover
from longrun.cache.pool import PagePool
from longrun.kernels.page_view import ExactRun, PageRun
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import exact_dtype


@dataclass(frozen=True)
class _Leaving:
    """Pages up to `end` on their way to host `slots`, int32 [num_heads, n]; `wait` orders the current stream."""

    end: int
    slots: Tensor
    wait: Callable[[], None]


class PagedHeads:
    """Pages of the `num_heads` retrieval heads of one layer.

    Every head holds the same positions. Page p of a head is pooled page p - fmt.sink_pages: where pages are quantized,
    the first one is the sink page and stays exact. The unfinished last page is the tail, exact as well; it is flushed
    when the next token needs its room. The newest `device_quota` pooled pages of each head stand in the device pool,
    older ones in the host pool, so pooled pages [0, num_on_host) are on the host.

    Attributes:
        table: int32 [num_heads, max_pages], slot of each pooled page.
        index: float16 [num_heads, max_pages, 2, head_dim] (INT4 only): key scales and minima, never offloaded.
        tail_k, tail_v, sink_k, sink_v: [num_heads, page_size, head_dim].
    """

    def __init__(
        self, num_heads: int, max_pages: int, device_quota: int, fmt: PageFormat,
        device_pool: PagePool, host_pool: PagePool, device: torch.device, mover: PageMover | None = None,
    ) -> None:  # fmt: skip
        self.fmt, self.device_pool, self.host_pool, self.device_quota = fmt, device_pool, host_pool, device_quota
        self.mover = mover or TorchPageMover()
        shape, dtype = (num_heads, fmt.page_size, fmt.head_dim), exact_dtype(fmt)
        self.table = torch.full((num_heads, max_pages), -1, dtype=torch.int32, device=device)
        self.index = None
        if fmt.quantized:
            self.index = torch.zeros(num_heads, max_pages, 2, fmt.head_dim, dtype=torch.float16, device=device)
        self.tail_k = torch.zeros(shape, dtype=dtype, device=device)
        self.tail_v = torch.zeros_like(self.tail_k)
        self.sink_k = torch.zeros(shape if fmt.sink_pages else (num_heads, 0, fmt.head_dim), dtype=dtype, device=device)
        self.sink_v = torch.zeros_like(self.sink_k)
        self.num_pooled = 0
        self.num_on_host = 0
        self._leaving: _Leaving | None = None

    @property
    def num_heads(self) -> int:
        return self.table.shape[0]

    def nbytes(self) -> dict[str, int]:
        return {
            "page index (key scales)": 0 if self.index is None else self.index.nbytes,
            "sink pages": self.sink_k.nbytes + self.sink_v.nbytes,
            "tails": self.tail_k.nbytes + self.tail_v.nbytes,
            "page tables": self.table.nbytes,
        }

    def tail_len(self, seq_len: int) -> int:
        return seq_len - self.fmt.closed_pages(seq_len) * self.fmt.page_size

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Append tokens [start, start + T): k, v [num_heads, T, head_dim]; full pages are quantized and stored."""
        stop = start + k.shape[1]
        size, closed, tail = self.fmt.page_size, self.fmt.closed_pages(start), self.tail_len(start)
        num_new = self.fmt.closed_pages(stop) - closed
        if num_new == 0:
            self.tail_k[:, tail : tail + k.shape[1]], self.tail_v[:, tail : tail + k.shape[1]] = k, v
            return
        k = torch.cat((self.tail_k[:, :tail], k.to(self.tail_k.dtype)), dim=1)
        v = torch.cat((self.tail_v[:, :tail], v.to(self.tail_v.dtype)), dim=1)
        full, rest = num_new * size, k.shape[1] - num_new * size
        self.tail_k[:, :rest], self.tail_v[:, :rest] = k[:, full:], v[:, full:]
        pages = (self.num_heads, num_new, size, k.shape[2])
        k, v = k[:, :full].view(pages), v[:, :full].view(pages)
        if closed == 0 and self.fmt.sink_pages:
            self.sink_k.copy_(k[:, 0])
            self.sink_v.copy_(v[:, 0])
            k, v = k[:, 1:], v[:, 1:]
        if k.shape[1]:
            self._quantize(k, v)

    def make_room(self, start: int) -> None:
        """Flush a full tail, so that the token at `start` can be written into it in place (decode on a GPU)."""
        if self.tail_len(start) < self.fmt.page_size:
            return
        if self.fmt.sink_pages and self.fmt.closed_pages(start) == 0:
            self.sink_k.copy_(self.tail_k)
            self.sink_v.copy_(self.tail_v)
        else:
            self._quantize(self.tail_k[:, None], self.tail_v[:, None])

    def _quantize(self, k: Tensor, v: Tensor) -> None:
        """Append finished pages from exact tokens: k, v [num_heads, n, page_size, head_dim]."""
        first = self.num_pooled
        for pool, slots, begin, end in self._place(k.shape[1]):
            part = slice(begin - first, end - first)
            self.mover.quantize(k[:, part], v[:, part], pool, slots, self.index, begin, self.fmt)

    def store(self, payload: Tensor, index: Tensor | None) -> None:
        """Append finished pages: uint8 [num_heads, n, payload_bytes], float16 [num_heads, n, 2, head_dim] or None.
        Older pages spill to the host pool as the device quota demands."""
        first, total = self.num_pooled, self.num_pooled + payload.shape[1]
        for pool, slots, begin, end in self._place(payload.shape[1]):
            pool.write(slots, payload[:, begin - first : end - first])
        if self.index is not None:
            assert index is not None
            self.index[:, first:total] = index

    def _place(self, count: int) -> list[tuple[PagePool, Tensor, int, int]]:
        """Slots for the next `count` pages of every head, entered in the table; older pages have been spilled.

        Returns:
            (pool, int32 [num_heads, n] slots on the table's device, first page, end) of each part to be written.
        """
        first, total = self.num_pooled, self.num_pooled + count
        on_host = max(self.num_on_host, total - self.device_quota)
        self._spill(self.num_on_host, min(on_host, first))
        direct = max(0, on_host - first)  # a chunk larger than the quota: its own oldest pages go straight to host
        parts = []
        for pool, begin, end in ((self.host_pool, first, first + direct), (self.device_pool, first + direct, total)):
            if begin < end:
                slots = pool.allocate(self.num_heads * (end - begin)).view(self.num_heads, -1).to(self.table.device)
                self.table[:, begin:end] = slots
                parts.append((pool, slots, begin, end))
        self.num_pooled, self.num_on_host = total, on_host
        return parts

    def begin_spill(self, seq_len: int) -> None:
        """Start copying the pages that will leave for the host pool by the time `seq_len` tokens are appended; until
        the append they are read where they were."""
        assert self._leaving is None
        end = min(self.fmt.pooled_pages(seq_len) - self.device_quota, self.num_pooled)
        if end <= self.num_on_host:
            return
        old = self.table[:, self.num_on_host : end]
        new = self.host_pool.allocate(old.numel()).view(old.shape).to(self.table.device)
        self._leaving = _Leaving(end, new, self.mover.copy_behind(self.device_pool, old, self.host_pool, new))

    def _spill(self, begin: int, end: int) -> None:
        if begin >= end:
            return
        old = self.table[:, begin:end]
        if self._leaving is not None:
            assert self._leaving.end == end
            new = self._leaving.slots
            self._leaving.wait()
            self._leaving = None
        else:
            new = self.host_pool.allocate(old.numel()).view(old.shape).to(self.table.device)
            self.mover.copy(self.device_pool, old, self.host_pool, new)
        self.device_pool.release(old)
        self.table[:, begin:end] = new

    def truncate(self, num_pooled: int) -> None:
        """Drop pooled pages from `num_pooled` on and free their slots."""
        assert num_pooled <= self.num_pooled
        if self._leaving is not None:  # the step that was to append broke off
            self._leaving.wait()
            self.host_pool.release(self._leaving.slots)
            self._leaving = None
        on_host = min(self.num_on_host, num_pooled)
        self.host_pool.release(self.table[:, num_pooled : max(num_pooled, self.num_on_host)])
        self.device_pool.release(self.table[:, max(num_pooled, self.num_on_host) : self.num_pooled])
        self.table[:, num_pooled : self.num_pooled] = -1
        self.num_pooled, self.num_on_host = num_pooled, on_host

    def device_run(self) -> PageRun:
        """The pages in the device pool."""
        count = self.num_pooled - self.num_on_host
        return PageRun(self.device_pool.storage, self.table, self.index, self.num_on_host, count, self.fmt)

    def host_rounds(self, buffer: Tensor) -> list[tuple[int, int]]:
        """How the host pages are read through a fetch buffer (uint8 [slots, payload_bytes]): (first, count) rounds."""
        if self.num_on_host == 0:
            return []
        per_round = buffer.shape[0] // self.num_heads
        assert per_round > 0, "the fetch buffer holds less than one page a head"
        return [(p, min(per_round, self.num_on_host - p)) for p in range(0, self.num_on_host, per_round)]

    def fetch(self, first: int, count: int, buffer: Tensor) -> PageRun:
        """Copy host pages [first, first + count) of every head into `buffer`; the run reads from there."""
        used = self.num_heads * count
        self.mover.fetch(self.host_pool, self.table[:, first : first + count], buffer[:used])
        slots = torch.arange(used, dtype=torch.int32, device=self.table.device).view(self.num_heads, count)
        index = None if self.index is None else self.index[:, first : first + count]
        return PageRun(buffer, slots, index, 0, count, self.fmt)

    def read_payload(self, first: int, stop: int) -> Tensor:
        """Payloads of pooled pages [first, stop) wherever they stand: uint8 [num_heads, n, payload_bytes]."""
        split = min(max(first, self.num_on_host), stop)
        parts = []
        if first < split:
            parts.append(self.host_pool.read(self.table[:, first:split]).to(self.table.device))
        if split < stop:
            parts.append(self.device_pool.read(self.table[:, split:stop]))
        return torch.cat(parts, dim=1)

    def sink_run(self, seq_len: int) -> ExactRun:
        """The exact sink page, once it is closed (no tokens before that, and none in the exact formats)."""
        closed = self.fmt.sink_pages and self.fmt.closed_pages(seq_len) > 0
        return ExactRun(self.sink_k, self.sink_v, self.fmt.page_size if closed else 0)

    def tail_run(self, seq_len: int) -> ExactRun:
        return ExactRun(self.tail_k, self.tail_v, self.tail_len(seq_len))
