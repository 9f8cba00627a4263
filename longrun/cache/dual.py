"""The dual cache of a sequence (DuoAttention, arXiv 2410.10819): retrieval heads in pages, streaming heads in rings."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.cache.exact_memory import ExactMemory, SavedState
from longrun.cache.hot_pool import HotPool
from longrun.cache.page_movers import PageMover
from longrun.cache.pages import PagedHeads
from longrun.cache.pool import PagePool
from longrun.cache.ring import Ring
from longrun.cache.spans import BOTH, Spans
from longrun.kernels.page_view import PageView
from longrun.specs.cache_spec import CacheSpec, ring_slot


@dataclass(frozen=True, eq=False)
class CacheMark:
    """A point to come back to, as long as it is referred to: what later tokens overwrite (tails, rings) is copied, and
    pages that the heads read here stay.

    Attributes:
        seq_len: tokens at this point.
        state: the copy; None of an empty cache.
    """

    seq_len: int
    state: SavedState | None


@dataclass(frozen=True)
class TokenPlace:
    """Where one token's keys and values go, and how many exact tokens it sees with itself.

    Attributes:
        tail_slot, ring_slot: places in a tail and in a ring.
        sink_tokens, tail_tokens: in the exact sink page and in the tail.
        tail_start: position of the tail's first token.
        ring_tokens: leading slots of a ring that hold a token of the window.
    """

    tail_slot: int
    ring_slot: int
    sink_tokens: int
    tail_tokens: int
    tail_start: int
    ring_tokens: int


class DualCache:
    """All layers' caches of one sequence, allocated at once as `spec` says.

    In every layer KV heads come in the order of the head split: retrieval heads first.

    Attributes:
        seq_len: tokens that every layer holds; a forward pass appends layer by layer and then calls `advance`.
        layers: (PagedHeads or None, Ring or None) of each layer.
        fetch_buffer: uint8 [fetch_pages, payload_bytes], through which a GPU reads host pages.
        hot: device memory for host pages that were chosen lately, or None.
    """

    def __init__(
        self, spec: CacheSpec, device: torch.device, mover: PageMover | None = None, host_storage: Tensor | None = None
    ) -> None:
        """Allocate everything.

        Args:
            mover: quantizes and moves pages; plain torch without one.
            host_storage: uint8 [spec.host_pages, payload_bytes], memory for the host pool (a GPU's must be pinned);
                ordinary memory without it.
        """
        self.spec, self.device, self.seq_len = spec, device, 0
        fmt = spec.page_format
        host = torch.device("cpu")
        self.device_pool = PagePool(spec.device_pages, fmt.payload_bytes, device)
        self.host_pool = PagePool(
            spec.host_pages, fmt.payload_bytes, host, first_slot=spec.device_pages, storage=host_storage
        )
        self.fetch_buffer = torch.empty(spec.fetch_pages, fmt.payload_bytes, dtype=torch.uint8, device=device).fill_(0)
        self.hot = HotPool(spec, device) if spec.hot_slots else None
        self._exact = ExactMemory(spec, device)
        parts = self._exact.parts()
        self._spans = Spans(spec, device) if spec.total_retrieval_heads else None
        self._marks: weakref.WeakSet[CacheMark] = weakref.WeakSet()
        self.layers: list[tuple[PagedHeads | None, Ring | None]] = []
        for layer_idx, num_retrieval in enumerate(spec.retrieval_heads):
            pages = ring = None
            if num_retrieval:
                assert self._spans is not None
                pages = PagedHeads(
                    spec, layer_idx, parts.take(num_retrieval, fmt.page_size),
                    (self.device_pool, self.host_pool), self._spans, self._marked_lengths, mover,
                )  # fmt: skip
            if num_retrieval < spec.num_kv_heads:
                memory = parts.take(spec.num_kv_heads - num_retrieval, spec.ring_slots)
                ring = Ring(*memory, spec.sink_size, spec.recent_size)
            self.layers.append((pages, ring))

    def append(self, layer_idx: int, k: Tensor, v: Tensor, start: int) -> None:
        """Append tokens [start, start + T) to one layer: k, v [num_kv_heads, T, head_dim] after RoPE."""
        assert start + k.shape[1] <= self.spec.capacity, "the session checks the capacity before a step"
        pages, ring = self.layers[layer_idx]
        split = 0
        if pages is not None:
            split = pages.num_heads
            pages.append(k[:split], v[:split], start)
        if ring is not None:
            ring.append(k[split:], v[split:], start)

    def make_room(self) -> None:
        """Flush full tails, so that the next token's keys and values can be written into them in place."""
        if self.spec.page_format.tail_tokens(self.seq_len) < self.spec.page_format.page_size:
            return
        for pages, _ in self.layers:
            if pages is not None:
                pages.make_room(self.seq_len)

    def takes_in_place(self, start: int) -> bool:
        """Whether a token at `start` has room and can be written without flushing full tails before it."""
        fmt = self.spec.page_format
        return start < self.spec.capacity and fmt.tail_tokens(start) < fmt.page_size

    def place_of(self, start: int) -> TokenPlace:
        """Where the token at position `start` goes, once there is room for it."""
        fmt, spec = self.spec.page_format, self.spec
        closed, tail = fmt.closed_pages(start + 1), fmt.tail_tokens(start + 1)
        return TokenPlace(
            tail_slot=tail - 1,
            ring_slot=ring_slot(start, spec.sink_size, spec.recent_size),
            sink_tokens=fmt.page_size if closed and fmt.sink_pages else 0,
            tail_tokens=tail,
            tail_start=closed * fmt.page_size,
            ring_tokens=min(start + 1, spec.sink_size + spec.recent_size),
        )

    def describe(self, seq_len: int) -> None:
        """Bring what views name up to date on the device, for the last of `seq_len` tokens as the query."""
        if self._spans is not None:
            self._spans.describe(seq_len)

    def view(self, layer_idx: int, place: tuple[int, int] = BOTH) -> PageView:
        """The pages that a layer's retrieval heads read for the token last described; see `PagedHeads.view`."""
        pages, _ = self.layers[layer_idx]
        assert pages is not None, f"layer {layer_idx} has no retrieval heads"
        return pages.view(place)

    def advance(self, num_tokens: int) -> None:
        """Every layer has appended `num_tokens`: they now count."""
        self.seq_len += num_tokens

    def nbytes(self) -> dict[str, int]:
        """Bytes held, measured from the tensors themselves, by the names of `CacheSpec.device_bytes/host_bytes`."""
        total = dict.fromkeys((*self.spec.device_bytes(), *self.spec.host_bytes()), 0)
        total["retrieval pages"] = self.device_pool.nbytes
        total["retrieval pages on host"] = self.host_pool.nbytes
        total["fetch buffer"] = self.fetch_buffer.nbytes
        total["page tables"] = self.device_pool.free_list_bytes + self.host_pool.free_list_bytes
        if self._spans is not None:
            total["page tables"] += self._spans.nbytes
        if self.hot is not None:
            total["hot pool"], total["hot pool tables"] = self.hot.memory_bytes, self.hot.table_bytes
        total["marks"] = self._exact.copies_bytes
        for pages, ring in self.layers:
            for name, count in (pages.nbytes() if pages is not None else {}).items():
                total[name] += count
            total["rings"] += ring.nbytes if ring is not None else 0
        return total

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes().values())

    def check(self) -> None:
        """Conservation: free + used == total in both pools, every slot named once, page counts fit the length, every
        page's digest is its own, and what the hot pool holds are the pages."""
        pooled = self.spec.page_format.pooled_pages(self.seq_len)
        used = {self.device_pool: [], self.host_pool: []}
        for layer_idx, (pages, _) in enumerate(self.layers):
            if pages is not None:
                assert pages.num_pooled == pooled, (pages.num_pooled, pooled, self.seq_len)
                pages.places.check()
                pages.check_digest()
                if self.hot is not None:
                    self.hot.check(layer_idx, pages.places.table, (self.device_pool, self.host_pool))
                for pool, slots in used.items():
                    slots.append(pages.places.slots_in(pool))
        for pool, slots in used.items():
            pool.check(torch.cat([torch.empty(0, dtype=torch.int32), *slots]))

    def state(self) -> dict[str, Tensor]:
        """What is not pages: tails, sink pages and rings by name (`3.tail_k`), the cache's own tensors."""
        found = {}
        for layer_idx, (pages, ring) in enumerate(self.layers):
            if pages is not None:
                names = ("tail_k", "tail_v", "sink_k", "sink_v")
                for name in names if pages.fmt.sink_pages else names[:2]:
                    found[f"{layer_idx}.{name}"] = getattr(pages, name)
            if ring is not None:
                found[f"{layer_idx}.ring_k"], found[f"{layer_idx}.ring_v"] = ring.k, ring.v
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy back what `state` gave; a ring of another number of slots is taken as far as both reach.

        A ring only has fewer slots than sink_size + recent_size when the capacity is below that, and then no token
        has wrapped around yet.
        """
        for name, own in self.state().items():
            saved = state[name]
            slots = min(own.shape[1], saved.shape[1])
            own[:, :slots].copy_(saved[:, :slots])

    def _marked_lengths(self) -> list[int]:
        return [mark.seq_len for mark in self._marks]

    @property
    def holds_back_pages(self) -> bool:
        """Whether the live marks are as many as the plan has pages for: another one could not keep its pages."""
        return bool(self.spec.reaches) and len([n for n in self._marked_lengths() if n]) >= self.spec.marks

    def mark(self) -> CacheMark:
        """Remember this length, to come back to it with `rewind` as long as the mark lives.

        Costs a copy of tails and rings beside them on the device; in host memory where `spec.marks` marks are alive.
        """
        mark = CacheMark(self.seq_len, self._exact.save() if self.seq_len else None)
        self._marks.add(mark)
        return mark

    def layers_at(self, mark: CacheMark) -> list[tuple[PagedHeads | None, Ring | None]]:
        """The layers as they stood at a live mark that is not empty, to be read up to `mark.seq_len`; pages and sink
        pages are shared, and nothing may be appended."""
        assert mark.state is not None and mark in self._marks
        parts, found = self._exact.parts_at(mark.state), []
        for pages, ring in self.layers:
            if pages is not None:
                pages = pages.with_tail(*parts.take(pages.num_heads, self.spec.page_format.page_size))
            if ring is not None:
                memory = parts.take(ring.k.shape[0], ring.num_slots)
                ring = Ring(*memory, ring.sink_size, ring.recent_size)
            found.append((pages, ring))
        return found

    def release(self, mark: CacheMark) -> None:
        """The mark is of no more use: the pages it holds back return to their pool with the next ones that do."""
        self._marks.discard(mark)
        if mark.state is not None:
            mark.state.release()

    def rewind(self, mark: CacheMark) -> None:
        """Drop everything appended since `mark`; pages that spilled meanwhile stay in the host pool."""
        assert mark.seq_len <= self.seq_len
        assert not self.spec.reaches or mark.seq_len == 0 or mark in self._marks, "its pages may be gone"
        for later in [other for other in self._marks if other.seq_len > mark.seq_len]:
            self._marks.discard(later)
        for pages, _ in self.layers:
            if pages is not None:
                pages.places.truncate(mark.seq_len)
        if self.hot is not None:
            self.hot.forget(self.spec.page_format.pooled_pages(mark.seq_len))
        if mark.state is not None:
            self._exact.load(mark.state)
        self.seq_len = mark.seq_len
