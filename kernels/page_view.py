"""Which pages a layer's heads read and where each stands; and the torch references that read them.

A `PageView` is what every reader of pages takes: decode attention, dequantizing, fetching. The compiled kernels share
the signatures of the functions here, which also serve where no compiled kernel can (the exact formats, or a machine
without a compiler).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages


@dataclass(frozen=True)
class PageView:
    """Pages of one layer that each KV head reads: a list of page numbers a head, of its own length.

    Head h reads the entries e = 0, 1, .. of its list, `num_entries(h)` of them: page `pages[h, begins[h] + skip + e]`.
    Page p of head h stands in slot `table[h, p]`: in `storage`, or from slot `other_slot` on in `other`. Its first
    token has the position (p + fmt.sink_pages) * page_size. A head sees the tokens at positions below `sink_size` and
    from `first[h]` on; a page may hold others, which are masked.

    Tensors that a captured CUDA graph reads keep their place; their contents are read when it runs.

    Attributes:
        storage: uint8 [num_slots, payload_bytes], payloads of the slots from 0 on.
        table: int32 [num_heads, max_pages], rows of contiguous items.
        index: float16 [num_heads, max_pages, 2, head_dim] by page number, or None for the exact formats.
        pages: int32 [num_heads, n], rows of contiguous items; heads may share one row (stride 0).
        begins, counts: int32 [num_heads], where each head's list begins in its row, and its length.
        first: int32 [num_heads], position of the oldest token that each head sees beside the sinks; 0 masks nothing.
        sink_size: tokens from position 0 on that every head sees, whatever `first` says.
        other: uint8 [slots, payload_bytes], a second memory: the host pool, or a buffer with pages fetched from it.
        skip, limit: the part of every list that is meant: entries [skip, skip + limit), as far as it goes.
    """

    storage: Tensor
    table: Tensor
    index: Tensor | None
    pages: Tensor
    begins: Tensor
    counts: Tensor
    first: Tensor
    fmt: PageFormat
    sink_size: int = 0
    other: Tensor | None = None
    other_slot: int = 2**31 - 1
    skip: int = 0
    limit: int = 2**31 - 1

    @property
    def num_heads(self) -> int:
        return self.table.shape[0]

    def part(self, skip: int, limit: int) -> PageView:
        """At most `limit` entries of every list, from entry `skip` of this view on."""
        assert skip >= 0 and limit >= 0
        return replace(self, skip=self.skip + skip, limit=max(0, min(limit, self.limit - skip)))

    def num_entries(self) -> Tensor:
        """int32 [num_heads]: entries of each head's list that this view means; on the lists' device."""
        return (self.counts - self.skip).clamp(0, self.limit)

    def fetched(self, buffer: Tensor, table: Tensor) -> PageView:
        """This view once `fetch_pages(self, buffer, table, ..)` has run, or `hot_lookup` and `hot_fetch`: no page of it
        stands in host memory any more."""
        return replace(self, table=table, other=buffer)


def view_of_all(
    storage: Tensor, table: Tensor, index: Tensor | None, fmt: PageFormat, **more: Tensor | int
) -> PageView:
    """Every page of the table in ascending order, nothing masked; `more`: further fields of the view."""
    heads, count = table.shape
    numbers = torch.arange(count, dtype=torch.int32, device=table.device).expand(heads, -1)
    zeros = torch.zeros(heads, dtype=torch.int32, device=table.device)
    return PageView(storage, table, index, numbers, zeros, torch.full_like(zeros, count), zeros, fmt, **more)


@dataclass(frozen=True)
class ExactTokens:
    """Unquantized tokens of one layer in two runs: those from position 0 on (the sink page), and the tail.

    Attributes:
        sink_k, sink_v, tail_k, tail_v: [num_heads, n, head_dim], bf16 or float32, channels and tokens contiguous.
        lengths: int32 [3]: sink tokens, tail tokens, position of the tail's first token. Read by a kernel when it runs.
    """

    sink_k: Tensor
    sink_v: Tensor
    tail_k: Tensor
    tail_v: Tensor
    lengths: Tensor


def check_view(view: PageView) -> None:
    """Assert what the compiled kernels ask of a view."""
    fmt, heads = view.fmt, view.num_heads
    for memory in (view.storage, view.other):
        if memory is not None:
            assert memory.dtype == torch.uint8 and memory.is_contiguous() and memory.shape[1] == fmt.payload_bytes
    for numbers in (view.table, view.pages):
        assert numbers.dtype == torch.int32 and numbers.shape[0] == heads and numbers.stride(1) == 1
    for numbers in (view.begins, view.counts, view.first):
        assert numbers.dtype == torch.int32 and numbers.shape == (heads,) and numbers.is_contiguous()
    if fmt.quantized:
        assert view.index is not None and view.index.dtype == torch.float16 and view.index[0].is_contiguous()
        assert view.index.shape[0] == heads and view.index.shape[2:] == (2, fmt.head_dim)


def _entries(view: PageView, head: int) -> Tensor:
    """int64 [n], the page numbers of one head."""
    start = int(view.begins[head]) + view.skip
    return view.pages[head, start : start + int(view.num_entries()[head])].long()


def _payloads(view: PageView, slots: Tensor) -> Tensor:
    """uint8 [n, payload_bytes] of int64 slots [n], on the slots' device."""
    here = slots < view.other_slot
    if view.other is None:
        assert bool(here.all()), "a slot of a second memory, and the view has none"
        return view.storage[slots]
    found = view.storage.new_empty(len(slots), view.storage.shape[1])
    found[here] = view.storage[slots[here]]
    found[~here] = view.other[(slots[~here] - view.other_slot).to(view.other.device)].to(found.device)
    return found


