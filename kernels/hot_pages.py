"""Device memory for the host pages that selected decode chose lately: which page gets which slot, in torch.

Of every head the least recently chosen pages make room for those that a step chooses and that are not there. All of it
happens on the device, in steps that a captured CUDA graph replays: `hot_lookup` after the pages were chosen,
`hot_fetch` for those that were missing, and then attention over `view.fetched(hot.memory, hot.table)`. `hot_pages_cuda`
has the GPU's kernels with these signatures; these serve any device, and wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.kernels.page_view import PageView, check_view


@dataclass(frozen=True)
class HotPages:
    """The slots of one layer's heads and what stands in them. Row h * slots + s of the memory is slot s of head h.

    Attributes:
        memory: uint8 [hot_heads * slots, payload_bytes]: the first `hot_heads` heads have slots; the pages of others
            all stand on the device.
        table: int32 [num_heads, max_pages]: where each page was read last, by the slots of a view that this memory is
            the `other` of: `other_slot` + row where it is in the memory now. Begins with -1, and is set back to -1 for
            a page that will get another content.
        order: int32 [hot_heads, slots]: slots by the step that last chose their page, the longest ago first; of one
            step in the order of its list. Begins with 0, 1, 2, ..
        owner: int32 [hot_heads, slots]: the page that each slot was filled for; begins with -1. It stands there as long
            as the table says so.
        missed: int32 [num_heads, most, 2]: of each page to fetch its row, and its place in the view's second memory.
            Layers may share one.
        counts: int32 [num_heads, 2]: pages of the last step that stand on the host, and how many of them were missed.
    """

    memory: Tensor
    table: Tensor
    order: Tensor
    owner: Tensor
    missed: Tensor
    counts: Tensor

    @property
    def hot_heads(self) -> int:
        return self.order.shape[0]

    @property
    def slots(self) -> int:
        return self.order.shape[1]


def check_hot_shapes(view: PageView, hot: HotPages) -> None:
    """Assert what `hot_lookup` and `hot_fetch` ask of their arguments."""
    check_view(view)
    heads, most = view.num_heads, hot.missed.shape[1]
    assert view.other is not None and view.other.shape[1] == hot.memory.shape[1]
    assert hot.memory.dtype == torch.uint8 and hot.memory.is_contiguous()
    assert hot.memory.shape[0] == hot.hot_heads * hot.slots and hot.hot_heads <= heads
    assert view.other_slot + len(hot.memory) < 2**31
    assert hot.table.dtype == torch.int32 and hot.table.shape == view.table.shape and hot.table.stride(1) == 1
    assert hot.order.dtype == hot.owner.dtype == torch.int32 and hot.order.shape == hot.owner.shape
    assert hot.order.is_contiguous() and hot.owner.is_contiguous()
    assert hot.missed.dtype == torch.int32 and hot.missed.shape == (heads, most, 2) and hot.missed.is_contiguous()
    assert hot.counts.dtype == torch.int32 and hot.counts.shape == (heads, 2) and hot.counts.is_contiguous()
    longest = min(view.limit, max(0, view.pages.shape[1] - view.skip))
    assert longest <= most and longest <= hot.slots, f"lists of {longest} pages, {hot.slots} slots, room for {most}"


def hot_lookup(view: PageView, hot: HotPages) -> None:
    """Give every listed page that stands in the view's second memory a slot, and enter it into `hot.table`.

    A page that has a slot keeps it. Those that have none get the slots that no page of this list has, the longest
    unused first, in the order of the list. Listed pages that stand on the device are entered as they are.

    Args:
        view: the pages that the step chose, none of them twice in a list; lists no longer than `hot.slots`. Everything
            is read on the device when this runs.
        hot: changed in place; what `missed` holds beyond the missed pages stays.
    """
    check_hot_shapes(view, hot)
    lists = zip(view.begins.tolist(), view.num_entries().tolist(), strict=True)
    for head, (begin, count) in enumerate(lists):
        pages = view.pages[head, begin + view.skip :][:count].long()
        slots, table, first = view.table[head, pages], hot.table[head], view.other_slot + head * hot.slots
        on_host = slots >= view.other_slot
        table[pages[~on_host]] = slots[~on_host]
        hot.counts[head] = 0
        if head >= hot.hot_heads:
            assert not bool(on_host.any()), f"head {head} has no slots, and pages on the host"
            continue
        pages, slots, order, owner = pages[on_host], slots[on_host], hot.order[head].long(), hot.owner[head]
        hit = table[pages] >= view.other_slot
        used = torch.zeros(hot.slots, dtype=torch.bool, device=order.device)
        used[table[pages[hit]].long() - first] = True
        idle = order[~used[order]]
        count = len(pages) - int(hit.sum())
        given, gone = idle[:count], owner[idle[:count]].long()
        gone = gone[(gone >= 0) & (table[gone] == first + given)]  # not where the page has got another slot since
        table[gone] = -1
        owner[given], table[pages[~hit]] = pages[~hit].int(), (first + given).int()
        hot.order[head] = torch.cat((idle[count:], table[pages].long() - first)).int()
        hot.missed[head, :count, 0] = (head * hot.slots + given).int()
        hot.missed[head, :count, 1] = slots[~hit] - view.other_slot
        hot.counts[head] = torch.tensor([len(pages), count], dtype=torch.int32)


def hot_fetch(view: PageView, hot: HotPages) -> None:
    """Copy the pages that `hot_lookup` missed to their slots.

    Args:
        view: that of the lookup; `other` is host memory that CUDA has pinned or registered, or device memory.
    """
    check_hot_shapes(view, hot)
    assert view.other is not None
    for head, (_, count) in enumerate(hot.counts.tolist()):
        rows, places = hot.missed[head, :count].long().T
        hot.memory[rows] = view.other[places.to(view.other.device)].to(hot.memory.device)
