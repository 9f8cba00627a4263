"""The page kernels, alone: storing pages, reading them back, and making their digests, as prefill does.

Every input and output byte counts once. Keys and values lie as a fused projection leaves them: [tokens, heads, 2,
head_dim].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from longrun.kernels.page_dequantize import dequantize_pages
from longrun.kernels.page_digest import digest_pages_reference
from longrun.kernels.page_digest_triton import digest_pages
from longrun.kernels.page_store import reference_store_pages, store_pages
from longrun.kernels.page_view import view_of_all
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.units import format_tokens
from scripts.bench.gpu_timer import gpu_times
from scripts.bench.kernel_rows import kernel_row

HEADS, HEAD_DIM = 8, 128
LENGTHS = (32_768, 524_288)
REPLAYED_BYTES = 6 * 10**9  # moved by one replay, 2 ms on an H100: its launch is no part of that


def bytes_per_page(fmt: PageFormat, itemsize: int) -> int:
    return fmt.page_bytes + 2 * fmt.page_size * fmt.head_dim * itemsize


def digest_bytes_per_page(fmt: PageFormat, digest_format: DigestFormat) -> int:
    """Keys, with k5v3 the values that hold bits of them, index and digest."""
    return fmt.keys_bytes * (2 if fmt.key_bits == 5 else 1) + fmt.index_bytes + digest_format.page_bytes


def measure(lengths: Sequence[int] = LENGTHS) -> Iterator[dict[str, Any]]:
    """Rows of the three kernels in every format of pages, at `lengths` tokens, a multiple of 64."""
    for tokens in lengths:
        for name in QUANTIZED_KV_FORMATS:
            yield from measure_format(PageFormat(name, 64, HEAD_DIM), tokens)


def measure_format(fmt: PageFormat, tokens: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(tokens)
    pages = tokens // 64
    fused = torch.randn(tokens, HEADS, 2, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    k, v = (fused[:, :, side].transpose(0, 1) for side in (0, 1))
    slots = torch.randperm(HEADS * pages, device="cuda").int().view(HEADS, pages)
    storage = torch.full((HEADS * pages, fmt.payload_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    index = torch.full((HEADS, pages, 2, HEAD_DIM), float("nan"), dtype=torch.float16, device="cuda")
    numbers = torch.arange(pages, dtype=torch.int32, device="cuda")
    out = torch.full((2, HEADS, tokens, HEAD_DIM), float("nan"), dtype=fused.dtype, device="cuda")
    view = view_of_all(storage, slots, index, fmt, limit=pages)
    moved = HEADS * pages * bytes_per_page(fmt, fused.itemsize)
    calls = max(2, min(50, REPLAYED_BYTES // moved))
    stored = gpu_times(*[partial(store_pages, k, v, storage, slots, index, numbers, fmt)] * calls)
    read = gpu_times(*[partial(dequantize_pages, view, *out)] * calls)
    digest_format = DigestFormat(64, HEAD_DIM)
    digests = torch.full((HEADS, pages, digest_format.page_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    digesting = partial(digest_pages, storage, slots, index, digests, fmt, digest_format)
    digest_moved = HEADS * pages * digest_bytes_per_page(fmt, digest_format)
    digested = gpu_times(*[digesting] * max(2, min(50, REPLAYED_BYTES // digest_moved)))
    part = slice(0, 64 * min(pages, 16))
    some = slots[:, : part.stop // 64].cpu()
    expected = torch.empty(HEADS * pages, fmt.payload_bytes, dtype=torch.uint8)
    expected_index = torch.empty(HEADS, some.shape[1], 2, HEAD_DIM, dtype=torch.float16)
    order = torch.arange(some.shape[1], dtype=torch.int32)
    reference_store_pages(k[:, part].cpu(), v[:, part].cpu(), expected, some, expected_index, order, fmt)
    assert torch.equal(storage.cpu()[some.long()], expected[some.long()]), "the timed kernel wrote other bytes"
    assert not out.isnan().any(), "the timed kernel left outputs unwritten"
    expected_digests = torch.empty(*some.shape, digest_format.page_bytes, dtype=torch.uint8)
    digest_pages_reference(expected, some, expected_index, expected_digests, fmt, digest_format)
    assert torch.equal(digests[:, : some.shape[1]].cpu(), expected_digests), "the timed kernel wrote other digests"
    shape = f"{HEADS} heads x {format_tokens(tokens)} tokens x {HEAD_DIM}, {fmt.name}"
    for kernel, times, num_bytes in (
        ("page_store", stored, moved),
        ("page_dequantize", read, moved),
        ("page_digest", digested, digest_moved),
    ):
        yield kernel_row(kernel, shape, times, num_bytes=num_bytes)
