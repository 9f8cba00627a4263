"""What the dual cache of one sequence costs: a frozen description that computes its own bytes, without torch.

The planner only adds these numbers, and `DualCache` allocates exactly that; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from longrun.errors import PlanError
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.specs.reach import ALL_TOKENS, Reach
from longrun.specs.selection_spec import Selection

_SLOT_BYTES = 4  # page tables, page lists and free lists hold int32
MAX_SLOTS = 2**31 - 1
MARKS = 2  # live marks that a session plans memory for, where nobody asks for more
MOST_MARKS = 1024
SPANS = 5  # int32 of every head: begin and count of its pages on the host, on the device, and the count of both


def ring_slot(position: int, sink_size: int, recent_size: int) -> int:
    """Where a ring keeps the token at `position`."""
    recent = position - sink_size
    return position if recent < 0 else sink_size + recent % recent_size


@dataclass(frozen=True)
class CacheSpec:
    """Dual cache of one sequence of up to `capacity` tokens.

    Attributes:
        retrieval_heads: number of retrieval KV heads of each layer; the others are streaming heads.
        num_kv_heads: KV heads of a layer.
        page_format: format of the pages of retrieval heads; its exact dtype also serves the rings.
        capacity: tokens the cache can hold.
        sink_size, recent_size: tokens a streaming head keeps (positions < sink_size, and the last recent_size).
        device_pages_per_head: how many pooled pages of every retrieval head stand in the device pool; older pages
            are in the host pool. At most `pages_per_head`. Heads of a finite reach stand on the device.
        fetch_pages: size of the device buffer, in pages, through which a GPU reads host pages; 0 without them.
        reaches: of every layer, each retrieval head's reach in tokens (`longrun.specs.reach`), longest first; empty
            where every retrieval head keeps every token.
        marks: live marks whose tails, rings and pages have memory of their own.
        digest: what is kept of every page to choose pages by; None keeps nothing.
        hot_slots: device memory, in pages, for the host pages that each head chose lately (the hot pool), of heads that
            keep every token; 0 has none.

    Raises:
        PlanError: more pages than 32-bit slots can name.
    """

    retrieval_heads: tuple[int, ...]
    num_kv_heads: int
    page_format: PageFormat
    capacity: int
    sink_size: int
    recent_size: int
    device_pages_per_head: int
    fetch_pages: int = 0
    reaches: tuple[tuple[int, ...], ...] = ()
    marks: int = MARKS
    digest: DigestFormat | None = None
    hot_slots: int = 0

    def __post_init__(self) -> None:
        assert self.capacity > 0
        assert all(0 <= n <= self.num_kv_heads for n in self.retrieval_heads)
        assert 0 <= self.device_pages_per_head <= self.pages_per_head
        if self.digest is not None:
            fmt = self.page_format
            assert fmt.quantized and (self.digest.page_size, self.digest.head_dim) == (fmt.page_size, fmt.head_dim)
        assert not self.hot_slots or (self.digest is not None and self.host_pages)
        if self.reaches:
            assert tuple(map(len, self.reaches)) == self.retrieval_heads
            assert all(list(row) == sorted(row, reverse=True) and min(row, default=1) > 0 for row in self.reaches)
        if self.device_pages + self.host_pages > MAX_SLOTS:
            raise PlanError(
                f"{self.device_pages + self.host_pages:,} pages are more than the {MAX_SLOTS:,} that 32-bit page "
                f"tables can name: use a larger page_size or a smaller context"
            )

    @property
    def num_layers(self) -> int:
        return len(self.retrieval_heads)

    @property
    def total_retrieval_heads(self) -> int:
        return sum(self.retrieval_heads)

    @property
    def total_streaming_heads(self) -> int:
        return self.num_layers * self.num_kv_heads - self.total_retrieval_heads

    @property
    def pages_per_head(self) -> int:
        """Pooled pages of one retrieval head when the cache is full."""
        return self.page_format.pooled_pages(self.capacity)

    @property
    def host_pages_per_head(self) -> int:
        return self.pages_per_head - self.device_pages_per_head

    def layer_reaches(self, layer_idx: int) -> tuple[Reach, ...]:
        """The reach of each retrieval head of a layer."""
        row = self.reaches[layer_idx] if self.reaches else (ALL_TOKENS,) * self.retrieval_heads[layer_idx]
        return tuple(Reach(tokens, self.sink_size, self.page_format) for tokens in row)

    @cached_property
    def _finite(self) -> tuple[Reach, ...]:
        """The finite reaches of all heads."""
        if not self.reaches:
            return ()
        return tuple(r for idx in range(self.num_layers) for r in self.layer_reaches(idx) if not r.is_all)

    @property
    def keeping_heads(self) -> int:
        """Retrieval heads that keep every token."""
        return self.total_retrieval_heads - len(self._finite)

    @property
    def device_pages(self) -> int:
        finite = sum(reach.most_pages(self.capacity, self.marks) for reach in self._finite)
        return self.keeping_heads * self.device_pages_per_head + finite

    @property
    def host_pages(self) -> int:
        return self.keeping_heads * self.host_pages_per_head

    @property
    def exact_bytes(self) -> int:
        """Bytes of tails and rings: what a mark copies."""
        fmt = self.page_format
        rings = self.total_streaming_heads * ring_bytes(fmt, self.ring_slots)
        return self.total_retrieval_heads * fmt.exact_page_bytes + rings

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values on device and host, with index, sink pages, tails and rings, and with the pages of
        finite reaches that marks hold back: the sum of `head_bytes` over all heads."""
        parts = self.device_bytes() | self.host_bytes()
        others = "marks", "page tables", "fetch buffer", "page digests", "hot pool", "hot pool tables"
        return sum(size for name, size in parts.items() if name not in others)

    @property
    def ring_slots(self) -> int:
        """Tokens a ring has room for: sinks and window, or the whole capacity where that is smaller."""
        return min(self.sink_size + self.recent_size, self.capacity)

    @property
    def index_tensors(self) -> tuple[int, ...]:
        """Bytes of each layer's page index, a tensor of its own."""
        return self._of_pages(self.page_format.index_bytes)

    @property
    def digest_tensors(self) -> tuple[int, ...]:
        """Bytes of each layer's page digests, a tensor of their own: of every page of every retrieval head, wherever
        the page stands."""
        return self._of_pages(0 if self.digest is None else self.digest.page_bytes)

    @property
    def page_tensors(self) -> Iterator[int]:
        """Bytes of all these tensors in the order in which they are allocated."""
        return chain.from_iterable(zip(self.index_tensors, self.digest_tensors, strict=True))

    def _of_pages(self, size: int) -> tuple[int, ...]:
        return tuple(heads * self.pages_per_head * size for heads in self.retrieval_heads)

    def device_bytes(self) -> dict[str, int]:
        """Bytes on the device, by part."""
        fmt, heads = self.page_format, self.total_retrieval_heads
        return {
            "retrieval pages": self.device_pages * fmt.payload_bytes,
            "page index (key scales)": sum(self.index_tensors),
            "page digests": sum(self.digest_tensors),
            "sink pages": heads * fmt.sink_pages * fmt.exact_page_bytes,
            "tails": heads * fmt.exact_page_bytes,
            "rings": self.total_streaming_heads * ring_bytes(fmt, self.ring_slots),
            "marks": self.marks * self.exact_bytes,
            "page tables": self._table_bytes(),
            "fetch buffer": self.fetch_pages * fmt.payload_bytes,
            "hot pool": self.keeping_heads * self.hot_slots * fmt.payload_bytes,
            "hot pool tables": self._hot_table_bytes(),
        }

    def _table_bytes(self) -> int:
        """Of every page its slot, twice (a GPU's table and the host's own), and its place in a list; a shared list of
        all pages; every head's spans, reach and oldest token; and both pools' free lists."""
        if not self.total_retrieval_heads:
            return 0
        of_pages = 3 * self.total_retrieval_heads * self.pages_per_head + self.pages_per_head
        of_heads = ((SPANS + 2) * self.num_layers + 2) * max(self.retrieval_heads)
        return (of_pages + of_heads + self.device_pages + self.host_pages) * _SLOT_BYTES

    def _hot_table_bytes(self) -> int:
        """Of every page where it was read last; of every slot its page and its place in the order of use; of one
        layer's slots what is fetched to them; of every head two counts, of a step and in all."""
        if not self.hot_slots:
            return 0
        of_pages, most_heads = self.total_retrieval_heads * self.pages_per_head, max(self.retrieval_heads)
        of_slots = 2 * (self.keeping_heads + most_heads) * self.hot_slots
        return (of_pages + of_slots) * _SLOT_BYTES + self.num_layers * most_heads * 2 * (_SLOT_BYTES + 8)

    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory, by part."""
        return {"retrieval pages on host": self.host_pages * self.page_format.payload_bytes}

    @property
    def total_bytes(self) -> int:
        return sum(self.device_bytes().values()) + sum(self.host_bytes().values())

    def filled_bytes(self, seq_len: int) -> int:
        """Bytes of cached keys and values (with the page index) at `seq_len` tokens; all of it is allocated before."""
        fmt = self.page_format
        exact = self.total_retrieval_heads * (seq_len - fmt.pooled_pages(seq_len) * fmt.page_size)
        exact += self.total_streaming_heads * min(seq_len, self.ring_slots)
        return self.held_pages(seq_len) * fmt.page_bytes + exact * 2 * fmt.head_dim * fmt.exact_itemsize

    def held_pages(self, seq_len: int) -> int:
        """Pages of all heads in use at `seq_len` tokens."""
        finite = sum(reach.held_pages(seq_len) for reach in self._finite)
        return self.keeping_heads * self.page_format.pooled_pages(seq_len) + finite

    def read_pages(self, seq_len: int, selection: Selection) -> int:
        """Pages of all heads that a decode step reads at `seq_len` tokens."""
        if not selection.selects_at(self.page_format.pooled_pages(seq_len)):
            return self.held_pages(seq_len)
        finite = sum(selection.pages_of(reach.held_pages(seq_len)) for reach in self._finite)
        return self.keeping_heads * selection.pages_of(self.page_format.pooled_pages(seq_len)) + finite

    def paged_tokens(self, seq_len: float) -> float:
        """Tokens that the last of `seq_len` sees, summed over the retrieval heads."""
        finite = sum(min(self.sink_size + reach.tokens, seq_len) for reach in self._finite)
        return self.keeping_heads * seq_len + finite

    def ring_tokens(self, seq_len: float) -> float:
        """Tokens that the last of `seq_len` sees, summed over the streaming heads."""
        return self.total_streaming_heads * min(self.sink_size + self.recent_size, seq_len)

    @property
    def bytes_per_token(self) -> float:
        """Bytes one more token costs once rings and reaches are full: bytes of a page and its digest of the heads that
        keep every token, over page_size."""
        digest_bytes = 0 if self.digest is None else self.digest.page_bytes
        return self.keeping_heads * (self.page_format.page_bytes + digest_bytes) / self.page_format.page_size


def ring_bytes(fmt: PageFormat, slots: int) -> int:
    """Bytes of one streaming head's ring."""
    return slots * 2 * fmt.head_dim * fmt.exact_itemsize


def head_bytes(reach: Reach, capacity: int, marks: int = MARKS) -> int:
    """Bytes of one paged head in a cache of `capacity` tokens: pages, index, sink page and tail."""
    fmt = reach.fmt
    pages = reach.most_pages(capacity, marks) * fmt.payload_bytes + fmt.pooled_pages(capacity) * fmt.index_bytes
    return pages + (fmt.sink_pages + 1) * fmt.exact_page_bytes
