"""Decode through the CPU's compiled kernels, as calls that are prepared once and run for every token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from longrun.attention.decode_state import DecodeState
from longrun.attention.interface import FusedDecode
from longrun.attention.torch_backend import TorchAttention
from longrun.cache.pages import PagedHeads
from longrun.kernels.cpu_kernels import CpuKernels
from longrun.kernels.cpu_select import CPU_MAX_GROUP
from longrun.kernels.page_view import ExactTokens, PageView
from longrun.kernels.prepared_call import PreparedCall
from longrun.quant.rotation import random_signs


class CpuDecode(FusedDecode):
    """One token's attention over a `DualCache` on a CPU.

    Args:
        attention: over the same cache; attends to pages of the exact formats, which have no compiled kernel.
        compute_dtype: of the projection's output and of the result.

    Attributes:
        state: what the token is.
        calls: where `decode` puts the calls that attend; whoever runs them sets it before.
        selects: whether those calls select pages; set before, too.
    """

    def __init__(self, attention: TorchAttention, compute_dtype: torch.dtype, kernels: CpuKernels) -> None:
        self.cache, self._spec, self._kernels = attention.cache, attention.spec, kernels
        self._attention, self._compute_dtype = attention, compute_dtype
        fmt = self.cache.spec.page_format
        self._compiled_pages, self._rotates_values = fmt.quantized, fmt.rotates_values
        self._signs = random_signs(self._spec.head_dim) if fmt.rotates_keys else None
        self.state = DecodeState(self._spec.head_dim, self.cache.device)
        self._ring_lengths = torch.zeros(3, dtype=torch.int32)
        shape = (self._spec.num_qo_heads, self._spec.head_dim)
        self._q, self._result = torch.zeros(2, *shape, dtype=compute_dtype)
        self._out, self._lse = torch.zeros(shape), torch.zeros(self._spec.num_qo_heads)
        self.calls: list[Callable[[], object]] = []
        self.selects = False

    def selects_at(self, start: int) -> bool:
        """Whether the step of the token at position `start` selects pages."""
        return self._spec.selects_with(self.cache.spec.page_format.pooled_pages(start + 1))

    def begin_decode(self, start: int, cos: np.ndarray, sin: np.ndarray) -> None:
        """Make room for the token at position `start`, the cache's length, and describe it.

        Args:
            cos, sin: float32 [head_dim], of its position.
        """
        assert start == self.cache.seq_len
        self.cache.make_room()
        self.cache.describe(start + 1)
        self.state.fill(0, self.cache.place_of(start), cos, sin)
        self._ring_lengths[:1].copy_(self.state.ring_len)

    def decode(self, layer_idx: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> Tensor:
        """See `FusedDecode.decode`: prepares it, and returns where its calls will leave the result."""
        pages, ring = self.cache.layers[layer_idx]
        spec, state = self._spec, self.state
        self.calls.append(
            self._kernels.rope_store.prepare(
                qkv, state.cos, state.sin, self._q,
                None if pages is None else pages.tail_k, None if pages is None else pages.tail_v,
                None if ring is None else ring.k, None if ring is None else ring.v,
                state.slots, spec.num_qo_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, signs=self._signs,
                rotate_values=self._rotates_values,
            )
        )  # fmt: skip
        split = 0 if pages is None else pages.num_heads * spec.group
        if pages is not None:
            self._attend_to_pages(layer_idx, pages, *self._part(slice(0, split)))
        if ring is not None:
            q, out, lse = self._part(slice(split, spec.num_qo_heads))
            exact = ExactTokens(ring.k, ring.v, ring.k[:, :0], ring.v[:, :0], self._ring_lengths)
            self._prepare_decode(q, None, exact, out, lse)
        rotated = split if self._rotates_values else 0
        if not rotated and self._compute_dtype == torch.float32:
            return self._out.view(1, -1)
        self.calls.append(
            self._kernels.rope_store.prepare_unrotate(self._out, self._signs, rotated, self._result)
        )  # fmt: skip
        return self._result.view(1, -1)

    def _part(self, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """q, out [num_kv_heads, group, head_dim] and lse [num_kv_heads, group] of some query heads."""
        shape = (-1, self._spec.group, self._spec.head_dim)
        return self._q[heads].view(shape), self._out[heads].view(shape), self._lse[heads].view(shape[:2])

    def _attend_to_pages(self, layer_idx: int, pages: PagedHeads, q: Tensor, out: Tensor, lse: Tensor) -> None:
        if not self._compiled_pages:
            attend: Callable[[], object] = lambda: out.copy_(  # noqa: E731
                self._attention.decode_pages(q, layer_idx, pages, self.cache.seq_len)
            )
            self.calls.append(PreparedCall(attend))
            return
        exact = ExactTokens(pages.sink_k, pages.sink_v, pages.tail_k, pages.tail_v, self.state.lengths)
        view, selector = self.cache.view(layer_idx), self._attention.selector
        if self.selects:
            assert selector is not None
            if self._spec.group <= CPU_MAX_GROUP:
                self.calls += selector.prepare(self._kernels.select, q, view, pages)
            else:
                self.calls.append(PreparedCall(selector.choose, q, view, pages))
            view = selector.chosen(view)
        self._prepare_decode(q, view, exact, out, lse)

    def _prepare_decode(
        self, q: Tensor, view: PageView | None, exact: ExactTokens, out: Tensor, lse: Tensor
    ) -> None:  # fmt: skip
        prepare = self._kernels.pages.prepare_decode
        self.calls.append(prepare(q, view, exact, softmax_scale=self._attention.softmax_scale, out=out, lse=lse))
