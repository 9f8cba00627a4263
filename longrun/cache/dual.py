"""The dual cache of a sequence (DuoAttention, arXiv 2410.10819): retrieval heads in pages, streaming heads in rings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.cache.page_movers import PageMover
from longrun.cache.pages import PagedHeads
from longrun.cache.pool import PagePool
from longrun.cache.ring import Ring
from longrun.quant.page_codec import exact_dtype
from longrun.specs.cache_spec import CacheSpec


@dataclass(frozen=True)
class CacheMark:
    """A point to come back to: what later tokens overwrite (tails, rings, sink pages), in host memory."""

    seq_len: int
    num_pooled: int
    state: dict[str, Tensor]


class DualCache:
    """All layers' caches of one sequence, allocated at once as `spec` says.

    In every layer KV heads come in the order of the head split: retrieval heads first.

    Attributes:
        seq_len: tokens that every layer holds; a forward pass appends layer by layer and then calls `advance`.
        layers: (PagedHeads or None, Ring or None) of each layer.
        fetch_buffer: uint8 [fetch_pages, payload_bytes], through which host pages are read.
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
        self.layers: list[tuple[PagedHeads | None, Ring | None]] = []
        for num_retrieval in spec.retrieval_heads:
            pages = ring = None
            if num_retrieval:
                pages = PagedHeads(
                    num_retrieval, spec.pages_per_head, spec.device_pages_per_head, fmt,
                    self.device_pool, self.host_pool, device, mover,
                )  # fmt: skip
            if num_retrieval < spec.num_kv_heads:
                ring = Ring(
                    spec.num_kv_heads - num_retrieval, spec.ring_slots, spec.sink_size, spec.recent_size,
                    fmt.head_dim, exact_dtype(fmt), device,
                )  # fmt: skip
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
        fmt = self.spec.page_format
        if self.seq_len - fmt.closed_pages(self.seq_len) * fmt.page_size < fmt.page_size:
            return
        for pages, _ in self.layers:
            if pages is not None:
                pages.make_room(self.seq_len)

    def takes_in_place(self, start: int) -> bool:
        """Whether a token at `start` has room and can be written without flushing full tails before it."""
        fmt = self.spec.page_format
        return start < self.spec.capacity and start - fmt.closed_pages(start) * fmt.page_size < fmt.page_size

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
        for pages, ring in self.layers:
            for name, count in (pages.nbytes() if pages is not None else {}).items():
                total[name] += count
            total["rings"] += ring.nbytes if ring is not None else 0
        return total

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes().values())

    def check(self) -> None:
        """Conservation: free + used == total in both pools, every slot named once, page counts fit the length."""
        pooled = self.spec.page_format.pooled_pages(self.seq_len)
        on_device, on_host = [], []
        for pages, _ in self.layers:
            if pages is None:
                continue
            assert pages.num_pooled == pooled, (pages.num_pooled, pooled, self.seq_len)
            assert pages.num_pooled - pages.num_on_host <= pages.device_quota
            on_host.append(pages.table[:, : pages.num_on_host].reshape(-1))
            on_device.append(pages.table[:, pages.num_on_host : pages.num_pooled].reshape(-1))
            assert (pages.table[:, pages.num_pooled :] == -1).all()
        nothing = [torch.empty(0, dtype=torch.int32)]
        self.device_pool.check(torch.cat(on_device or nothing))
        self.host_pool.check(torch.cat(on_host or nothing))

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

    def mark(self) -> CacheMark:
        """Remember this length, to come back to it with `rewind`; costs a copy of tails and rings, no page."""
        pooled = self.spec.page_format.pooled_pages(self.seq_len)
        return CacheMark(self.seq_len, pooled, {n: t.detach().to("cpu", copy=True) for n, t in self.state().items()})

    def rewind(self, mark: CacheMark) -> None:
        """Drop everything appended since `mark`; pages that spilled meanwhile stay in the host pool."""
        assert mark.seq_len <= self.seq_len
        for pages, _ in self.layers:
            if pages is not None:
                pages.truncate(mark.num_pooled)
        self.load_state(mark.state)
        self.seq_len = mark.seq_len
