"""Decode through GPU kernels over quantized pages, in a form that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longrun.attention.decode_state import DecodeState
from longrun.attention.fetch import PageFetcher
from longrun.attention.interface import FusedDecode
from longrun.attention.selected_pages import PageSelector
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.spans import DEVICE, HOST
from longrun.kernels.gpu_kernels import GpuKernels
from longrun.kernels.page_decode import Workspace
from longrun.kernels.page_view import ExactTokens, PageView
from longrun.kernels.ring_decode import RingWorkspace, default_splits
from longrun.quant.rotation import random_signs
from longrun.specs.attention_spec import AttentionSpec


class CudaDecode(FusedDecode):
    """One token's attention over a `DualCache` with quantized pages; all buffers are allocated here.

    Pages on the device are read in place; pages in host memory are fetched ahead of the layer that needs them. In a
    pass that selects pages, those in host memory are read in place, or with a hot pool through it.

    Args:
        fetcher: brings host pages to the device.
        selector: chooses the pages that a pass which selects reads; None: no pass does.
        compute_dtype: of the projection's output and of the result.

    Attributes:
        state: what the token is, on the device.
    """

    def __init__(
        self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: GpuKernels,
        fetcher: PageFetcher, selector: PageSelector | None = None,
    ) -> None:  # fmt: skip
        self.cache, self._spec, self._kernels, self._fetcher = cache, spec, kernels, fetcher
        self._selector = selector
        self._softmax_scale, self._compute_dtype = spec.head_dim**-0.5, compute_dtype
        fmt, device = cache.spec.page_format, cache.device
        self._rotates_values = fmt.rotates_values
        self._signs = random_signs(spec.head_dim).to(device) if fmt.rotates_keys else None
        self._fetched: Iterator[PageView] = iter(())
        self._selects = False
        self.state = DecodeState(spec.head_dim, device)
        shape = (spec.num_qo_heads, spec.head_dim)
        self._q = torch.zeros(shape, dtype=compute_dtype, device=device)
        self._out = torch.zeros(shape, device=device)
        self._part = torch.zeros(shape, device=device)
        self._unrotated = torch.zeros(shape if self._rotates_values else (0,), dtype=compute_dtype, device=device)
        self._lse, self._part_lse = torch.zeros(2, spec.num_qo_heads, device=device)
        self._workspaces = {
            n: Workspace.empty(n, kernels.default_splits(n), spec.group, spec.head_dim, device)
            for n in sorted({n for n in cache.spec.retrieval_heads if n})
        }
        ring_heads = spec.num_kv_heads - min(cache.spec.retrieval_heads)
        self._ring_workspace = RingWorkspace.make(
            ring_heads * spec.group, default_splits(cache.spec.ring_slots), spec.head_dim, device
        )
        held = [self._ring_workspace.partials, self._ring_workspace.counters]
        held += [self._q, self._out, self._part, self._unrotated, self._lse, self._part_lse]
        held += [tensor for space in self._workspaces.values() for tensor in (space.out, space.stats)]
        held_bytes = sum(tensor.nbytes for tensor in held) + fetcher.nbytes + (selector.nbytes if selector else 0)
        assert held_bytes <= spec.decode_bytes(), (held_bytes, spec.decode_bytes())

    def begin_decode(self, token_id: int | None, start: int, cos: np.ndarray, sin: np.ndarray) -> None:
        """Make room for one token and describe it to the device.

        Args:
            token_id: None where the device already knows it.
            start: the token's position: the cache's length, or one beyond it where `takes_in_place` allows that.
            cos, sin: float32 [head_dim], of the token's position.
        """
        cache = self.cache
        if start == cache.seq_len:
            cache.make_room()
        else:
            assert start == cache.seq_len + 1 and cache.takes_in_place(start), (start, cache.seq_len)
        cache.describe(start + 1)
        self.state.fill(token_id, cache.place_of(start), cos, sin)

    @property
    def passes(self) -> tuple[bool, ...]:
        """What `selects` of `decode_pass` may be."""
        return (False,) if self._selector is None else (False, True)

    def selects_at(self, start: int) -> bool:
        """Whether the pass of the token at position `start` selects pages."""
        return self._spec.selects_with(self.cache.spec.page_format.pooled_pages(start + 1))

    def decode_pass(self, layers: Callable[[Callable[..., Tensor]], Tensor], selects: bool) -> Tensor:
        """Run `layers` with this backend's decode, host pages being fetched ahead from layer to layer.

        Args:
            layers: called with `FusedDecode.decode`; must call it once a layer, in order.
            selects: the pass reads selected pages, without fetching any, instead of all.
        """
        assert selects in self.passes
        self._selects = selects
        host_views = (
            part
            for layer_idx, (pages, _) in enumerate(self.cache.layers)
            if pages is not None
            for part in self._host_parts(layer_idx, pages)
        )
        self._fetched = self._fetcher.readable(host_views)
        result = layers(self.decode)
        assert next(self._fetched, None) is None, "a layer did not read its host pages"
        return result

    def _host_parts(self, layer_idx: int, pages: PagedHeads) -> list[PageView]:
        """The layer's pages on the host that are fetched, as many at a time as are fetched at once: as many parts as
        there may ever be, since a graph is captured once."""
        most = self.cache.spec.host_pages_per_head
        if not most or self._selects:
            return []
        per_round, view = self._fetcher.per_round(pages.num_heads), self.cache.view(layer_idx, HOST)
        return [view.part(first, per_round) for first in range(0, most, per_round)]

    def decode(self, layer_idx: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> Tensor:
        """See `FusedDecode.decode`; within `decode_pass`."""
        pages, ring = self.cache.layers[layer_idx]
        state, group = self.state, self._spec.group
        self._kernels.rope_store(
            qkv.view(-1), state.cos, state.sin, self._q,
            None if pages is None else pages.tail_k, None if pages is None else pages.tail_v,
            None if ring is None else ring.k, None if ring is None else ring.v,
            state.slots, self._spec.num_qo_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, signs=self._signs,
            rotate_values=self._rotates_values,
        )  # fmt: skip
        split = 0 if pages is None else pages.num_heads * group
        if ring is not None:
            shape = (-1, group, self._spec.head_dim)
            self._kernels.ring_decode(
                self._q[split:].view(shape), ring.k, ring.v, state.ring_len, self._softmax_scale,
                self._out[split:].view(shape), self._ring_workspace,
            )  # fmt: skip
        if pages is not None:
            self._decode_pages(layer_idx, pages)
            if self._rotates_values:
                self._kernels.unrotate(self._out, self._signs, split, self._unrotated)
                return self._unrotated.view(1, -1)
        return self._out.view(1, -1).to(self._compute_dtype)

    def _decode_pages(self, layer_idx: int, pages: PagedHeads) -> None:
        heads, group = pages.num_heads, self._spec.group
        split, shape = heads * group, (heads, group, self._spec.head_dim)
        q, out, lse = self._q[:split].view(shape), self._out[:split].view(shape), self._lse[:split].view(heads, group)
        decode = partial(
            self._kernels.decode_attention, q, softmax_scale=self._softmax_scale, workspace=self._workspaces[heads]
        )
        exact = ExactTokens(pages.sink_k, pages.sink_v, pages.tail_k, pages.tail_v, self.state.lengths)
        if self._selects:
            assert self._selector is not None
            view = self.cache.view(layer_idx)
            self._selector.choose(q, view, pages)
            decode(self._through_hot_pool(layer_idx, self._selector.chosen(view)), exact, out=out, lse=lse)
            return
        decode(self.cache.view(layer_idx, DEVICE), exact, out=out, lse=lse)
        part, part_lse = self._part[:split].view(shape), self._part_lse[:split].view(heads, group)
        for _ in self._host_parts(layer_idx, pages):
            decode(next(self._fetched), None, out=part, lse=part_lse)
            self._kernels.merge_partial_(out, lse, part, part_lse)

    def _through_hot_pool(self, layer_idx: int, view: PageView) -> PageView:
        """The same pages, those on the host read from the hot pool, where there is one."""
        hot = None if self.cache.hot is None else self.cache.hot.layer(layer_idx)
        if hot is None:
            return view
        self._kernels.hot_lookup(view, hot)
        self._kernels.hot_fetch(view, hot)
        return view.fetched(hot.memory, hot.table)