def dequantize_pages(view: PageView, k_out: Tensor, v_out: Tensor | None) -> None:
    """Write the listed pages' keys and values, entry e of head h to rows [e * page_size, (e + 1) * page_size).

    Args:
        k_out, v_out: [num_heads, n * page_size, head_dim] with n at least the longest list; rows beyond a head's own
            list are left alone. Nothing is masked. With v_out None only keys are written.
    """
    size = view.fmt.page_size
    for head in range(view.num_heads):
        pages = _entries(view, head)
        if len(pages) == 0:
            continue
        index = None if view.index is None else view.index[head, pages]
        k, v = decode_pages(_payloads(view, view.table[head, pages].long()), index, view.fmt)
        k_out[head, : len(pages) * size].copy_(k.flatten(0, 1))
        if v_out is not None:
            v_out[head, : len(pages) * size].copy_(v.flatten(0, 1))


def decode_attention(
    q: Tensor, view: PageView | None, exact: ExactTokens | None, *, softmax_scale: float = 1.0,
    out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token's attention over the listed pages and the exact tokens that each head sees.

    Args:
        q: bfloat16 or float32 [num_heads, group, head_dim]; scores are q . k * softmax_scale.
        view: None where there is no page; nothing is masked then.
        exact: the same heads' exact tokens, masked by position as pages are, or None.
        out, lse: where to write; None allocates.

    Returns:
        out: float32 [num_heads, group, head_dim]; lse: float32 [num_heads, group], natural log-sum-exp of the scores.
        A head that sees no token has 0 and -inf.
    """
    scaled = q.float() * softmax_scale
    out = torch.empty_like(scaled) if out is None else out
    lse = scaled.new_empty(scaled.shape[:2]) if lse is None else lse
    for head in range(q.shape[0]):
        keys, values, positions = [], [], [torch.empty(0, dtype=torch.int64, device=q.device)]
        if view is not None:
            pages, size = _entries(view, head), view.fmt.page_size
            index = None if view.index is None else view.index[head, pages]
            k, v = decode_pages(_payloads(view, view.table[head, pages].long()), index, view.fmt)
            start = (pages + view.fmt.sink_pages) * size
            positions.append((start[:, None] + torch.arange(size, device=q.device)).flatten())
            keys.append(k.flatten(0, 1).float())
            values.append(v.flatten(0, 1).float())
        if exact is not None:
            sinks, tails, tail_start = exact.lengths.tolist()
            for k, v, count, at in (
                (exact.sink_k, exact.sink_v, sinks, 0),
                (exact.tail_k, exact.tail_v, tails, tail_start),
            ):
                keys.append(k[head, :count].float())
                values.append(v[head, :count].float())
                positions.append(torch.arange(at, at + count, device=q.device))
        seen = torch.cat(positions)
        if view is not None:
            seen = (seen < view.sink_size) | (seen >= view.first[head])
        else:
            seen = torch.ones_like(seen, dtype=torch.bool)
        if not bool(seen.any()):
            out[head], lse[head] = 0, -torch.inf
            continue
        scores = scaled[head] @ torch.cat(keys)[seen].T
        lse[head] = scores.logsumexp(dim=-1)
        out[head] = torch.exp(scores - lse[head][:, None]) @ torch.cat(values)[seen]
    return out, lse
