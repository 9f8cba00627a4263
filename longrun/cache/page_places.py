"""Where the pages of one layer stand: slots, page table and page lists, and the moves between the two pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from longrun.cache.page_lists import PageLists
from longrun.cache.page_movers import PageMover
from longrun.cache.pool import PagePool
from longrun.cache.spans import Spans
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.reach import Reach

PageNumbers = tuple[np.ndarray, np.ndarray]  # heads, and the page of each
_NO_PAGES = (np.zeros(0, dtype=np.int64),) * 2


@dataclass
class HeadGroup:
    """Consecutive heads of one layer with one reach: they hold the same pages, each head where it has them.

    Attributes:
        heads: of the layer's retrieval heads.
        oldest: the oldest page beside the sinks' that is read; older ones are dropped, unless a mark needs them.
        lowest: beside the sinks' no page below this one is held.
        num_on_host: pages [0, num_on_host) stand on the host and the others on the device, as long as `prefix`.
        prefix: no page of these heads was moved by itself.
    """

    heads: slice
    reach: Reach
    oldest: int = 0
    lowest: int = 0
    num_on_host: int = 0
    prefix: bool = True

    @property
    def num_heads(self) -> int:
        return self.heads.stop - self.heads.start


@dataclass(frozen=True)
class NewPages:
    """Slots for pages [begin, end) of some heads, to be written: int32 [heads, n] on the compute device."""

    heads: slice
    pool: PagePool
    slots: Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class _Leaving:
    """Pages on their way to host `slots`, int32 [n]; `wait` orders the current stream."""

    pages: PageNumbers
    slots: Tensor
    wait: Callable[[], None]


class PagePlaces:
    """Slots of one layer's pooled pages. A page of any number may stand in the device pool or in the host pool.

    By default the newest `device_pages_per_head` pages of a head that keeps every token stand on the device, and older
    ones move to the host as pages come; pages of a head of finite reach stand on the device, and return to its pool
    when they are out of reach, unless a live mark needs them.

    Attributes:
        table: int32 [num_heads, max_pages] on the device: slot of each page, -1 where none is held.
        num_pooled: pages that have been made.
        groups: heads by reach, in their order.
    """

    def __init__(
        self, spec: CacheSpec, layer_idx: int, pools: tuple[PagePool, PagePool], spans: Spans,
        marked_lengths: Callable[[], list[int]], mover: PageMover, device: torch.device,
    ) -> None:  # fmt: skip
        """
        Args:
            pools: on the device and on the host.
            marked_lengths: tokens at each live mark, whose pages must stay.
        """
        self._spec, self._mover, self._marked_lengths = spec, mover, marked_lengths
        self.device_pool, self.host_pool = pools
        num_heads, max_pages = spec.retrieval_heads[layer_idx], spec.pages_per_head
        self._slots = np.full((num_heads, max_pages), -1, dtype=np.int32)  # the host's own table
        self.table = torch.full((num_heads, max_pages), -1, dtype=torch.int32, device=device)
        self.lists = PageLists(num_heads, max_pages, spans, layer_idx, device)
        self.num_pooled = 0
        self.groups: list[HeadGroup] = []
        first = 0
        for reach, same in groupby(spec.layer_reaches(layer_idx)):
            stop = first + len(list(same))
            self.groups.append(HeadGroup(slice(first, stop), reach))
            first = stop
        self._leaving: _Leaving | None = None

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self._slots.nbytes + self.lists.nbytes

    def slots_in(self, pool: PagePool) -> Tensor:
        """int32 [n]: the slots of this pool that are taken by this layer's pages."""
        return torch.from_numpy(self._slots[self._in(self._slots, pool)])

    def add(self, count: int, seq_len: int) -> list[NewPages]:
        """Slots for the next `count` pages, entered in table and lists: every page that is in reach at `seq_len` tokens
        (those that are not have no slot). What that length leaves out of reach was dropped first."""
        first, total = self.num_pooled, self.num_pooled + count
        self._drop(seq_len)
        self._spill(self._spilling(count))
        self.num_pooled = total
        parts = []
        for group in self.groups:
            for pool, begin, end in self._targets(group, first, total, seq_len):
                slots = pool.allocate(group.num_heads * (end - begin)).view(-1, end - begin)
                self._slots[group.heads, begin:end] = slots.numpy()
                slots = self._to_device(slots)
                self.table[group.heads, begin:end] = slots
                parts.append(NewPages(group.heads, pool, slots, begin, end))
        self._relist()
        return parts

    def _targets(self, group: HeadGroup, first: int, total: int, seq_len: int) -> list[tuple[PagePool, int, int]]:
        """Pool, begin and end of the new pages [first, total) that the group keeps."""
        if not group.reach.is_all:
            return [(self.device_pool, begin, end) for begin, end in group.reach.kept(first, total, seq_len)]
        direct = self._direct(total - first)  # a chunk larger than the quota: its own oldest go straight to the host
        if direct:
            group.num_on_host = first + direct
        found = [(self.host_pool, first, first + direct), (self.device_pool, first + direct, total)]
        return [(pool, begin, end) for pool, begin, end in found if begin < end]

    def _direct(self, count: int) -> int:
        return max(0, count - self._spec.device_pages_per_head)

    def _spilling(self, count: int) -> PageNumbers:
        """Pages that leave the device when `count` pages are added to every head: each head's oldest."""
        room = self._spec.device_pages_per_head - (count - self._direct(count))
        if all(not g.reach.is_all or (g.prefix and self.num_pooled - room <= g.num_on_host) for g in self.groups):
            return _NO_PAGES
        parts = [_NO_PAGES]
        for group in self.groups:
            heads = np.arange(group.heads.start, group.heads.stop)
            if not group.reach.is_all:
                continue
            if group.prefix:
                pages = np.arange(group.num_on_host, max(group.num_on_host, self.num_pooled - room))
                parts.append((heads.repeat(len(pages)), np.tile(pages, len(heads))))
                continue
            for head in heads:
                pages = self._pages_in(head, self.device_pool)
                pages = pages[: max(0, len(pages) - room)]
                parts.append((np.full(len(pages), head), pages))
        heads, pages = zip(*parts, strict=True)
        return np.concatenate(heads), np.concatenate(pages)

    def holds(self, group: HeadGroup, first: int, stop: int) -> bool:
        """Whether every head of the group has pages [first, stop)."""
        return bool((self._slots[group.heads, first:stop] >= 0).all())

    def held(self, group: HeadGroup) -> np.ndarray:
        """int64 [n]: the pages that every head of the group has, ascending; with those that a mark holds back."""
        return np.nonzero(self._slots[group.heads.start] >= 0)[0]

    def rounds(self, group: HeadGroup, first: int, stop: int, per_round: int) -> tuple[list[range], list[range]]:
        """Pages [first, stop) of a group in ranges: those with pages of any head on the host, of at most `per_round`
        pages, and those all on the device."""
        if group.prefix:
            border = max(first, min(group.num_on_host, stop))
            on_host = [range(at, min(at + per_round, border)) for at in range(first, border, max(1, per_round))]
            return on_host, [range(border, stop)] if border < stop else []
        away = self._in(self._slots[group.heads, first:stop], self.host_pool).any(axis=0)
        on_host, on_device, at = [], [], first
        while at < stop:
            same = np.nonzero(away[at - first :] != away[at - first])[0]
            end = at + int(same[0]) if len(same) else stop
            if away[at - first]:
                end = min(end, at + per_round)
            (on_host if away[at - first] else on_device).append(range(at, end))
            at = end
        return on_host, on_device

    def begin_spill(self, count: int) -> None:
        """Start copying the pages that will leave for the host pool when `count` pages are added; until then they are
        read where they were."""
        assert self._leaving is None
        pages = self._spilling(count)
        if len(pages[0]):
            new = self.host_pool.allocate(len(pages[0]))
            wait = self._mover.copy_behind(self.device_pool, self._at(pages), self.host_pool, self._to_device(new))
            self._leaving = _Leaving(pages, new, wait)

    def _spill(self, pages: PageNumbers) -> None:
        if self._leaving is not None:
            assert all(map(np.array_equal, self._leaving.pages, pages))
            self._leaving.wait()
            self._enter(pages, self.device_pool, self._leaving.slots)
            self._leaving = None
        elif len(pages[0]):
            self._move(pages, self.device_pool, self.host_pool)
        if len(pages[0]):
            for group in self.groups:
                if group.prefix and group.reach.is_all:
                    group.num_on_host = int(pages[1][pages[0] == group.heads.start].max()) + 1

    def move(self, head: int, pages: Iterable[int], to_host: bool) -> None:
        """Move pages of one head to the host pool, or to the device pool; those that stand there already stay. With a
        hot pool a head of finite reach has none on the host."""
        group = next(group for group in self.groups if group.heads.start <= head < group.heads.stop)
        assert group.reach.is_all or not to_host or not self._spec.hot_slots
        source, target = self.device_pool, self.host_pool
        if not to_host:
            source, target = target, source
        wanted = np.intersect1d(np.fromiter(pages, dtype=np.int64), self._pages_in(head, source))
        if len(wanted):
            self._move((np.full(len(wanted), head), wanted), source, target)
            group.prefix = False
            self._relist()

    def _move(self, pages: PageNumbers, source: PagePool, target: PagePool) -> None:
        new = target.allocate(len(pages[0]))
        self._mover.copy(source, self._at(pages), target, self._to_device(new))
        self._enter(pages, source, new)

    def _enter(self, pages: PageNumbers, source: PagePool, new: Tensor) -> None:
        source.release(torch.from_numpy(self._slots[pages]))
        self._slots[pages] = new
        self._upload(int(pages[1].min()), int(pages[1].max()) + 1)

    def _at(self, pages: PageNumbers) -> Tensor:
        return self._to_device(torch.from_numpy(self._slots[pages]))

    def _to_device(self, slots: Tensor) -> Tensor:
        return slots.to(self.table.device, non_blocking=True)  # from pageable memory, which may change at once

    def _upload(self, first: int, stop: int) -> None:
        if first < stop:
            self.table[:, first:stop] = self._to_device(torch.from_numpy(self._slots[:, first:stop]))

    def read(self, heads: slice, pages: np.ndarray) -> Tensor:
        """Payloads of pages wherever they stand: uint8 [heads, n, payload_bytes] on the CPU."""
        slots = torch.from_numpy(self._slots[heads][:, pages])
        out = torch.empty(*slots.shape, self.device_pool.storage.shape[1], dtype=torch.uint8)
        for pool in (self.device_pool, self.host_pool):
            here = torch.from_numpy(self._in(slots.numpy(), pool))
            out[here] = pool.read(slots[here]).cpu()
        return out

    @staticmethod
    def _in(slots: np.ndarray, pool: PagePool) -> np.ndarray:
        return (slots >= pool.first_slot) & (slots < pool.first_slot + pool.num_slots)

    def _pages_in(self, head: int, pool: PagePool) -> np.ndarray:
        """Page numbers of a head that stand in a pool, ascending; without those only a mark holds back."""
        return np.nonzero(self._in(self._slots[head, : self.num_pooled], pool))[0]

    def _drop(self, seq_len: int) -> None:
        """Give back pages that are out of reach at `seq_len` tokens and that no live mark needs."""
        for group in self.groups:
            if group.reach.is_all:
                continue
            reach = group.reach
            group.oldest = reach.oldest_page(seq_len)
            stop = min(group.oldest, self.num_pooled)
            first = max(group.lowest, reach.num_sink_pages)
            if first >= stop:
                continue
            pages = np.arange(first, stop)
            needed = np.zeros(len(pages), dtype=bool)
            for length in self._marked_lengths():
                needed |= (pages >= reach.oldest_page(length)) & (pages < self._spec.page_format.pooled_pages(length))
            self._release(group.heads, pages[~needed])
            group.lowest = int(pages[needed][0]) if needed.any() else stop

    def _release(self, heads: slice, pages: np.ndarray) -> None:
        """Free the slots of these heads' pages, of those that have one."""
        if len(pages) == 0:
            return
        slots = self._slots[heads, pages]
        for pool in (self.device_pool, self.host_pool):
            pool.release(torch.from_numpy(slots[self._in(slots, pool)]))
        self._slots[heads, pages] = -1
        self._upload(int(pages[0]), int(pages[-1]) + 1)

    def truncate(self, seq_len: int) -> None:
        """Back to `seq_len` tokens, the length of a live mark or 0: later pages are dropped and their slots freed."""
        if self._leaving is not None:  # the step that was to append broke off
            self._leaving.wait()
            self.host_pool.release(self._leaving.slots)
            self._leaving = None
        num_pooled = self._spec.page_format.pooled_pages(seq_len)
        assert num_pooled <= self.num_pooled
        for group in self.groups:
            self._release(group.heads, np.arange(num_pooled, self.num_pooled))
            group.num_on_host = min(group.num_on_host, num_pooled)
            group.oldest = group.reach.oldest_page(seq_len)
            group.lowest = min(group.lowest, group.oldest)
        self.num_pooled = num_pooled
        self._relist()

    def _relist(self) -> None:
        """Bring the lists up to date: pages in reach, by place."""
        for group in self.groups:
            sinks, oldest = min(group.reach.num_sink_pages, self.num_pooled), min(group.oldest, self.num_pooled)
            first = 0 if oldest <= sinks else oldest
            if group.prefix and (first == 0 or sinks == 0):
                on_device = max(first, min(group.num_on_host, self.num_pooled))
                self.lists.set_range(group.heads, first, on_device, self.num_pooled)
                continue
            read = np.concatenate((np.arange(sinks if first else 0), np.arange(first, self.num_pooled)))
            on_host = self._in(self._slots[group.heads][:, read], self.host_pool)
            self.lists.set_pages(group.heads, [read[row] for row in on_host], [read[~row] for row in on_host])

    def check(self) -> None:
        """Every page in reach has a slot, and every other one none, but for what marks hold back or held back."""
        assert self._leaving is None
        assert torch.equal(self.table.cpu(), torch.from_numpy(self._slots)), "the device's table is not the host's"
        pages = np.arange(self._slots.shape[1])
        for group in self.groups:
            needed = (pages < self.num_pooled) & ((pages >= group.oldest) | (pages < group.reach.num_sink_pages))
            held = self._slots[group.heads] >= 0
            assert held[:, needed].all(), "a page in reach has no slot"
            held_back = (pages >= group.lowest) & (pages < group.oldest)
            assert not held[:, ~needed & ~held_back].any(), "a page that nobody needs has a slot"
            for length in self._marked_lengths():
                marked = (pages >= group.reach.oldest_page(length)) & (
                    pages < self._spec.page_format.pooled_pages(length)
                )
                assert held[:, marked].all(), "a page that a mark needs has no slot"
