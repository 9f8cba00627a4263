"""Host pages of one layer through the hot pool, alone, against reading them in place: what a decode step adds at a
share of hits.

A step chooses 512 pages a head, all on the host, scattered over a pinned pool of gigabytes. Calls rotate over lists
that share as many pages as the share of hits says; the others come back only when the pool has given their slots away.
Random content (synthetic). Slots, tables and pages are compared with the torch reference, and so are the hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from longrun.kernels import hot_pages
from longrun.kernels.hot_pages import HotPages
from longrun.kernels.hot_pages_cuda import FETCH_BLOCKS, CudaHotPages
from longrun.kernels.page_decode import Workspace
from longrun.kernels.page_decode_cuda import CudaPageDecode
from longrun.kernels.page_view import PageView, view_of_all
from longrun.quant.kv_format import PageFormat
from scripts.bench.bench_kernels import synthetic_layers
from scripts.bench.gpu_timer import gpu_times
from scripts.bench.kernel_rows import kernel_row

HEADS, GROUP, PAGES = 4, 4, 512  # Llama-3-8B with half of its KV heads kept
FMT = PageFormat("k5v3", 64, 128)
SLOTS = 4 * PAGES
HOST_BYTES = 8 * 2**30
HITS = (0.0, 0.8, 1.0)
BLOCKS = (16, 32, 64, 128, 264)


def host_view(host_bytes: int) -> PageView:
    """Pages that all stand in pinned memory, at random places of it."""
    (view, _), *_ = synthetic_layers(1, HEADS, 2048, FMT.head_dim, FMT.name)
    count = max(HEADS * 16 * PAGES, host_bytes // FMT.payload_bytes) // HEADS * HEADS
    pool = torch.empty(count, FMT.payload_bytes, dtype=torch.uint8, pin_memory=True)
    for part in pool.split(len(view.storage)):
        part.copy_(view.storage[: len(part)])
    table = torch.randperm(count, device="cuda").view(HEADS, -1).int()
    index = torch.zeros(*table.shape, 2, FMT.head_dim, dtype=torch.float16, device="cuda")
    index[:, :, 0] = 0.05
    return view_of_all(view.storage, table, index, FMT, other=pool, other_slot=0)


def lists(view: PageView, hits: float) -> list[PageView]:
    """Views of PAGES pages a head in ascending order, for steps in turn; each finds this share of them in the pool."""
    common = round(hits * PAGES)
    others = PAGES - common
    turns = 2 if others == 0 else SLOTS // others + 2
    order = torch.rand(HEADS, view.table.shape[1], device="cuda").argsort(dim=1).int()
    found = []
    for turn in range(turns):
        first = common + turn * others
        chosen = torch.cat((order[:, :common], order[:, first : first + others]), dim=1).sort(dim=1).values
        counts = torch.full_like(view.counts, PAGES)
        found.append(replace(view, pages=chosen, counts=counts))
    return found


def empty_pool(view: PageView) -> HotPages:
    full = partial(torch.full, fill_value=-1, dtype=torch.int32, device="cuda")
    order = torch.arange(SLOTS, dtype=torch.int32, device="cuda").repeat(HEADS, 1)
    memory = torch.full((HEADS * SLOTS, FMT.payload_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    return HotPages(memory, full(tuple(view.table.shape)), order, full((HEADS, SLOTS)), full((HEADS, PAGES, 2)),
                    full((HEADS, 2)))  # fmt: skip


def check(kernels: Any, hot: HotPages, views: list[PageView], missed: int) -> None:
    """One more step by the kernels and by the reference: the same, and as many misses as the rows say."""
    for view in views * 2:  # into the rhythm of the lists
        kernels.hot_lookup(view, hot)
        kernels.hot_fetch(view, hot)
    expected = HotPages(*(tensor.clone() for tensor in vars(hot).values()))
    for by, pool in ((kernels, hot), (hot_pages, expected)):
        by.hot_lookup(views[0], pool)
        by.hot_fetch(views[0], pool)
    assert all(map(torch.equal, vars(hot).values(), vars(expected).values())), "the timed kernels do something else"
    assert hot.counts.tolist() == [[PAGES, missed]] * HEADS, (hot.counts.tolist(), missed)


def measure(host_bytes: int = HOST_BYTES) -> Iterator[dict[str, Any]]:
    """Rows of lookup, lookup with fetch, and with attention; attention that reads the host pages in place; and fetching
    by other numbers of blocks."""
    torch.manual_seed(0)
    whole, shape = host_view(host_bytes), f"{HEADS} heads x {PAGES} pages of {FMT.payload_bytes} bytes"
    decode = CudaPageDecode(FMT.head_dim, kv_format=FMT.name)
    space = Workspace.empty(HEADS, decode.default_splits(HEADS), GROUP, FMT.head_dim, torch.device("cuda"))
    q = (torch.randn(HEADS, GROUP, FMT.head_dim, device="cuda") * 0.2).bfloat16()
    out, lse = torch.empty(q.shape, device="cuda"), torch.empty(q.shape[:2], device="cuda")
    attend = partial(decode.decode_attention, q, exact=None, workspace=space, out=out, lse=lse)
    row = partial(kernel_row, shape=shape, ceiling="host_to_device")
    step_bytes = HEADS * PAGES * FMT.payload_bytes
    in_place = [partial(attend, view=view) for view in lists(whole, 0.0)]
    yield row("decode in place", times=gpu_times(*in_place), num_bytes=step_bytes)
    for hits in HITS:
        views, hot = lists(whole, hits), empty_pool(whole)
        kernels, missed = CudaHotPages(FMT.payload_bytes), PAGES - round(hits * PAGES)

        def fetch(view: PageView, by: Any = kernels, hot: HotPages = hot) -> PageView:
            by.hot_lookup(view, hot)
            by.hot_fetch(view, hot)
            return view.fetched(hot.memory, hot.table)

        def read(view: PageView, fetch: Any = fetch) -> None:
            attend(view=fetch(view))

        num_bytes, settings = HEADS * missed * FMT.payload_bytes, {"hits": f"{hits:.0%}"}
        check(kernels, hot, views, missed)
        looked = gpu_times(*(partial(kernels.hot_lookup, view, hot) for view in views))
        yield row("hot_lookup", times=looked, num_bytes=0, settings=settings)
        check(kernels, hot := empty_pool(whole), views, missed)  # a lookup alone has entered pages that are not there
        fetched = gpu_times(*(partial(fetch, view, hot=hot) for view in views))
        check(kernels, hot, views, missed)
        settings = {**settings, "blocks": FETCH_BLOCKS}
        yield row("hot_lookup, hot_fetch", times=fetched, num_bytes=num_bytes, settings=settings)
        attended = gpu_times(*(partial(read, view, partial(fetch, hot=hot)) for view in views))
        yield row("hot_lookup, hot_fetch, decode", times=attended, num_bytes=num_bytes, settings=settings)
        for blocks in BLOCKS if hits == 0 else ():
            other = CudaHotPages(FMT.payload_bytes, fetch_blocks=blocks)
            times = gpu_times(*(partial(fetch, view, other, hot) for view in views))
            check(other, hot, views, missed)
            yield row(
                "hot_lookup, hot_fetch", times=times, num_bytes=num_bytes, settings={**settings, "blocks": blocks}
            )
