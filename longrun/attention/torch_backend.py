"""Attention in torch over the dual cache, with the semantics of docs/architecture.md at every chunk size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.past import past_pieces
from longrun.attention.rotation import HeadRotation
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.ring import Ring
from longrun.kernels.banded_attention import BandPlan, banded_attention, plan_band
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.cpu_rope_store import CpuRopeStore
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.kernels.page_view import ExactRun, PageRun, dequantize_run
from longrun.quant.page_codec import exact_dtype
from longrun.quant.rotation import random_signs
from longrun.specs.attention_spec import AttentionSpec


class TorchAttention:
    """Reads and appends to one `DualCache`.

    Keys and values are rounded to the cache's exact dtype before anything sees them, so that a chunk's own tokens
    and cached ones are the same numbers; what remains between chunk sizes is rounding, and with INT4 pages the
    quantization of those tokens that had left the chunk.

    Args:
        cache: the sequence's cache.
        spec: scratch and shape; scratch is allocated here, once.
        compute_dtype: dtype of q and of the result.
        kernels: compiled CPU kernels for quantized pages, or None for plain torch.
        rope_store: compiled CPU kernel that `decode` needs; `run` serves every number of tokens without it.
    """

    def __init__(
        self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: CpuPageKernels | None,
        rope_store: CpuRopeStore | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.spec, self.kernels = cache, spec, kernels
        self.softmax_scale = spec.head_dim**-0.5
        self.group = spec.num_qo_heads // spec.num_kv_heads
        self.exact = exact_dtype(cache.spec.page_format)
        fmt = cache.spec.page_format
        self._rotation = HeadRotation(fmt, compute_dtype, cache.device) if fmt.rotates_keys else None
        self._rope_store = rope_store
        self._signs = random_signs(spec.head_dim) if fmt.rotates_keys else None
        elements = spec.max_retrieval_heads * spec.scratch_tokens * spec.head_dim
        self._scratch = torch.empty(2, elements, dtype=compute_dtype, device=cache.device).fill_(0)
        self._band: BandPlan | None = None

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
            out = self._decode(layer_idx, q, step.start + 1).reshape(q.shape).to(q.dtype)
        else:
            out = self._prefill(layer_idx, q, k.to(q.dtype), v.to(q.dtype), step)
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
        spec, start = self.cache.spec, step.start
        fmt = spec.page_format
        tail = start - fmt.closed_pages(start + 1) * fmt.page_size
        return partial(self._decode_fused, self._rope_store, step, (tail, spec.ring_slot(start)))

    def _decode_fused(
        self, rope_store: CpuRopeStore, step: Step, slots: tuple[int, int], layer_idx: int, qkv: Tensor,
        q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        pages, ring = self.cache.layers[layer_idx]
        signs = None if pages is None else self._signs
        values = signs is not None and self.cache.spec.page_format.rotates_values
        q = qkv.new_empty(1, self.spec.num_qo_heads, self.spec.head_dim)
        rope_store.rope_store(
            qkv, step.cos, step.sin, q[0],
            None if pages is None else pages.tail_k, None if pages is None else pages.tail_v,
            None if ring is None else ring.k, None if ring is None else ring.v,
            slots, self.spec.num_qo_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, signs=signs, rotate_values=values,
        )  # fmt: skip
        out = self._decode(layer_idx, q, step.start + 1)
        if pages is not None and signs is not None and values:
            rope_store.unrotate_(out[: pages.num_heads], signs)
        return out.view(1, -1).to(qkv.dtype)

    def _decode(self, layer_idx: int, q: Tensor, seq_len: int) -> Tensor:
        """float32 [num_kv_heads, group, head_dim] for q [1, num_qo_heads, head_dim]."""
        pages, ring = self.cache.layers[layer_idx]
        scaled = (q[0].float() * self.softmax_scale).view(-1, self.group, q.shape[2])
        parts = []
        if pages is not None:
            parts.append(self._decode_pages(scaled[: pages.num_heads], pages, seq_len))
        if ring is not None:
            run = ExactRun(ring.k, ring.v, ring.num_valid(seq_len))
            parts.append(self._decode_exact(scaled[scaled.shape[0] - ring.k.shape[0] :], run))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_exact(self, scaled: Tensor, run: ExactRun) -> Tensor:
        if self.kernels is not None:
            return self.kernels.decode_attention(scaled, None, (run,))[0]
        k, v = (x[:, : run.num_tokens].float() for x in (run.k, run.v))
        return torch.softmax(scaled @ k.transpose(1, 2), dim=-1) @ v

    def _decode_pages(self, scaled: Tensor, pages: PagedHeads, seq_len: int) -> Tensor:
        exact = tuple(run for run in (pages.sink_run(seq_len), pages.tail_run(seq_len)) if run.num_tokens)
        if self.kernels is None or not pages.fmt.quantized:
            out = lse = None
            for k, v in self._past(pages, seq_len):
                found = attention_with_lse(scaled.to(k.dtype), k, v, False, 1.0)
                found = found[0].float(), found[1]
                out, lse = found if out is None else merge_partial(out, lse, *found)
            return out
        out, lse = self.kernels.decode_attention(scaled, pages.device_run(), exact)
        for first, count in pages.host_rounds(self.cache.fetch_buffer):
            run = pages.fetch(first, count, self.cache.fetch_buffer)
            out, lse = merge_partial(out, lse, *self.kernels.decode_attention(scaled, run, ()))
        return out

    def _prefill(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        pages, ring = self.cache.layers[layer_idx]
        grouped = q.view(q.shape[0], -1, self.group, q.shape[2])  # [T, num_kv_heads, group, head_dim]
        out = torch.empty_like(q).view(grouped.shape)
        split = 0 if pages is None else pages.num_heads
        if pages is not None:
            found = self._prefill_pages(grouped[:, :split].permute(1, 2, 0, 3), k[:split], v[:split], pages, step)
            out[:, :split] = found.permute(2, 0, 1, 3)
        if ring is not None:
            found = self._prefill_ring(grouped[:, split:].permute(1, 2, 0, 3), k[split:], v[split:], ring, step)
            out[:, split:] = found.permute(2, 0, 1, 3)
        return out.reshape(q.shape)

    def _prefill_pages(self, q: Tensor, k: Tensor, v: Tensor, pages: PagedHeads, step: Step) -> Tensor:
        heads, group, tokens, dim = q.shape
        q = q.contiguous()
        k, v = (x[:, None].expand(heads, group, tokens, dim).reshape(-1, tokens, dim) for x in (k, v))
        out, lse = attention_with_lse(q.view(-1, tokens, dim), k, v, True, self.softmax_scale)
        if step.start == 0:
            return out.reshape(q.shape)
        packed = (heads, group * tokens, dim)
        out, lse = out.reshape(packed).float(), lse.reshape(packed[:2])
        for past_k, past_v in self._past(pages, step.start):
            found, found_lse = attention_with_lse(q.view(packed), past_k, past_v, False, self.softmax_scale)
            out, lse = merge_partial(out, lse, found, found_lse)
        return out.reshape(q.shape)

    def _prefill_ring(self, q: Tensor, k: Tensor, v: Tensor, ring: Ring, step: Step) -> Tensor:
        if self._band is None or (self._band.start, self._band.num_tokens) != (step.start, step.num_tokens):
            size, recent = ring.sink_size, ring.recent_size
            self._band = plan_band(step.start, step.num_tokens, size, recent, q.dtype, q.device)
        plan, start = self._band, step.start
        held = min(plan.num_sinks, start)
        sinks = [x[:, :held].to(q.dtype) for x in (ring.k, ring.v)]
        if held < plan.num_sinks:
            new = slice(held - start, plan.num_sinks - start)
            sinks = [torch.cat((old, x[:, new]), dim=1) for old, x in zip(sinks, (k, v), strict=True)]
        if plan.window_start < start:
            older = ring.window(plan.window_start, start)
            window = [torch.cat((old.to(q.dtype), x), dim=1) for old, x in zip(older, (k, v), strict=True)]
        else:
            window = [x[:, plan.window_start - start :] for x in (k, v)]
        return banded_attention(q, *sinks, *window, plan, self.softmax_scale)

    def _past(self, pages: PagedHeads, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of tokens [0, seq_len) of the retrieval heads, see `past_pieces`."""
        runs = self._past_runs(pages, seq_len)
        return past_pieces(runs, pages.num_heads, pages.fmt, self._scratch, self._dequantize)

    def _past_runs(self, pages: PagedHeads, seq_len: int) -> Iterator[PageRun | ExactRun]:
        yield pages.sink_run(seq_len)
        for first, count in pages.host_rounds(self.cache.fetch_buffer):
            yield pages.fetch(first, count, self.cache.fetch_buffer)
        yield pages.device_run()
        yield pages.tail_run(seq_len)

    def _dequantize(self, run: PageRun, k: Tensor, v: Tensor) -> None:
        if self.kernels is not None and run.fmt.quantized:
            self.kernels.dequantize_run(run, k, v)
        else:
            dequantize_run(run, k, v)
