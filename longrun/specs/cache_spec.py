"""What the dual cache of one sequence costs: a frozen description that computes its own bytes, without torch.

The planner only adds these numbers, and `DualCache` allocates exactly that; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrun.errors import PlanError
from longrun.quant.kv_format import PageFormat

_SLOT_BYTES = 4  # page tables and free lists hold int32 slots
MAX_SLOTS = 2**31 - 1


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
            are in the host pool. At most `pages_per_head`.
        fetch_pages: size of the device buffer, in pages, through which host pages are read; 0 without host pages.

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

    def __post_init__(self) -> None:
        assert self.capacity > 0
        assert all(0 <= n <= self.num_kv_heads for n in self.retrieval_heads)
        assert 0 <= self.device_pages_per_head <= self.pages_per_head
        assert (self.host_pages == 0) or self.fetch_pages > 0
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

    @property
    def device_pages(self) -> int:
        return self.total_retrieval_heads * self.device_pages_per_head

    @property
    def host_pages(self) -> int:
        return self.total_retrieval_heads * self.host_pages_per_head

    @property
    def ring_slots(self) -> int:
        """Tokens a ring has room for: sinks and window, or the whole capacity where that is smaller."""
        return min(self.sink_size + self.recent_size, self.capacity)

    def ring_slot(self, position: int) -> int:
        """Where a ring keeps the token at `position`."""
        return (
            position if position < self.sink_size else self.sink_size + (position - self.sink_size) % self.recent_size
        )

    def device_bytes(self) -> dict[str, int]:
        """Bytes on the device, by part."""
        fmt, heads = self.page_format, self.total_retrieval_heads
        return {
            "retrieval pages": self.device_pages * fmt.payload_bytes,
            "page index (key scales)": heads * self.pages_per_head * fmt.index_bytes,
            "sink pages": heads * fmt.sink_pages * fmt.exact_page_bytes,
            "tails": heads * fmt.exact_page_bytes,
            "rings": self.total_streaming_heads * self.ring_slots * 2 * fmt.head_dim * fmt.exact_itemsize,
            "page tables": heads * self.pages_per_head * _SLOT_BYTES
            + (self.device_pages + self.host_pages) * _SLOT_BYTES,
            "fetch buffer": self.fetch_pages * fmt.payload_bytes,
        }

    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory, by part."""
        return {"retrieval pages on host": self.host_pages * self.page_format.payload_bytes}

    @property
    def total_bytes(self) -> int:
        return sum(self.device_bytes().values()) + sum(self.host_bytes().values())

    def filled_bytes(self, seq_len: int) -> int:
        """Bytes of cached keys and values (with the page index) at `seq_len` tokens; all of it is allocated before."""
        fmt = self.page_format
        pooled = fmt.pooled_pages(seq_len)
        exact = self.total_retrieval_heads * (seq_len - pooled * fmt.page_size)
        exact += self.total_streaming_heads * min(seq_len, self.ring_slots)
        return self.total_retrieval_heads * pooled * fmt.page_bytes + exact * 2 * fmt.head_dim * fmt.exact_itemsize

    @property
    def bytes_per_token(self) -> float:
        """Bytes one more token costs once the rings are full: page bytes of all retrieval heads over page_size."""
        return self.total_retrieval_heads * self.page_format.page_bytes / self.page_format.page_size
