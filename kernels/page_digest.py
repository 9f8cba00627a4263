"""Stored pages to their digests in torch: the reference of `page_digest_triton.digest_pages`, and what serves where
there is no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages
from longrun.quant.page_digest import encode_digest

_PAGES_AT_ONCE = 32  # a page's keys and values in float32 are 64 KiB at head_dim 128


def digest_pages_reference(
    storage: Tensor, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat,
    slot_offset: int = 0,
) -> None:  # fmt: skip
    """`page_digest_triton.digest_pages` through `quant.page_codec` and `quant.page_digest`: any quantized format, and a
    pool on another device than the rest."""
    check_digest(storage, slots, index, out, fmt, digest_format)
    heads, count = slots.shape
    at_once = max(1, _PAGES_AT_ONCE // max(1, heads))
    for first in range(0, count, at_once):
        part = slice(None), slice(first, first + at_once)
        payload = storage[(slots[part].long() - slot_offset).to(storage.device)].to(out.device)
        out[part] = encode_digest(decode_pages(payload, index[part], fmt)[0], digest_format)


def check_digest(
    storage: Tensor, slots: Tensor, index: Tensor, out: Tensor, fmt: PageFormat, digest_format: DigestFormat
) -> None:
    """Assert shapes and dtypes."""
    assert (fmt.page_size, fmt.head_dim) == (digest_format.page_size, digest_format.head_dim)
    assert storage.dtype == torch.uint8 and storage.is_contiguous() and storage.shape[1] == fmt.payload_bytes
    assert slots.dtype == torch.int32 and slots.ndim == 2
    assert index.dtype == torch.float16 and index.shape == (*slots.shape, 2, fmt.head_dim)
    assert index.stride()[2:] == (fmt.head_dim, 1)
    assert out.dtype == torch.uint8 and out.shape == (*slots.shape, digest_format.page_bytes) and out.stride(2) == 1
