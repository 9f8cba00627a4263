"""A chunk's attention over pages: the chunk itself and the past in pieces, for both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from longrun.attention.fetch import PageFetcher
from longrun.attention.looked import LookedTokens
from longrun.attention.past import Run, past_pieces
from longrun.attention.sparse_past import SparsePast
from longrun.cache.page_places import HeadGroup
from longrun.cache.pages import PagedHeads
from longrun.kernels.dense_attention import PLAN_USES, padded_rows
from longrun.kernels.page_view import PageView
from longrun.quant.kv_format import PageFormat
from longrun.specs.attention_spec import AttentionSpec


@dataclass(frozen=True)
class PrefillKernels:
    """What a chunk's attention is made of, each with the signature that its own file documents.

    Attributes:
        dense_attention: `kernels.dense_attention.attention_with_lse`.
        merge_partial_: `kernels.merge_partial.merge_partial_`.
        dequantize_pages: `kernels.page_view.dequantize_pages`.
        window_attention: a chunk's heads of finite reach, as `kernels.banded_prefill.banded_prefill` with the past in
            order.
        dequantize_keys: `dequantize_pages` of keys alone; None where there is no such thing.
    """

    dense_attention: Callable[..., tuple[Tensor, Tensor]]
    merge_partial_: Callable[..., None]
    dequantize_pages: Callable[[PageView, Tensor, Tensor], None]
    window_attention: Callable[..., None]
    dequantize_keys: Callable[[PageView, Tensor], None] | None = None


class PagedPrefill:
    """Attention of the retrieval heads over a chunk of several tokens.

    Heads that keep every token attend to the chunk, then to the past as dense pieces, merged by log-sum-exp. Heads of a
    finite reach attend to the sinks and their window, masked a query.

    Args:
        spec: scratch and shape; the scratch is allocated here, once.
        fmt: of the pages.
        fetcher: brings host pages to the device; None where they are read where they stand.
        pads_chunks: whether chunks may be padded to `padded_rows`.
        sparse: reads the past of chunks that ask for it; None where none does.
    """

    def __init__(
        self, spec: AttentionSpec, fmt: PageFormat, dtype: torch.dtype, device: torch.device, kernels: PrefillKernels,
        fetcher: PageFetcher | None = None, pads_chunks: bool = False, sparse: SparsePast | None = None,
    ) -> None:  # fmt: skip
        self._spec, self._fmt, self._kernels, self._fetcher, self._sparse = spec, fmt, kernels, fetcher, sparse
        self._pads_chunks, self._softmax_scale = pads_chunks, spec.head_dim**-0.5
        self._plan_uses = max(PLAN_USES, spec.layers_alike)
        elements = spec.max_retrieval_heads * spec.scratch_tokens * spec.head_dim
        self._scratch = torch.empty(2, elements, dtype=dtype, device=device).fill_(0)

    def run(
        self, pages: PagedHeads, q: Tensor, k: Tensor, v: Tensor, start: int, out: Tensor,
        looked: LookedTokens | None = None, sparse_layer: int | None = None,
    ) -> None:  # fmt: skip
        """Attend to everything up to each query's own token.

        Args:
            q, out: [T, num_heads * group, head_dim], any strides with contiguous channels.
            k, v: [num_heads, T, head_dim], the chunk's own, rounded as the cache rounds them.
            looked: told how much attention the tokens before `start` get.
            sparse_layer: the layer, where heads that keep every token read chosen pages of the past alone.
        """
        assert sparse_layer is None or self._sparse is not None
        for group in pages.groups:
            queries = slice(group.heads.start * self._spec.group, group.heads.stop * self._spec.group)
            args = pages, group, q[:, queries], k[group.heads], v[group.heads], start, out[:, queries], looked
            if group.reach.is_all:
                self._attend_to_all(*args, sparse_layer)
            else:
                self._attend_to_window(*args)

    def _attend_to_all(
        self, pages: PagedHeads, group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, start: int, out: Tensor,
        looked: LookedTokens | None, sparse_layer: int | None,
    ) -> None:  # fmt: skip
        dense = partial(self._kernels.dense_attention, plan_uses=self._plan_uses)
        scale, tokens, num_pages = self._softmax_scale, len(q), self._fmt.pooled_pages(start)
        sparse = self._sparse if sparse_layer is not None and num_pages else None
        rows = tokens
        if self._pads_chunks:
            in_full = start if sparse is None else start - num_pages * self._fmt.page_size
            rows = padded_rows(q.shape[1], tokens, q.shape[2], in_full, self._spec.chunk_size)
        q = _with_rows(q.permute(1, 0, 2), rows)
        # causal: no query sees the padding, which stands last
        found, lse = dense(q, _padded(k, rows), _padded(v, rows), True, scale)
        if start == 0:
            out.copy_(found.permute(1, 0, 2))
            return
        packed = (group.num_heads, -1, q.shape[2])
        total, q = found.float().contiguous().view(packed), q.view(packed)
        lse = lse.contiguous().view(group.num_heads, -1)
        del found
        runs = self._past(pages, group, start) if sparse is None else self._exact(pages, group, start)
        dequantize = self._kernels.dequantize_pages
        for past_k, past_v in past_pieces(runs, group.num_heads, self._fmt, self._scratch, dequantize):
            found, found_lse = dense(q, past_k, past_v, False, scale)
            self._kernels.merge_partial_(total, lse, found.contiguous(), found_lse.contiguous())
            del found, found_lse
        by_head = (group.num_heads, -1, rows)
        if sparse is not None:
            assert looked is None and sparse_layer is not None
            by_query = [x.view(*by_head, *x.shape[2:])[:, :, :tokens] for x in (q, total, lse)]
            pieces = partial(self._pages_in_pieces, pages, group, num_pages)
            sparse.attend_(sparse_layer, group.heads.start * self._spec.group, *by_query, num_pages, pieces)
        out.copy_(total.view(out.shape[1], rows, out.shape[2])[:, :tokens].permute(1, 0, 2))
        del total
        if looked is not None:
            asking = q.view(*by_head, q.shape[2])[:, :, :tokens].flatten(1, 2)
            self._look(pages, group, asking, lse.view(by_head)[:, :, :tokens].flatten(1, 2), start, looked)

    def _look(
        self, pages: PagedHeads, group: HeadGroup, q: Tensor, lse: Tensor, start: int, looked: LookedTokens
    ) -> None:
        """Tell what queries [num_heads, rows, head_dim] attended to before `start`."""
        size, skipped = self._fmt.page_size, self._fmt.sink_pages
        sinks, tail = pages.sink_tokens(start)[0].shape[1], pages.tail_tokens(start)[0].shape[1]
        ranges = [part for parts in self._rounds(pages, group, 0, self._fmt.pooled_pages(start)) for part in parts]
        in_pages = [range((part.start + skipped) * size, (part.stop + skipped) * size) for part in ranges]
        left = [range(0, sinks), *in_pages, range(start - tail, start)]
        dequantize = self._kernels.dequantize_pages
        runs = self._past(pages, group, start)
        for past_k, _ in past_pieces(runs, group.num_heads, self._fmt, self._scratch, dequantize):
            places, count = [], past_k.shape[1]
            while count:
                place = left.pop(0)
                places.append(place[:count])
                if len(place) > count:
                    left.insert(0, place[count:])
                count -= len(places[-1])
            looked.add(q, past_k, lse, places)

    def past(self, pages: PagedHeads, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of tokens [0, seq_len) of heads that keep them all, see `past_pieces`."""
        (group,) = pages.groups
        runs = self._past(pages, group, seq_len)
        return past_pieces(runs, group.num_heads, self._fmt, self._scratch, self._kernels.dequantize_pages)

    def _past(self, pages: PagedHeads, group: HeadGroup, seq_len: int) -> Iterator[Run]:
        heads = group.heads
        k, v = pages.sink_tokens(seq_len)
        yield k[heads], v[heads]
        yield from self._ranges(pages, group, 0, self._fmt.pooled_pages(seq_len))
        k, v = pages.tail_tokens(seq_len)
        yield k[heads], v[heads]

    def _exact(self, pages: PagedHeads, group: HeadGroup, seq_len: int) -> Iterator[Run]:
        """What `_past` gives beside the pages."""
        for k, v in (pages.sink_tokens(seq_len), pages.tail_tokens(seq_len)):
            yield k[group.heads], v[group.heads]

    def _pages_in_pieces(
        self, pages: PagedHeads, group: HeadGroup, count: int, part: slice, keys_only: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of the first `count` pages of some of the group's heads, in pieces of as many tokens as those
        of all its heads have; the newest pages come last. With `keys_only` the values may be anything."""
        assert self._spec.prefill is not None
        first = group.heads.start
        some = replace(group, heads=slice(first + part.start, first + part.stop))
        border = max(0, count - self._spec.prefill.newest)
        runs = chain(self._ranges(pages, some, 0, border), self._ranges(pages, some, border, count))
        scratch = self._scratch[:, : self._scratch.shape[1] // group.num_heads * some.num_heads]
        dequantize, keys = self._kernels.dequantize_pages, self._kernels.dequantize_keys
        if keys_only and keys is not None:
            dequantize = lambda view, k, v: keys(view, k)  # noqa: E731
        return past_pieces(runs, some.num_heads, self._fmt, scratch, dequantize)

    def _ranges(self, pages: PagedHeads, group: HeadGroup, first: int, stop: int) -> Iterator[PageView]:
        """Pages [first, stop) as the device can read them, those on the host first."""
        on_host, on_device = self._rounds(pages, group, first, stop)
        if self._fetcher is not None:
            yield from self._fetcher.readable(pages.range_view(group, part.start, part.stop) for part in on_host)
        for part in on_device:
            yield pages.range_view(group, part.start, part.stop)

    def _rounds(self, pages: PagedHeads, group: HeadGroup, first: int, stop: int) -> tuple[list[range], list[range]]:
        """Pages [first, stop) in ranges as they are read: those to be fetched, then the others."""
        if self._fetcher is None:
            return [], [range(first, stop)]
        return pages.places.rounds(group, first, stop, self._fetcher.per_round(group.num_heads))

    def _attend_to_window(
        self, pages: PagedHeads, group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, start: int, out: Tensor,
        looked: LookedTokens | None,
    ) -> None:  # fmt: skip
        reach, per_kv = group.reach, self._spec.group
        sinks = min(reach.sink_size, start)
        first = max(sinks, start - reach.tokens)
        held = sinks + start - first
        unseen = int(start - first >= reach.tokens)  # has a place, and may stand in a page that was dropped
        shape = (len(q), -1, per_kv, q.shape[2])
        at_once = self._scratch.shape[1] // max(1, held * q.shape[2])
        assert at_once, f"the scratch has no room for {held} tokens of a head"
        for begin in range(0, group.num_heads, at_once):
            part = slice(begin, min(begin + at_once, group.num_heads))
            heads = slice(group.heads.start + part.start, group.heads.start + part.stop)
            some = HeadGroup(heads, reach)
            size = some.num_heads * held * q.shape[2]
            past_k, past_v = self._scratch[:, :size].view(2, some.num_heads, held, q.shape[2])
            self._copy_tokens(pages, some, 0, sinks, start, past_k, past_v)
            past_k[:, sinks : sinks + unseen], past_v[:, sinks : sinks + unseen] = 0, 0
            at = sinks + unseen
            self._copy_tokens(pages, some, first + unseen, start, start, past_k[:, at:], past_v[:, at:])
            queries = slice(part.start * per_kv, part.stop * per_kv)
            self._kernels.window_attention(
                q[:, queries].view(shape), k[part], v[part], past_k, past_v, start, reach.sink_size, reach.tokens,
                self._softmax_scale, out[:, queries].view(shape),
            )  # fmt: skip
            if looked is not None:
                looked.add_window(
                    q[:, queries].view(shape), k[part], past_k, start, first, reach.sink_size, reach.tokens
                )

    def _copy_tokens(
        self, pages: PagedHeads, group: HeadGroup, first: int, stop: int, seq_len: int, k: Tensor, v: Tensor
    ) -> None:
        """Tokens [first, stop), all held at `seq_len` tokens, to the front of k and v, [heads, n, head_dim]."""
        size, heads = self._fmt.page_size, group.heads
        sink_k, sink_v = pages.sink_tokens(seq_len)
        tail_k, tail_v = pages.tail_tokens(seq_len)
        pooled, tail_start = sink_k.shape[1], seq_len - tail_k.shape[1]
        for (of_k, of_v), at, end in (((sink_k, sink_v), 0, pooled), ((tail_k, tail_v), tail_start, seq_len)):
            begin, until = max(first, at), min(stop, end)
            if begin < until:
                k[:, begin - first : until - first].copy_(of_k[heads, begin - at : until - at])
                v[:, begin - first : until - first].copy_(of_v[heads, begin - at : until - at])
        begin, until = max(first, pooled), min(stop, tail_start)
        while begin < until:
            page = (begin - pooled) // size
            whole = (until - begin) // size if (begin - pooled) % size == 0 else 0
            view = pages.range_view(group, page, page + max(1, whole))
            if whole:
                to = slice(begin - first, begin - first + whole * size)
                self._kernels.dequantize_pages(view, k[:, to], v[:, to])
                begin += whole * size
                continue
            one_k, one_v = k.new_empty(2, group.num_heads, size, k.shape[2])
            self._kernels.dequantize_pages(view, one_k, one_v)
            skipped = (begin - pooled) % size
            count = min(size - skipped, until - begin)
            k[:, begin - first : begin - first + count].copy_(one_k[:, skipped : skipped + count])
            v[:, begin - first : begin - first + count].copy_(one_v[:, skipped : skipped + count])
            begin += count


def _padded(x: Tensor, rows: int) -> Tensor:
    """x [heads, T, head_dim] as it is, or with zeros behind where it needs more rows."""
    return x if rows == x.shape[1] else _with_rows(x, rows)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """x [heads, T, head_dim], contiguous, with zeros behind up to `rows`."""
    if rows == x.shape[1]:
        return x.contiguous()
    found = x.new_zeros(x.shape[0], rows, x.shape[2])
    found[:, : x.shape[1]] = x
    return found
