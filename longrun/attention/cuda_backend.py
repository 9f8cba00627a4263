"""Attention through GPU kernels over INT4 pages: chunked prefill, and a decode that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longrun.attention.decode_state import DecodeState
from longrun.attention.fetch import DoubleBuffer
from longrun.attention.interface import Step
from longrun.attention.past import past_pieces
from longrun.attention.rotation import HeadRotation
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.kernels.dense_attention import cudnn_serves, padded_rows
from longrun.kernels.gpu_kernels import GpuKernels
from longrun.kernels.page_decode import DecodePages, Workspace
from longrun.kernels.page_view import ExactRun, PageRun
from longrun.kernels.ring_decode import RingWorkspace, default_splits
from longrun.quant.page_codec import exact_dtype
from longrun.quant.rotation import random_signs
from longrun.specs.attention_spec import AttentionSpec


class CudaAttention:
    """Reads and appends to one `DualCache` with INT4 pages; everything it needs is allocated here.

    Prefill attends to the chunk itself and to the past in pieces, merged by log-sum-exp, with the fastest dense
    attention there is. Decode reads pages in place; pages in host memory are fetched ahead of the layer that needs
    them. The answer is `TorchAttention`'s, up to rounding.

    Args:
        cache: the sequence's cache.
        spec: scratch and shape, with `fused` set.
        compute_dtype: dtype of q, k, v and the result of prefill.
        kernels: the GPU's, or their references.
    """

    def __init__(self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: GpuKernels) -> None:
        assert spec.fused and cache.spec.page_format.quantized
        self.cache, self.spec, self.kernels = cache, spec, kernels
        self.softmax_scale = spec.head_dim**-0.5
        self.group = spec.group
        self.exact = exact_dtype(cache.spec.page_format)
        self.compute_dtype = compute_dtype
        self._rotation, self._signs = None, None
        if cache.spec.page_format.rotates_keys:
            self._rotation = HeadRotation(cache.spec.page_format, compute_dtype, cache.device)
            self._signs = random_signs(spec.head_dim).to(cache.device)
        self._pads_chunks = kernels.on_gpu and cudnn_serves(cache.device)
        self._rotates_values = cache.spec.page_format.rotates_values
        elements = spec.max_retrieval_heads * spec.scratch_tokens * spec.head_dim
        self._scratch = torch.empty(2, elements, dtype=compute_dtype, device=cache.device).fill_(0)
        self._fetching = DoubleBuffer(cache.fetch_buffer, kernels.on_gpu)
        self._first_pages = next((pages for pages, _ in cache.layers if pages is not None), None)
        self._allocate_decode_buffers()

    def _allocate_decode_buffers(self) -> None:
        spec, cache, device = self.spec, self.cache, self.cache.device
        counts = sorted({n for n in cache.spec.retrieval_heads if n})
        host_pages = cache.spec.host_pages_per_head if counts else 0
        # Rounds in which fetched host pages are read: {heads: (pages a round, first row of `rounds`, rounds)}.
        self._rounds: dict[int, tuple[int, int, int]] = {}
        self._fetch_tables: dict[int, Tensor] = {}
        rows = 0
        for heads in counts if host_pages else ():
            per_round = self._fetching.half_pages // heads
            assert per_round > 0, "half of the fetch buffer holds less than one page a head"
            count = -(-host_pages // per_round)
            self._rounds[heads] = (per_round, rows, count)
            rows += count
            page = torch.arange(cache.spec.pages_per_head, dtype=torch.int32, device=device) % per_round
            head = torch.arange(heads, dtype=torch.int32, device=device)
            self._fetch_tables[heads] = head[:, None] * per_round + page
        self.state = DecodeState(spec.head_dim, rows, device)
        self._round_lengths = np.zeros((rows, 4), dtype=np.int32) if rows else None
        shape = (spec.num_qo_heads, spec.head_dim)
        self._q = torch.zeros(shape, dtype=self.compute_dtype, device=device)
        self._out = torch.zeros(shape, device=device)
        self._part = torch.zeros(shape, device=device)
        self._unrotated = torch.zeros(shape if self._rotates_values else (0,), dtype=self.compute_dtype, device=device)
        self._lse, self._part_lse = torch.zeros(2, spec.num_qo_heads, device=device)
        self._workspaces = {
            n: Workspace.empty(n, self.kernels.default_splits(n), self.group, spec.head_dim, device) for n in counts
        }
        ring_heads = spec.num_kv_heads - min(cache.spec.retrieval_heads)
        self._ring_workspace = RingWorkspace.make(
            ring_heads * self.group, default_splits(cache.spec.ring_slots), spec.head_dim, device
        )
        held = [self._ring_workspace.partials, self._ring_workspace.counters]
        held += [self._q, self._out, self._part, self._unrotated, self._lse, self._part_lse]
        held += self._fetch_tables.values()
        held += [tensor for space in self._workspaces.values() for tensor in (space.out, space.stats)]
        held_bytes = sum(tensor.nbytes for tensor in held)
        assert held_bytes <= spec.decode_bytes(), (held_bytes, spec.decode_bytes())

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        pages, ring = self.cache.layers[layer_idx]
        heads = 0 if pages is None else pages.num_heads
        split = heads * self.group
        if self._rotation is not None and pages is not None:
            self._rotation.rotate_(q, k, v, heads)
        k, v = (x.transpose(0, 1).to(self.exact).to(q.dtype) for x in (k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if ring is not None:
            grouped = (q.shape[0], -1, self.group, q.shape[2])
            self.kernels.banded_prefill(
                q[:, split:].view(grouped), k[heads:], v[heads:], ring.k, ring.v, step.start,
                ring.sink_size, ring.recent_size, self.softmax_scale, out[:, split:].view(grouped),
            )  # fmt: skip
        if pages is not None:
            pages.begin_spill(step.start + step.num_tokens)
            self._prefill_pages(q[:, :split], k[:heads], v[:heads], pages, step.start, out[:, :split])
            if self._rotation is not None:
                self._rotation.unrotate_(out, split)
        self.cache.append(layer_idx, k, v, step.start)
        return out

    def _prefill_pages(self, q: Tensor, k: Tensor, v: Tensor, pages: PagedHeads, start: int, out: Tensor) -> None:
        """q, out [T, num_heads * group, head_dim]; k, v [num_heads, T, head_dim]."""
        dense, tokens = self.kernels.dense_attention, len(q)
        rows = tokens
        if self._pads_chunks:
            rows = padded_rows(q.shape[1], tokens, q.shape[2], start, self.spec.chunk_size)
        q = _with_rows(q.permute(1, 0, 2), rows)
        k, v = (_with_rows(x, rows) if rows > tokens else x for x in (k, v))
        found, lse = dense(q, k, v, True, self.softmax_scale)  # causal: no query sees the padding, which stands last
        if start == 0:
            out.copy_(found.permute(1, 0, 2))
            return
        packed = (pages.num_heads, -1, q.shape[2])
        total, q = found.float().contiguous().view(packed), q.view(packed)
        lse = lse.contiguous().view(pages.num_heads, -1)
        del found
        runs = self._past_runs(pages, start)
        for past_k, past_v in past_pieces(runs, pages.num_heads, pages.fmt, self._scratch, self._dequantize):
            found, found_lse = dense(q, past_k, past_v, False, self.softmax_scale)
            self.kernels.merge_partial_(total, lse, found.contiguous(), found_lse.contiguous())
            del found, found_lse
        out.copy_(total.view(out.shape[1], rows, out.shape[2])[:, :tokens].permute(1, 0, 2))

    def _dequantize(self, run: PageRun, k: Tensor, v: Tensor) -> None:
        self.kernels.dequantize_run(run, k, v)

    def _past_runs(self, pages: PagedHeads, seq_len: int) -> Iterator[PageRun | ExactRun]:
        yield pages.sink_run(seq_len)
        rounds = pages.host_rounds(self.cache.fetch_buffer[: self._fetching.half_pages])
        fetched: list[PageRun] = []

        def fetch(first: int, count: int, half: Tensor) -> None:
            fetched.append(pages.fetch(first, count, half))

        for _ in self._fetching.each(partial(fetch, first, count) for first, count in rounds):
            yield fetched.pop(0)
        yield pages.device_run()
        yield pages.tail_run(seq_len)

    def begin_decode(self, token_id: int | None, start: int, cos: np.ndarray, sin: np.ndarray) -> None:
        """Make room for one token and describe it to the device.

        Args:
            token_id: None where the device already knows it.
            start: the token's position: the cache's length, or one beyond it where `takes_in_place` allows that.
            cos, sin: float32 [head_dim], of the token's position.
        """
        cache, spec = self.cache, self.cache.spec
        if start == cache.seq_len:
            cache.make_room()
        else:
            assert start == cache.seq_len + 1 and cache.takes_in_place(start), (start, cache.seq_len)
        fmt, seq_len = spec.page_format, start + 1
        closed = fmt.closed_pages(seq_len)
        tail = seq_len - closed * fmt.page_size
        on_host = 0 if self._first_pages is None else self._first_pages.num_on_host
        pooled = fmt.pooled_pages(seq_len)
        if self._round_lengths is not None:
            for per_round, row, count in self._rounds.values():
                first = np.arange(count, dtype=np.int32) * per_round
                self._round_lengths[row : row + count, 0] = first
                self._round_lengths[row : row + count, 1] = (on_host - first).clip(0, per_round)
        self.state.fill(
            token_id, (tail - 1, spec.ring_slot(start)),
            (on_host, pooled - on_host, fmt.page_size if closed else 0, tail),
            min(seq_len, spec.sink_size + spec.recent_size), on_host, self._round_lengths, cos, sin,
        )  # fmt: skip

    def decode_pass(self, layers: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:
        """Run `layers` with this backend's decode, host pages being fetched ahead from layer to layer.

        Args:
            layers: called with `FusedDecode.decode`; must call it once a layer, in order.
        """
        fetches = [
            partial(self._fetch_round, pages, index)
            for pages, _ in self.cache.layers
            if pages is not None and self._rounds
            for index in range(self._rounds[pages.num_heads][2])
        ]
        halves = self._fetching.each(fetches)
        result = layers(partial(self._decode, halves))
        assert next(halves, None) is None, "a layer did not read its host pages"
        return result

    def _fetch_round(self, pages: PagedHeads, index: int, half: Tensor) -> None:
        per_round = self._rounds[pages.num_heads][0]
        self.kernels.fetch_pages(
            pages.host_pool.storage, pages.table, self.state.host_pages, half, index * per_round, per_round,
            slot_offset=pages.host_pool.first_slot,
        )  # fmt: skip

    def _decode(
        self, halves: Iterator[Tensor], layer_idx: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """See `FusedDecode.decode`; `halves` yields the fetched host pages of every round in turn."""
        pages, ring = self.cache.layers[layer_idx]
        state, group = self.state, self.group
        self.kernels.rope_store(
            qkv.view(-1), state.cos, state.sin, self._q,
            None if pages is None else pages.tail_k, None if pages is None else pages.tail_v,
            None if ring is None else ring.k, None if ring is None else ring.v,
            state.slots, self.spec.num_qo_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, signs=self._signs,
            rotate_values=self._rotates_values,
        )  # fmt: skip
        heads = 0 if pages is None else pages.num_heads
        split = heads * group
        if ring is not None:
            shape = (-1, group, self.spec.head_dim)
            self.kernels.ring_decode(
                self._q[split:].view(shape), ring.k, ring.v, state.ring_len, self.softmax_scale,
                self._out[split:].view(shape), self._ring_workspace,
            )  # fmt: skip
        if pages is not None:
            self._decode_pages(pages, heads, halves)
            if self._rotates_values:
                self.kernels.unrotate(self._out, self._signs, split, self._unrotated)
                return self._unrotated.view(1, -1)
        return self._out.view(1, -1).to(self.compute_dtype)

    def _decode_pages(self, pages: PagedHeads, heads: int, halves: Iterator[Tensor]) -> None:
        group, dim = self.group, self.spec.head_dim
        split, shape = heads * group, (heads, group, dim)
        q, out, lse = self._q[:split].view(shape), self._out[:split].view(shape), self._lse[:split].view(heads, group)
        exact, name = (pages.sink_k, pages.sink_v, pages.tail_k, pages.tail_v), pages.fmt.name
        decode = partial(
            self.kernels.decode_attention, q, softmax_scale=self.softmax_scale, workspace=self._workspaces[heads]
        )
        device = DecodePages(
            self.cache.device_pool.storage, pages.table, pages.index, *exact, self.state.lengths, kv_format=name
        )  # fmt: skip
        decode(device, out=out, lse=lse)
        if not self._rounds:
            return
        part, part_lse = self._part[:split].view(shape), self._part_lse[:split].view(heads, group)
        _, row, count = self._rounds[heads]
        for index in range(count):
            half, lengths = next(halves), self.state.rounds[row + index]
            fetched = DecodePages(half, self._fetch_tables[heads], pages.index, *exact, lengths, kv_format=name)
            decode(fetched, out=part, lse=part_lse)
            self.kernels.merge_partial_(out, lse, part, part_lse)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """x [heads, T, head_dim], contiguous, with zeros behind up to `rows`."""
    if rows == x.shape[1]:
        return x.contiguous()
    found = x.new_zeros(x.shape[0], rows, x.shape[2])
    found[:, : x.shape[1]] = x
    return found
