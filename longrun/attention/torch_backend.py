"""Attention in torch over the dual cache, with the semantics of docs/architecture.md at every chunk size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.prefill import PagedPrefill, PrefillKernels
from longrun.attention.rotation import HeadRotation
from longrun.attention.window import WindowAttention
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.ring import Ring
from longrun.kernels import page_view
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.cpu_rope_store import CpuRopeStore
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.kernels.page_view import ExactTokens
from longrun.quant.page_codec import exact_dtype
from longrun.quant.rotation import random_signs
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
        rope_store: compiled CPU kernel that `begin_decode` needs; `run` serves every number of tokens without it.
    """

    def __init__(
        self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: CpuPageKernels | None,
        rope_store: CpuRopeStore | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.spec, self.kernels = cache, spec, kernels
        self.softmax_scale = spec.head_dim**-0.5
        self.group = spec.group
        fmt = cache.spec.page_format
        self.exact = exact_dtype(fmt)
        self._rotation = HeadRotation(fmt, compute_dtype, cache.device) if fmt.rotates_keys else None
        self._rope_store = rope_store
        self._signs = random_signs(spec.head_dim) if fmt.rotates_keys else None
        compiled = kernels is not None and fmt.quantized
        self._decode_attention = kernels.decode_attention if kernels is not None and compiled else None
        dequantize = kernels.dequantize_pages if kernels is not None and compiled else page_view.dequantize_pages
        self._window_attention = WindowAttention()
        used = PrefillKernels(attention_with_lse, _merge_partial_, dequantize, self._window_attention)
        self._prefill_pages = PagedPrefill(spec, fmt, compute_dtype, cache.device, used)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        pages, _ = self.cache.layers[layer_idx]
        rotation = None if pages is None else self._rotation
        if pages is not None and rotation is not None:
            rotation.rotate_(q, k, v, pages.num_heads)
        k = k.transpose(0, 1).to(self.exact)
        v = v.transpose(0, 1).to(self.exact)
        if step.num_tokens == 1:
            self.cache.append(layer_idx, k, v, step.start)
            out = self._decode(layer_idx, q, step.start).reshape(q.shape).to(q.dtype)
        else:
            out = self._prefill(layer_idx, q, k.to(q.dtype), v.to(q.dtype), step.start)
            self.cache.append(layer_idx, k, v, step.start)
        if pages is not None and rotation is not None:
            rotation.unrotate_(out, pages.num_heads * self.group)
        return out

    def begin_decode(self, step: Step) -> Callable[..., Tensor]:
        """Make room for the step's one token.

        Returns:
            `FusedDecode.decode` for this token.
        """
        assert step.num_tokens == 1 and step.start == self.cache.seq_len and self._rope_store is not None
        self.cache.make_room()
        return partial(self._decode_fused, self._rope_store, step)

    def _decode_fused(
        self, rope_store: CpuRopeStore, step: Step, layer_idx: int, qkv: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        pages, ring = self.cache.layers[layer_idx]
        signs = None if pages is None else self._signs
        values = signs is not None and self.cache.spec.page_format.rotates_values
        q = qkv.new_empty(1, self.spec.num_qo_heads, self.spec.head_dim)
        place = self.cache.place_of(step.start)
        rope_store.rope_store(
            qkv, step.cos, step.sin, q[0],
            None if pages is None else pages.tail_k, None if pages is None else pages.tail_v,
            None if ring is None else ring.k, None if ring is None else ring.v, (place.tail_slot, place.ring_slot),
            self.spec.num_qo_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, signs=signs, rotate_values=values,
        )  # fmt: skip
        out = self._decode(layer_idx, q, step.start)
        if pages is not None and signs is not None and values:
            rope_store.unrotate_(out[: pages.num_heads], signs)
        return out.view(1, -1).to(qkv.dtype)

    def _decode(self, layer_idx: int, q: Tensor, position: int) -> Tensor:
        """float32 [num_kv_heads, group, head_dim] for q [1, num_qo_heads, head_dim]."""
        pages, ring = self.cache.layers[layer_idx]
        scaled = (q[0].float() * self.softmax_scale).view(-1, self.group, q.shape[2])
        parts = []
        if pages is not None:
            parts.append(self._decode_pages(scaled[: pages.num_heads], layer_idx, pages, position))
        if ring is not None:
            parts.append(self._decode_ring(scaled[scaled.shape[0] - ring.k.shape[0] :], ring, position))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_ring(self, scaled: Tensor, ring: Ring, position: int) -> Tensor:
        count = self.cache.place_of(position).ring_tokens
        if self.kernels is not None:
            lengths = torch.tensor([count, 0, 0], dtype=torch.int32)
            exact = ExactTokens(ring.k, ring.v, ring.k[:, :0], ring.v[:, :0], lengths)
            return self.kernels.decode_attention(scaled, None, exact)[0]
        k, v = (x[:, :count].float() for x in (ring.k, ring.v))
        return torch.softmax(scaled @ k.transpose(1, 2), dim=-1) @ v

    def _decode_pages(self, scaled: Tensor, layer_idx: int, pages: PagedHeads, position: int) -> Tensor:
        if self._decode_attention is None and all(group.reach.is_all for group in pages.groups):
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
        decode = self._decode_attention or page_view.decode_attention
        return decode(scaled, self.cache.view(layer_idx), exact)[0]

    def _prefill(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        pages, ring = self.cache.layers[layer_idx]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        heads = 0 if pages is None else pages.num_heads
        split = heads * self.group
        if pages is not None:
            self._prefill_pages.run(pages, q[:, :split], k[:heads], v[:heads], start, out[:, :split])
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
