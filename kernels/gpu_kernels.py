"""All kernels of the GPU backend in one object, and another with their torch references.

The references run on any device: with them the backend's own logic is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels import page_choose, page_view
from longrun.kernels.banded_prefill import banded_prefill, banded_prefill_reference
from longrun.kernels.cuda_module import CudaUnavailable
from longrun.kernels.dense_attention import attention_with_lse
from longrun.kernels.hot_pages import hot_fetch, hot_lookup
from longrun.kernels.hot_pages_cuda import CudaHotPages
from longrun.kernels.merge_partial import merge_partial_, merge_partial_reference
from longrun.kernels.page_choose import Budget
from longrun.kernels.page_copy import copy_pages, copy_pages_reference, fetch_pages, fetch_pages_reference
from longrun.kernels.page_decode import Workspace
from longrun.kernels.page_decode_cuda import CudaPageDecode
from longrun.kernels.page_dequantize import dequantize_pages
from longrun.kernels.page_digest import digest_pages_reference
from longrun.kernels.page_digest_triton import digest_pages
from longrun.kernels.page_score import score_pages
from longrun.kernels.page_select_cuda import ChoiceWorkspace, CudaPageSelect
from longrun.kernels.page_store import reference_store_pages, store_pages
from longrun.kernels.page_view import ExactTokens, PageView
from longrun.kernels.ring_decode import ring_decode, ring_decode_reference
from longrun.kernels.rope_store import rope_store, rope_store_reference
from longrun.kernels.rotary import rotary_, rotary_reference
from longrun.kernels.silu_mul import silu_mul_, silu_mul_reference
from longrun.kernels.tile_attend import attend_tiles_
from longrun.kernels.tile_attention import attend_tiles_reference, choose_tiles_reference, score_tiles_reference
from longrun.kernels.tile_choose import choose_tiles
from longrun.kernels.tile_score import score_tiles
from longrun.kernels.unrotate import unrotate, unrotate_reference
from longrun.kernels.vector_linear import vector_linear, vector_linear_reference
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import GPU_PAGE_SIZE, PageFormat


@dataclass(frozen=True)
class GpuKernels:
    """One callable a kernel, each with the signature that its own file documents.

    Attributes:
        decode_attention: see `page_view.decode_attention`; with a workspace.
        window_attention: `banded_prefill` over the past's tokens in order.
        default_splits: number of retrieval heads -> programs a head.
        score_tiles, choose_tiles, attend_tiles_: sparse prefill, see `tile_attention`.
        score_pages, choose_pages: see `page_score` and `page_choose`; choosing with a workspace, a `ChoiceWorkspace`.
            None where no digests were named.
        hot_lookup, hot_fetch: see `hot_pages`; None where no digests were named.
        on_gpu: streams and graphs exist.
    """

    decode_attention: Callable[..., Any]
    default_splits: Callable[[int], int]
    store_pages: Callable[..., None]
    copy_pages: Callable[..., None]
    fetch_pages: Callable[..., None]
    digest_pages: Callable[..., None]
    dequantize_pages: Callable[..., None]
    merge_partial_: Callable[..., None]
    rope_store: Callable[..., None]
    unrotate: Callable[..., None]
    ring_decode: Callable[..., Any]
    banded_prefill: Callable[..., None]
    window_attention: Callable[..., None]
    dense_attention: Callable[..., tuple[Tensor, Tensor]]
    rotary_: Callable[..., Any]
    silu_mul_: Callable[..., Tensor]
    vector_linear: Callable[..., Tensor]
    score_tiles: Callable[..., None]
    choose_tiles: Callable[..., None]
    attend_tiles_: Callable[..., None]
    score_pages: Callable[..., Tensor] | None
    choose_pages: Callable[..., None] | None
    hot_lookup: Callable[..., None] | None
    hot_fetch: Callable[..., None] | None
    on_gpu: bool


def load_gpu_kernels(
    head_dim: int, kv_format: str = "int4", overlap: bool = True, digest: DigestFormat | None = None
) -> GpuKernels:
    """The GPU's kernels on the current device.

    Args:
        kv_format: of the pages that decode reads, "int4" or "k5v3"; the other kernels serve both.
        overlap: decode kernels begin while the one before them ends (sm_90; no effect on older GPUs).
        digest: of the pages, where decode selects among them.

    Raises:
        ConfigError: the INT4 decode kernel, or those that select, cannot be compiled here.
    """
    try:
        decode = CudaPageDecode(head_dim, kv_format=kv_format)
    except CudaUnavailable as error:
        raise ConfigError(
            f"the {kv_format} decode kernel cannot be built on this GPU ({error}): use kv_format bf16, or device cpu"
        ) from error
    try:
        select = None if digest is None else CudaPageSelect(digest, overlap=overlap)
        hot = None if digest is None else CudaHotPages(PageFormat(kv_format, GPU_PAGE_SIZE, head_dim).payload_bytes)
    except CudaUnavailable as error:
        raise ConfigError(
            f"the kernels that select pages cannot be built on this GPU ({error}): turn selection off"
        ) from error
    return GpuKernels(
        decode_attention=decode.decode_attention,
        default_splits=decode.default_splits,
        store_pages=store_pages,
        copy_pages=copy_pages,
        fetch_pages=fetch_pages,
        digest_pages=digest_pages,
        dequantize_pages=dequantize_pages,
        merge_partial_=merge_partial_,
        rope_store=partial(rope_store, overlap=overlap),
        unrotate=unrotate,
        ring_decode=partial(ring_decode, overlap=overlap),
        banded_prefill=banded_prefill,
        window_attention=partial(banded_prefill, in_order=True),
        dense_attention=attention_with_lse,
        rotary_=rotary_,
        silu_mul_=silu_mul_,
        vector_linear=partial(vector_linear, overlap=overlap),
        score_tiles=score_tiles,
        choose_tiles=choose_tiles,
        attend_tiles_=attend_tiles_,
        score_pages=None if select is None else select.score_pages,
        choose_pages=None if select is None else select.choose_pages,
        hot_lookup=None if hot is None else hot.hot_lookup,
        hot_fetch=None if hot is None else hot.hot_fetch,
        on_gpu=True,
    )


def reference_kernels() -> GpuKernels:
    """The torch references, on any device."""
    return GpuKernels(
        decode_attention=decode_attention_reference,
        default_splits=lambda num_heads: 2,
        store_pages=reference_store_pages,
        copy_pages=copy_pages_reference,
        fetch_pages=fetch_pages_reference,
        digest_pages=digest_pages_reference,
        dequantize_pages=page_view.dequantize_pages,
        merge_partial_=merge_partial_reference,
        rope_store=rope_store_reference,
        unrotate=unrotate_reference,
        ring_decode=ring_decode_reference,
        banded_prefill=banded_prefill_reference,
        window_attention=partial(banded_prefill_reference, in_order=True),
        dense_attention=attention_with_lse,
        rotary_=rotary_reference,
        silu_mul_=silu_mul_reference,
        vector_linear=vector_linear_reference,
        score_tiles=score_tiles_reference,
        choose_tiles=choose_tiles_reference,
        attend_tiles_=attend_tiles_reference,
        score_pages=score_pages,
        choose_pages=choose_pages_reference,
        hot_lookup=hot_lookup,
        hot_fetch=hot_fetch,
        on_gpu=False,
    )


def decode_attention_reference(
    q: Tensor, view: PageView | None, exact: ExactTokens | None, *, softmax_scale: float = 1.0,
    workspace: Workspace | None = None, out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`page_view.decode_attention`, which needs no workspace."""
    return page_view.decode_attention(q, view, exact, softmax_scale=softmax_scale, out=out, lse=lse)


def choose_pages_reference(
    scores: Tensor, view: PageView, *, budget: Budget, newest: int, pages_out: Tensor, counts_out: Tensor,
    workspace: ChoiceWorkspace | None = None,
) -> None:  # fmt: skip
    """`page_choose.choose_pages`, which needs no workspace."""
    page_choose.choose_pages(
        scores, view, budget=budget, newest=newest, pages_out=pages_out, counts_out=counts_out
    )  # fmt: skip
