"""Attention in torch over the dual cache, with the semantics of docs/architecture.md at every chunk size."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.looked import LookedTokens
from longrun.attention.prefill import PagedPrefill, PrefillKernels
from longrun.attention.rotation import HeadRotation
from longrun.attention.selected_pages import PageSelector
from longrun.attention.sparse_past import SparsePast, TileKernels
from longrun.attention.window import WindowAttention
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.ring import Ring
from longrun.kernels import page_view
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.cpu_tiles import attend_tiles_
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.kernels.page_view import ExactTokens
from longrun.kernels.tile_attention import choose_tiles_reference, score_tiles_reference
from longrun.quant.page_codec import exact_dtype
from longrun.specs.attention_spec import AttentionSpec


class TorchAttention:
    """Reads and appends to one `DualCache`.

    Keys and values are rounded to the cache's exact dtype before anything sees them, so that a chunk's own tokens
    and cached ones are the same numbers; what remains between chunk sizes is rounding, and with quantized pages the
    quantization of those tokens that had left the chunk.

    Args:
        cache: the sequence's cache.
        spec: scratch and shape; scratch is allocated here, once.
        compute_dtype: dtype of q and of the result.
        kernels: compiled CPU kernels for quantized pages, or None for plain torch.
        selector: chooses the pages that a decode step reads; None reads all.

    Attributes:
        sparse: what reads the past of chunks that are read sparsely; None where none is.
    """

    def __init__(
        self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: CpuPageKernels | None,
        selector: PageSelector | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.spec, self.selector = cache, spec, selector
        self.softmax_scale = spec.head_dim**-0.5
        self.group = spec.group
        fmt = cache.spec.page_format
        self.exact = exact_dtype(fmt)
        self._rotation = HeadRotation(fmt, compute_dtype, cache.device) if fmt.rotates_keys else None
        compiled = kernels is not None and fmt.quantized
        dequantize = kernels.dequantize_pages if kernels is not None and compiled else page_view.dequantize_pages
        self._window_attention = WindowAttention()
        used = PrefillKernels(attention_with_lse, _merge_partial_, dequantize, self._window_attention)
        self.sparse = None
        if spec.sparse_bytes():
            tiles = TileKernels(score_tiles_reference, choose_tiles_reference, attend_tiles_, attention_with_lse)
            self.sparse = SparsePast(spec, fmt.page_size, cache.device, tiles)
        self._prefill_pages = PagedPrefill(spec, fmt, compute_dtype, cache.device, used, sparse=self.sparse)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        pages, ring = self.cache.layers[layer_idx]
        k, v = self._as_stored(pages, q, k, v)
        if step.num_tokens == 1:
            self.cache.append(layer_idx, k, v, step.start)
            out = self._decode(layer_idx, q, step.start, step.selects).reshape(q.shape).to(q.dtype)
        else:
            sparse_layer = layer_idx if step.sparse else None
            out = self._prefill(pages, ring, q, k.to(q.dtype), v.to(q.dtype), step.start, sparse_layer=sparse_layer)
            self.cache.append(layer_idx, k, v, step.start)
        return self._unrotated(pages, out)

    def look(
        self, pages: PagedHeads | None, ring: Ring | None, q: Tensor, k: Tensor, v: Tensor, start: int,
        looked: LookedTokens,
    ) -> Tensor:  # fmt: skip
        """See `longrun.attention.look_back.Looks.look`."""
        k, v = self._as_stored(pages, q, k, v)
        return self._unrotated(pages, self._prefill(pages, ring, q, k.to(q.dtype), v.to(q.dtype), start, looked))

    def _as_stored(self, pages: PagedHeads | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v as the cache keeps them, [num_kv_heads, T, head_dim]; q is rotated with them, in place."""
        if pages is not None and self._rotation is not None:
            self._rotation.rotate_(q, k, v, pages.num_heads)
        return k.transpose(0, 1).to(self.exact), v.transpose(0, 1).to(self.exact)

    def _unrotated(self, pages: PagedHeads | None, out: Tensor) -> Tensor:
        if pages is not None and self._rotation is not None:
            self._rotation.unrotate_(out, pages.num_heads * self.group)
        return out

    def _decode(self, layer_idx: int, q: Tensor, position: int, selects: bool) -> Tensor:
        """float32 [num_kv_heads, group, head_dim] for q [1, num_qo_heads, head_dim]."""
        pages, ring = self.cache.layers[layer_idx]
        q = q[0].view(-1, self.group, q.shape[2])
        parts = []
        if pages is not None:
            parts.append(self.decode_pages(q[: pages.num_heads], layer_idx, pages, position, selects))
        if ring is not None:
            parts.append(
                self._decode_ring(q[q.shape[0] - ring.k.shape[0] :].float() * self.softmax_scale, ring, position)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_ring(self, scaled: Tensor, ring: Ring, position: int) -> Tensor:
        count = self.cache.place_of(position).ring_tokens
        k, v = (x[:, :count].float() for x in (ring.k, ring.v))
        return torch.softmax(scaled @ k.transpose(1, 2), dim=-1) @ v

    def decode_pages(
        self, q: Tensor, layer_idx: int, pages: PagedHeads, position: int, selects: bool = False
    ) -> Tensor:  # fmt: skip
        """float32 [num_heads, group, head_dim] for q [num_heads, group, head_dim], the token at `position`, whose key
        and value are in the tail. It reads all pages, or with `selects` what the selector chooses."""
        scaled = q.float() * self.softmax_scale
        selector = self.selector if selects and self.spec.leaves_out(pages.num_pooled) else None
        if selector is None and all(group.reach.is_all for group in pages.groups):
            out = lse = None
            for k, v in self._prefill_pages.past(pages, position + 1):
                found = attention_with_lse(scaled.to(k.dtype), k, v, False, 1.0)
                found = found[0].float(), found[1]
                out, lse = found if out is None else merge_partial(out, lse, *found)
            return out
        place = self.cache.place_of(position)
        lengths = torch.tensor([place.sink_tokens, place.tail_tokens, place.tail_start], dtype=torch.int32)
        exact = ExactTokens(pages.sink_k, pages.sink_v, pages.tail_k, pages.tail_v, lengths)
        self.cache.describe(position + 1)
        view = self.cache.view(layer_idx)
        if selector is not None:
            selector.choose(q, view, pages)
            view = selector.chosen(view)
        return page_view.decode_attention(scaled, view, exact)[0]

    def _prefill(
        self, pages: PagedHeads | None, ring: Ring | None, q: Tensor, k: Tensor, v: Tensor, start: int,
        looked: LookedTokens | None = None, sparse_layer: int | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        heads = 0 if pages is None else pages.num_heads
        split = heads * self.group
        if pages is not None:
            self._prefill_pages.run(
                pages, q[:, :split], k[:heads], v[:heads], start, out[:, :split], looked, sparse_layer
            )
        if ring is not None:
            shape = (q.shape[0], -1, self.group, q.shape[2])
            self._window_attention(
                q[:, split:].view(shape), k[heads:], v[heads:], *ring.in_order(start), start, ring.sink_size,
                ring.recent_size, self.softmax_scale, out[:, split:].view(shape),
            )  # fmt: skip
        return out


def _merge_partial_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """`merge_partial` in place."""
    lse.copy_(merge_partial(out, lse, other_out, other_lse)[1])
