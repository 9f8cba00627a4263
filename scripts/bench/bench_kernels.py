"""Decode attention from pages, alone: one token and one layer, by the tensor-core kernel and the portable one.

Pages hold random content (synthetic). Calls rotate over the pools of several layers, so that nothing is measured from
the L2 cache, and stand in one CUDA graph, as in a decode step. Results are compared with the torch reference on
poisoned outputs. Bytes are those of payloads and index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from longrun.kernels import page_decode
from longrun.kernels.page_decode import Workspace
from longrun.kernels.page_decode_cuda import CudaPageDecode
from longrun.kernels.page_view import ExactTokens, PageView, decode_attention, view_of_all
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.units import format_tokens
from scripts.bench.gpu_timer import gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row

LENGTHS = (524_288, 1_000_000, 3_300_000)
POOL_BYTES = 3 * 2**30  # of all layers together, more than L2 holds
OUT_LIMIT, LSE_LIMIT = 5e-3, 1e-4  # relative; several times what was measured


Layer = tuple[PageView, ExactTokens]


def synthetic_layers(num_layers: int, heads: int, num_pages: int, head_dim: int, kv_format: str) -> list[Layer]:
    """Layers of random pages, every head's pages at random slots of the layer's own pool."""
    fmt, layers = PageFormat(kv_format, 64, head_dim), []
    for _ in range(num_layers):
        slots = heads * num_pages
        storage = torch.empty(slots, fmt.payload_bytes, dtype=torch.uint8, device="cuda")
        storage.random_(0, 256)
        scales = storage[:, fmt.value_scales_offset :].view(torch.float16).view(slots, 2, 64)
        scales[:, 0] = torch.rand(slots, 64, device="cuda") * 0.2 + 0.1
        scales[:, 1] = -torch.rand(slots, 64, device="cuda") - 1
        index = torch.rand(heads, num_pages, 2, head_dim, device="cuda").half()
        index[:, :, 0] *= 0.2
        index[:, :, 1] -= 1.2
        table = torch.randperm(slots, device="cuda").view(heads, num_pages).int()
        exact = torch.randn(4, heads, 64, head_dim, device="cuda").bfloat16()
        lengths = torch.tensor([64, 37, 64 * (num_pages + 1)], dtype=torch.int32, device="cuda")
        layers.append((view_of_all(storage, table, index, fmt), ExactTokens(*exact, lengths)))
    return layers


def measure(lengths: Sequence[int] = LENGTHS, pool_bytes: int = POOL_BYTES) -> Iterator[dict[str, Any]]:
    """Rows of Llama-3-8B with half its KV heads kept at `lengths` tokens, and of two other shapes at the first."""
    for kv_format in QUANTIZED_KV_FORMATS:
        for tokens in lengths:
            yield from measure_shape(kv_format, tokens, 4, 4, 128, pool_bytes)
        yield from measure_shape(kv_format, lengths[0], 8, 1, 128, pool_bytes)
        yield from measure_shape(kv_format, lengths[0], 8, 8, 64, pool_bytes)
        torch.cuda.empty_cache()


def measure_shape(
    kv_format: str, tokens: int, heads: int, group: int, head_dim: int, pool_bytes: int
) -> Iterator[dict[str, Any]]:
    """Rows of both kernels at one shape: KV heads x group x head_dim."""
    torch.manual_seed(tokens)
    num_pages = tokens // 64
    num_bytes = heads * num_pages * PageFormat(kv_format, 64, head_dim).page_bytes
    layers = synthetic_layers(max(2, -(-pool_bytes // num_bytes)), heads, num_pages, head_dim, kv_format)
    q = (torch.randn(heads, group, head_dim, device="cuda") * 0.2).bfloat16()
    expected_out, expected_lse = decode_attention(q, *layers[-1])
    cuda = CudaPageDecode(head_dim, kv_format=kv_format)
    for name, splits, kernel in (
        ("cuda", cuda.default_splits(heads), cuda.decode_attention),
        ("triton", page_decode.default_splits(heads, q.device), page_decode.decode_attention),
    ):
        space = Workspace.empty(heads, splits, group, head_dim, q.device)
        out, lse = torch.empty(q.shape, device="cuda"), torch.empty(q.shape[:2], device="cuda")
        for poisoned in (space.out, space.stats, out, lse):
            poisoned.fill_(float("nan"))
        times = gpu_times(*(partial(kernel, q, *layer, workspace=space, out=out, lse=lse) for layer in layers))
        yield kernel_row(
            f"{kv_format} decode, {name}", f"{heads}x{group}x{head_dim}, {format_tokens(tokens)} tokens", times,
            num_bytes=num_bytes, out_error=error_of(out, expected_out, OUT_LIMIT),
            lse_error=error_of(lse, expected_lse, LSE_LIMIT),
        )  # fmt: skip
