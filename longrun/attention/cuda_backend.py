"""Attention through GPU kernels over quantized pages: chunked prefill, and the decode that a CUDA graph can replay."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longrun.attention.cuda_decode import CudaDecode
from longrun.attention.fetch import PageFetcher
from longrun.attention.interface import Step
from longrun.attention.looked import LookedTokens
from longrun.attention.prefill import PagedPrefill, PrefillKernels
from longrun.attention.rotation import HeadRotation
from longrun.attention.selected_pages import PageSelector
from longrun.attention.sparse_past import SparsePast, TileKernels
from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.ring import Ring
from longrun.kernels.dense_attention import cudnn_serves
from longrun.kernels.gpu_kernels import GpuKernels
from longrun.kernels.page_select_cuda import ChoiceWorkspace
from longrun.quant.page_codec import exact_dtype
from longrun.specs.attention_spec import AttentionSpec


class CudaAttention:
    """Reads and appends to one `DualCache` with quantized pages; everything it needs is allocated here.

    The answer is `TorchAttention`'s, up to rounding.

    Args:
        cache: the sequence's cache.
        spec: scratch and shape, with `fused` set.
        compute_dtype: dtype of q, k, v and the result of prefill.
        kernels: the GPU's, or their references.

    Attributes:
        decode: what serves single tokens.
        sparse: what reads the past of chunks that are read sparsely; None where none is.
    """

    def __init__(self, cache: DualCache, spec: AttentionSpec, compute_dtype: torch.dtype, kernels: GpuKernels) -> None:
        assert spec.fused and cache.spec.page_format.quantized
        self.cache, self.spec, self.kernels = cache, spec, kernels
        self.softmax_scale, self.group = spec.head_dim**-0.5, spec.group
        fmt, device = cache.spec.page_format, cache.device
        self.exact = exact_dtype(fmt)
        self._rotation = HeadRotation(fmt, compute_dtype, device) if fmt.rotates_keys else None
        fetcher = PageFetcher(
            cache.fetch_buffer, spec.max_retrieval_heads, cache.spec.pages_per_head, kernels.fetch_pages, kernels.on_gpu
        )
        used = PrefillKernels(
            kernels.dense_attention, kernels.merge_partial_, kernels.dequantize_pages, kernels.window_attention,
            partial(kernels.dequantize_pages, v_out=None),
        )  # fmt: skip
        pads_chunks = kernels.on_gpu and cudnn_serves(device)
        self.sparse = None
        if spec.sparse_bytes():
            tiles = TileKernels(
                kernels.score_tiles, kernels.choose_tiles, kernels.attend_tiles_, kernels.dense_attention
            )
            self.sparse = SparsePast(spec, fmt.page_size, device, tiles)
        self._prefill_pages = PagedPrefill(spec, fmt, compute_dtype, device, used, fetcher, pads_chunks, self.sparse)
        self.selector: PageSelector | None = None
        if spec.selects:
            assert kernels.score_pages is not None and kernels.choose_pages is not None
            room = ChoiceWorkspace.empty(spec.max_retrieval_heads, spec.group, spec.listed_pages, device)
            self.selector = PageSelector(spec, device, kernels.score_pages, kernels.choose_pages, room)
        self.decode = CudaDecode(cache, spec, compute_dtype, kernels, fetcher, self.selector)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        pages, ring = self.cache.layers[layer_idx]
        k, v = self._as_stored(pages, q, k, v)
        out = self._attend(pages, ring, q, k, v, step.start, sparse_layer=layer_idx if step.sparse else None)
        self.cache.append(layer_idx, k, v, step.start)
        return out

    def look(
        self, pages: PagedHeads | None, ring: Ring | None, q: Tensor, k: Tensor, v: Tensor, start: int,
        looked: LookedTokens,
    ) -> Tensor:  # fmt: skip
        """See `longrun.attention.look_back.Looks.look`."""
        return self._attend(pages, ring, q, *self._as_stored(pages, q, k, v), start, looked)

    def _as_stored(self, pages: PagedHeads | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v rounded as the cache keeps them, [num_kv_heads, T, head_dim]; q is rotated with them, in place."""
        if self._rotation is not None and pages is not None:
            self._rotation.rotate_(q, k, v, pages.num_heads)
        k, v = (x.transpose(0, 1).to(self.exact).to(q.dtype) for x in (k, v))
        return k, v

    def _attend(
        self, pages: PagedHeads | None, ring: Ring | None, q: Tensor, k: Tensor, v: Tensor, start: int,
        looked: LookedTokens | None = None, sparse_layer: int | None = None,
    ) -> Tensor:  # fmt: skip
        heads = 0 if pages is None else pages.num_heads
        split = heads * self.group
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if ring is not None:
            grouped = (q.shape[0], -1, self.group, q.shape[2])
            self.kernels.banded_prefill(
                q[:, split:].view(grouped), k[heads:], v[heads:], ring.k, ring.v, start,
                ring.sink_size, ring.recent_size, self.softmax_scale, out[:, split:].view(grouped),
            )  # fmt: skip
        if pages is not None:
            if looked is None:  # tokens that look back are not appended
                pages.begin_spill(start + len(q))
            self._prefill_pages.run(
                pages, q[:, :split], k[:heads], v[:heads], start, out[:, :split], looked, sparse_layer
            )
            if self._rotation is not None:
                self._rotation.unrotate_(out, split)
        return out
