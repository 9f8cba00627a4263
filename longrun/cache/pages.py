"""The retrieval heads' cache of one layer: exact sink page, pooled pages in their places, exact tail."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from longrun.cache.page_movers import PageMover, TorchPageMover
from longrun.cache.page_places import HeadGroup, NewPages, PagePlaces
from longrun.cache.pool import PagePool
from longrun.cache.spans import BOTH, Spans
from longrun.kernels.page_view import PageView
from longrun.quant.page_codec import decode_pages, exact_dtype
from longrun.quant.page_digest import encode_digest
from longrun.specs.cache_spec import CacheSpec

_CHECKED_AT_ONCE = 64  # pages of a head


class PagedHeads:
    """Pages of the retrieval heads of one layer.

    Page p of a head is pooled page p - fmt.sink_pages: where pages are quantized, the first one is the sink page and
    stays exact. The unfinished last page is the tail, exact as well; it is flushed when the next token needs its room.

    Attributes:
        places: slots, table and lists of the pooled pages.
        mover: quantizes finished pages.
        index: float16 [num_heads, max_pages, 2, head_dim] (quantized only): key scales and minima, never offloaded.
        digest: uint8 [num_heads, max_pages, spec.digest.page_bytes], by which pages are chosen, or None: of each page
            that is held what its stored keys say (`longrun.quant.page_digest`); never offloaded and never saved.
        tail_k, tail_v, sink_k, sink_v: [num_heads, page_size, head_dim].
    """

    def __init__(
        self, spec: CacheSpec, layer_idx: int, tail: tuple[Tensor, Tensor], pools: tuple[PagePool, PagePool],
        spans: Spans, marked_lengths: Callable[[], list[int]], mover: PageMover | None,
    ) -> None:  # fmt: skip
        """
        Args:
            tail: memory of tail_k and tail_v; pools, marked_lengths: see `PagePlaces`.
        """
        fmt, (self.tail_k, self.tail_v) = spec.page_format, tail
        self.fmt, self._spec, self._layer_idx, self._spans = fmt, spec, layer_idx, spans
        self.mover = mover or TorchPageMover()
        num_heads, device = self.tail_k.shape[0], self.tail_k.device
        self.places = PagePlaces(spec, layer_idx, pools, spans, marked_lengths, self.mover, device)
        self.index = None
        if fmt.quantized:
            shape = (num_heads, spec.pages_per_head, 2, fmt.head_dim)
            self.index = torch.zeros(shape, dtype=torch.float16, device=device)
        self.digest = None
        if spec.digest is not None:
            shape = (num_heads, spec.pages_per_head, spec.digest.page_bytes)
            self.digest = torch.zeros(shape, dtype=torch.uint8, device=device)
        sinks = self.tail_k.shape if fmt.sink_pages else (num_heads, 0, fmt.head_dim)
        self.sink_k = torch.zeros(sinks, dtype=exact_dtype(fmt), device=device)
        self.sink_v = torch.zeros_like(self.sink_k)

    @property
    def num_heads(self) -> int:
        return self.tail_k.shape[0]

    @property
    def groups(self) -> list[HeadGroup]:
        """The heads by reach, in their order."""
        return self.places.groups

    @property
    def num_pooled(self) -> int:
        """Pages that have been made of every head; those out of a head's reach are dropped again."""
        return self.places.num_pooled

    def num_pages(self, place: tuple[int, int] = BOTH) -> int:
        """Pages that the heads read, all together; `HOST` or `DEVICE` (`longrun.cache.spans`) names one place."""
        return self._spans.count(self._layer_idx, place)

    def nbytes(self) -> dict[str, int]:
        return {
            "page index (key scales)": 0 if self.index is None else self.index.nbytes,
            "page digests": 0 if self.digest is None else self.digest.nbytes,
            "sink pages": self.sink_k.nbytes + self.sink_v.nbytes,
            "tails": self.tail_k.nbytes + self.tail_v.nbytes,
            "page tables": self.places.nbytes,
        }

    def with_tail(self, tail_k: Tensor, tail_v: Tensor) -> PagedHeads:
        """The same pages with another tail, to be read."""
        other = copy(self)
        other.tail_k, other.tail_v = tail_k, tail_v
        return other

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Append tokens [start, start + T): k, v [num_heads, T, head_dim]; full pages are quantized and stored."""
        stop = start + k.shape[1]
        size, closed, tail = self.fmt.page_size, self.fmt.closed_pages(start), self.fmt.tail_tokens(start)
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
            self._quantize(k, v, stop - 1)  # a single token is appended before it attends

    def make_room(self, start: int) -> None:
        """Flush a full tail, so that the token at `start` can be written into it in place (decode on a GPU)."""
        if self.fmt.tail_tokens(start) < self.fmt.page_size:
            return
        if self.fmt.sink_pages and self.fmt.closed_pages(start) == 0:
            self.sink_k.copy_(self.tail_k)
            self.sink_v.copy_(self.tail_v)
        else:
            self._quantize(self.tail_k[:, None], self.tail_v[:, None], start)

    def _quantize(self, k: Tensor, v: Tensor, seq_len: int) -> None:
        """Append finished pages from exact tokens: k, v [num_heads, n, page_size, head_dim]."""
        first = self.num_pooled
        for new in self.places.add(k.shape[1], seq_len):
            part = new.heads, slice(new.begin - first, new.end - first)
            index = None if self.index is None else self.index[new.heads]
            self.mover.quantize(k[part], v[part], new.pool, new.slots, index, new.begin, self.fmt)
            self.write_digest(new)

    def write(self, new: NewPages, payload: Tensor, index: Tensor | None) -> None:
        """Content of new pages: uint8 [heads, n, payload_bytes], float16 [heads, n, 2, head_dim] (quantized only)."""
        new.pool.write(new.slots, payload)
        if self.index is not None:
            assert index is not None
            self.index[new.heads, new.begin : new.end] = index
        self.write_digest(new)

    def write_digest(self, new: NewPages) -> None:
        """Bring the digests of new pages up to date with their content, which is stored already."""
        if self.digest is not None:
            assert self.index is not None and self._spec.digest is not None
            at = new.heads, slice(new.begin, new.end)
            self.mover.digest(new.pool, new.slots, self.index[at], self.digest[at], self.fmt, self._spec.digest)

    def check_digest(self) -> None:
        """The digest of every page that is held is that of its stored keys."""
        fmt = self._spec.digest
        for group in self.groups if self.digest is not None else ():
            held = self.places.held(group)
            for at in range(0, len(held), _CHECKED_AT_ONCE):
                pages = held[at : at + _CHECKED_AT_ONCE]
                numbers = torch.from_numpy(pages).to(self.tail_k.device)
                index, found = (x[group.heads][:, numbers].cpu() for x in (self.index, self.digest))
                keys, _ = decode_pages(self.places.read(group.heads, pages), index, self.fmt)
                assert torch.equal(found, encode_digest(keys, fmt)), "a page's digest is not that of its keys"

    def begin_spill(self, seq_len: int) -> None:
        """Start copying the pages that will leave for the host pool by the time `seq_len` tokens are appended."""
        self.places.begin_spill(self.fmt.pooled_pages(seq_len) - self.num_pooled)

    def view(self, place: tuple[int, int] = BOTH) -> PageView:
        """What every head reads in the next step, as last described (`Spans.describe`); `HOST` or `DEVICE` names the
        part that stands there. Both parts one after the other are the whole list."""
        spans, first = (x[self._layer_idx, ..., : self.num_heads] for x in (self._spans.device, self._spans.first))
        return self._view(self.places.lists.rows, spans[place[0]], spans[place[1]], first)

    def range_view(self, group: HeadGroup, first: int, stop: int) -> PageView:
        """Pages [first, stop) of a group's heads in their order, wherever they stand; all of them are held."""
        assert self.places.holds(group, first, stop), f"pages {first} to {stop} are read and not held"
        numbers = self._spans.numbers.expand(group.num_heads, -1)
        zeros, count = self._spans.zeros[: group.num_heads], self._spans.all_pages[: group.num_heads]
        return self._view(numbers, zeros, count, zeros, group.heads).part(first, stop - first)

    def _view(
        self, pages: Tensor, begins: Tensor, counts: Tensor, first: Tensor, heads: slice = slice(None)
    ) -> PageView:  # fmt: skip
        host, device = self.places.host_pool, self.places.device_pool
        return PageView(
            device.storage, self.places.table[heads], None if self.index is None else self.index[heads], pages, begins,
            counts, first, self.fmt, self._spec.sink_size, host.storage if host.num_slots else None, host.first_slot,
        )  # fmt: skip

    def sink_tokens(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """The exact sink page, once it is closed (no tokens before that, and none in the exact formats)."""
        closed = self.fmt.sink_pages and self.fmt.closed_pages(seq_len) > 0
        count = self.fmt.page_size if closed else 0
        return self.sink_k[:, :count], self.sink_v[:, :count]

    def tail_tokens(self, seq_len: int) -> tuple[Tensor, Tensor]:
        count = self.fmt.tail_tokens(seq_len)
        return self.tail_k[:, :count], self.tail_v[:, :count]
