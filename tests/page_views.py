"""Page views for tests: lists of any length and order, pages in two memories, garbage wherever nothing is meant."""

from dataclasses import replace

import torch

from longrun.kernels.page_view import ExactTokens, PageView
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages

UNREAD = -(2**30)  # as a page number or a slot: far outside of everything
ALL = 2**31 - 1
FEW_AND_MANY = (0, 1, 63, 64, 131)  # pages a head; 64 are two batches of a warp's lanes


def random_pages(heads, pages, fmt, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, 1, 1, fmt.head_dim, generator=g) * 4  # channels of unlike size, as keys have
    k = torch.randn(heads, pages, fmt.page_size, fmt.head_dim, generator=g) * scale + scale.flip(-1)
    v = torch.randn(heads, pages, fmt.page_size, fmt.head_dim, generator=g)
    return k, v + torch.randn(heads, pages, 1, fmt.head_dim, generator=g)


def scattered_view(
    fmt: PageFormat,
    counts,
    *,
    skip=0,
    limit=ALL,
    sink_size=0,
    first=0,
    other_slot=1000,
    shared=False,
    device="cpu",
    seed=0,
) -> PageView:
    """Lists of `counts` pages a head, in random order from a random place of their rows on; `shared`: one row and place
    for all heads. About half of the pages stand in `other`; with `other_slot` None there is none. What a reader has no
    business with is garbage: slots and index of pages that are not meant, and entries around the lists."""
    heads, max_pages = len(counts), max(counts) + 4
    g = torch.Generator().manual_seed(seed)
    payload, index = encode_pages(*random_pages(heads, max_pages, fmt, seed), fmt)
    order = torch.randperm(heads * max_pages, generator=g).view(heads, max_pages)
    here = heads * max_pages if other_slot is None else min((heads * max_pages + 1) // 2, other_slot)
    memories = torch.randint(0, 256, (heads * max_pages + 3, fmt.payload_bytes), dtype=torch.uint8, generator=g)
    table = torch.full((heads, max_pages + 3), UNREAD, dtype=torch.int32)[:, 2:-1]
    used_index = None if index is None else torch.full_like(index, torch.nan)
    begins = torch.randint(0, 5, (heads,), dtype=torch.int32, generator=g)
    begins = begins[:1].repeat(heads) if shared else begins
    row = torch.randperm(max_pages, generator=g)
    pages = torch.full((heads, max_pages + 8), UNREAD, dtype=torch.int32)
    for head, count in enumerate(counts):
        listed = (row if shared else torch.randperm(max_pages, generator=g))[skip : min(count, skip + limit)]
        if shared:
            listed = row[skip : min(max(counts), skip + limit)]
        start = int(begins[head]) + skip
        pages[head, start : start + len(listed)] = listed
        meant = listed[: max(0, min(count - skip, limit))]
        memories[order[head, meant]] = payload[head, meant]
        slots = order[head, meant]
        table[head, meant] = torch.where(slots < here, slots, slots - here + (other_slot or 0)).int()
        if index is not None:
            used_index[head, meant] = index[head, meant]
    first = torch.as_tensor(first, dtype=torch.int32).expand(heads).contiguous()
    to = lambda x: None if x is None else x.to(device)  # noqa: E731
    pages = pages[:1].to(device).expand(heads, -1) if shared else pages.to(device)
    counts = torch.tensor(counts, dtype=torch.int32, device=device)
    more = {} if other_slot is None else {"other": to(memories[here:].clone()), "other_slot": other_slot}
    return PageView(
        to(memories[: len(memories) if other_slot is None else here].clone()), to(table), to(used_index), pages,
        to(begins), counts, to(first), fmt, sink_size, skip=skip, limit=limit, **more,
    )  # fmt: skip


def exact_tokens(heads, fmt, sinks, tails, tail_start, *, room=None, dtype=torch.bfloat16, device="cpu", seed=9):
    """Exact tokens; what `lengths` does not name is NaN."""
    g, room = torch.Generator().manual_seed(seed), room or fmt.page_size
    found = torch.randn(4, heads, room, fmt.head_dim, generator=g).to(dtype)
    found[:2, :, sinks:] = found[2:, :, tails:] = torch.nan
    return ExactTokens(*found.to(device), torch.tensor([sinks, tails, tail_start], dtype=torch.int32, device=device))


def listed(view: PageView, head: int) -> list[int]:
    """The page numbers that a head reads, by the words of `PageView`."""
    begin, count = int(view.begins[head]), int(view.counts[head])
    return [int(view.pages[head, begin + e]) for e in range(count)][view.skip :][: view.limit]


def page_tensors(view: PageView, head: int, page: int):
    """float32 keys and values [page_size, head_dim] of one page, on the CPU."""
    slot = int(view.table[head, page])
    payload = view.storage[slot] if slot < view.other_slot else view.other[slot - view.other_slot]
    return decode_pages(payload.cpu(), None if view.index is None else view.index[head, page].cpu(), view.fmt)


def in_order(view: PageView) -> PageView:
    """The same pages in the same order under the numbers 0, 1, ..: one memory, one shared row, nothing skipped."""
    numbers, lists = view.num_entries().tolist(), [listed(view, head) for head in range(view.num_heads)]
    storage = torch.full((sum(numbers) + 1, view.fmt.payload_bytes), 0xAA, dtype=torch.uint8)
    table = torch.full((len(lists), max(*numbers, 1)), UNREAD, dtype=torch.int32)
    index = torch.full((*table.shape, 2, view.fmt.head_dim), torch.nan, dtype=torch.float16)
    at = 0
    for head, pages in enumerate(lists):
        for e, page in enumerate(pages):
            slot = int(view.table[head, page])
            storage[at] = view.storage[slot] if slot < view.other_slot else view.other[slot - view.other_slot]
            table[head, e], index[head, e], at = at, view.index[head, page], at + 1
    device, zeros = view.table.device, torch.zeros_like(view.begins)
    row = torch.arange(table.shape[1], dtype=torch.int32, device=device).expand(len(lists), -1)
    return replace(
        view, storage=storage.to(device), table=table.to(device), index=index.to(device), pages=row, begins=zeros,
        counts=view.num_entries().int(), other=None, other_slot=ALL, skip=0, limit=ALL,
    )  # fmt: skip
