"""The hot pool: device memory for host pages that selected decode chose lately, of all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.cache.pool import PagePool
from longrun.kernels.hot_pages import HotPages
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.hot_counts import HotCounts


class HotPool:
    """Slots of every head that may have host pages, allocated at once as `spec` says; see `kernels.hot_pages`.

    A page keeps its content as long as it is held. So what the pool holds is right until pages are dropped (`forget`),
    whichever steps ran in between: also those that were launched ahead and then thrown away.
    """

    def __init__(self, spec: CacheSpec, device: torch.device) -> None:
        slots, heads, payload = spec.hot_slots, spec.keeping_heads, spec.page_format.payload_bytes
        self._payload_bytes = payload
        # touched now, so that nothing fails later
        self._memory = torch.empty(heads * slots, payload, dtype=torch.uint8, device=device).fill_(0)
        full = lambda *shape: torch.full(shape, -1, dtype=torch.int32, device=device)  # noqa: E731
        self._tables = full(spec.total_retrieval_heads, spec.pages_per_head)
        self._owners = full(heads, slots)
        self._orders = torch.arange(slots, dtype=torch.int32, device=device).repeat(heads, 1)
        most_heads = max(spec.retrieval_heads)
        self._missed = full(most_heads, slots, 2)
        self._counts = torch.zeros(spec.num_layers, most_heads, 2, dtype=torch.int32, device=device)
        self._totals = torch.zeros(spec.num_layers, most_heads, 2, dtype=torch.int64, device=device)
        self._layers: list[HotPages | None] = []
        first_table = first = 0
        for layer_idx, count in enumerate(spec.retrieval_heads):
            hot_heads = sum(reach.is_all for reach in spec.layer_reaches(layer_idx))
            tables, heads_of = slice(first_table, first_table + count), slice(first, first + hot_heads)
            first_table, first = tables.stop, heads_of.stop
            self._layers.append(
                HotPages(
                    self._memory[heads_of.start * slots : heads_of.stop * slots],
                    self._tables[tables], self._orders[heads_of], self._owners[heads_of], self._missed[:count],
                    self._counts[layer_idx, :count],
                )
                if hot_heads
                else None
            )  # fmt: skip

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pages."""
        return self._memory.nbytes

    @property
    def table_bytes(self) -> int:
        """Bytes of what says where pages stand and when they were used."""
        held = self._tables, self._owners, self._orders, self._missed, self._counts, self._totals
        return sum(tensor.nbytes for tensor in held)

    def layer(self, layer_idx: int) -> HotPages | None:
        """The slots of a layer's heads; None where none of them has pages on the host."""
        return self._layers[layer_idx]

    def forget(self, num_pooled: int) -> None:
        """Pages from `num_pooled` on are dropped; others will come under their numbers."""
        self._tables[:, num_pooled:] = -1

    def count_step(self) -> None:
        """The last step that was launched counts: its token is one of the sequence. Waits for nothing."""
        self._totals += self._counts

    def counts(self) -> HotCounts:
        """All steps that counted since the cache was made, once they have run."""
        by_layer = self._totals.sum(dim=1).cpu()
        pages, missed = (tuple(column) for column in by_layer.T.tolist())
        return HotCounts(pages, missed, self._payload_bytes)

    def check(self, layer_idx: int, table: Tensor, pools: tuple[PagePool, PagePool]) -> None:
        """Every slot is in the order once, and what the table has in a slot is the page that stands in the pools.

        Args:
            table: int32 [num_heads, max_pages], where the layer's pages stand.
            pools: on the device and on the host.
        """
        hot = self._layers[layer_idx]
        if hot is None:
            return
        slots = torch.arange(hot.slots, dtype=torch.int32, device=hot.order.device)
        assert (hot.order.sort(dim=1).values == slots).all(), "a slot is in the order twice"
        host_pool = pools[1]
        for head in range(hot.hot_heads):
            pages = torch.nonzero(hot.table[head] >= host_pool.first_slot)[:, 0]
            rows = hot.table[head, pages].long() - host_pool.first_slot
            assert torch.equal(hot.owner[head, rows - head * hot.slots], pages.int()), "a slot has two pages"
            for pool in pools:
                here = table[head, pages] >= host_pool.first_slot
                here = here if pool is host_pool else ~here
                stored = pool.read(table[head, pages[here]]).to(hot.memory.device)
                assert torch.equal(hot.memory[rows[here]], stored), "a page in the hot pool is not what it is"
