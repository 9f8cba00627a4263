"""A cache full of random content, without reading any text: for timing decode at lengths that take long to read."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.cache.dual import DualCache
from longrun.cache.pages import PagedHeads
from longrun.cache.pool import PagePool
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import exact_dtype

_DISTINCT_PAGES = 4096
_LIBRARY_BYTES = 128 * 2**20
_TEMPORARY_BYTES = 256 * 2**20


@torch.inference_mode()
def fill_synthetic(cache: DualCache, seq_len: int, seed: int = 0) -> None:
    """Make an empty cache hold `seq_len` tokens of random content, its pages placed as appending would place them.

    Every layer takes its pages from a library of a few thousand distinct random ones (fewer where a page is large),
    chosen by a hash of (seed, layer, head, page): content is repeated, memory is not, which is all that timing needs.
    The content of a page depends neither on where it stands, nor on `seq_len`, nor on the capacity, so an offloaded
    cache and one that is all on the device hold the same sequence. A CPU and a GPU draw different numbers.

    Keys spread over a few units and values over one, around zero: attention is neither flat nor on one token.

    Args:
        cache: empty, `seq_len` 0.
        seq_len: tokens, 1 to the capacity.
        seed: at least 0.

    Memory: at most about 400 MB more than the cache, on its device, during the call.
    """
    assert cache.seq_len == 0, "only an empty cache can be filled"
    assert 0 < seq_len <= cache.spec.capacity and seed >= 0
    fmt, device = cache.spec.page_format, cache.device
    count = distinct_pages(fmt)
    for layer_idx, (pages, ring) in enumerate(cache.layers):
        generator = torch.Generator(device).manual_seed(int(_mix(torch.tensor(seed * 1_000_003 + layer_idx + 1))))
        exact = []
        if pages is not None:
            payload, index = _library(count, fmt, generator, device)
            _place(pages, seq_len, payload, index, choose_pages(layer_idx, pages, seq_len, seed, count))
            exact += [pages.tail_k, pages.tail_v, pages.sink_k, pages.sink_v]
        if ring is not None:
            exact += [ring.k, ring.v]
        for tensor in exact:
            _normal_(tensor, generator)
    cache.seq_len = seq_len


def distinct_pages(fmt: PageFormat) -> int:
    """Pages of a layer's library: 4,096, or as many as 128 MiB hold."""
    return max(1, min(_DISTINCT_PAGES, _LIBRARY_BYTES // fmt.page_bytes))


def choose_pages(layer_idx: int, pages: PagedHeads, seq_len: int, seed: int, count: int) -> Tensor:
    """Which of the layer's `count` library pages each pooled page is: int64 [num_heads, pooled pages] on the device."""
    heads = torch.arange(pages.num_heads, device=pages.tail_k.device)[:, None]
    numbers = torch.arange(pages.fmt.pooled_pages(seq_len), device=pages.tail_k.device)
    key = numbers * 0x9E3779B1 + heads * 0x85EBCA77 + layer_idx * 0xC2B2AE3D + seed * 0x27D4EB2F
    return _mix(key) % count


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (triple32's first rounds), on int64."""
    x = x & 0xFFFFFFFF
    x = (x ^ x >> 17) * 0xED5AD4BB & 0xFFFFFFFF
    x = (x ^ x >> 11) * 0xAC4C1B51 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x31848BAB & 0xFFFFFFFF
    return x ^ x >> 14


def _library(
    count: int, fmt: PageFormat, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """`count` random pages: uint8 [count, payload_bytes], float16 [count, 2, head_dim] (quantized) or None."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).mul_(high - low).add_(low)

    def centred(width: Tensor, bits: int) -> Tensor:
        """Scales and minima of groups of this width around about zero: float16 [count, 2, n]."""
        middle = uniform(-0.2, 0.2, *width.shape)
        return torch.stack((width / (2**bits - 1), middle - width / 2), dim=1).half()

    if not fmt.quantized:
        both = torch.randn(count, 2, fmt.page_size, fmt.head_dim, generator=generator, device=device).mul_(0.5)
        return both.to(exact_dtype(fmt)).view(count, -1).view(torch.uint8), None
    payload = torch.randint(
        0, 256, (count, fmt.payload_bytes), dtype=torch.uint8, generator=generator, device=device
    )  # fmt: skip
    scales = centred(uniform(0.5, 1.5, count, fmt.page_size), fmt.value_bits).view(count, -1)
    payload[:, fmt.value_scales_offset :] = scales.view(torch.uint8)
    return payload, centred(uniform(1.0, 3.0, count, fmt.head_dim), fmt.key_bits)


def _place(pages: PagedHeads, seq_len: int, payload: Tensor, index: Tensor | None, choice: Tensor) -> None:
    """Make the pages that `seq_len` tokens have, and copy the content of those of `choice` [num_heads, n]."""
    assert pages.num_pooled == 0
    for new in pages.places.add(choice.shape[1], seq_len):
        chosen = choice[new.heads, new.begin : new.end]
        _copy(new.pool, new.slots.reshape(-1).cpu(), payload, chosen.reshape(-1))
        if pages.index is not None:
            assert index is not None
            for head in range(len(chosen)):
                of_head = pages.index[new.heads][head, new.begin : new.end]
                torch.index_select(index, 0, chosen[head], out=of_head)
        pages.write_digest(new)


def _copy(pool: PagePool, slots: Tensor, payload: Tensor, choice: Tensor) -> None:
    """Row choice[i] of `payload` goes to slots[i] of `pool`; a run of ascending slots is written in place."""
    payload, choice = payload.to(pool.storage.device), choice.to(pool.storage.device)
    first = int(slots[0]) - pool.first_slot
    ascending = bool((slots.diff() == 1).all())
    rows = max(1, _TEMPORARY_BYTES // payload.shape[1])
    for start in range(0, len(slots), rows):
        part = choice[start : start + rows]
        if ascending:
            out = pool.storage[first + start : first + start + len(part)]
            torch.index_select(payload, 0, part, out=out)
        else:
            pool.write(slots[start : start + rows], payload[part])


def _normal_(tensor: Tensor, generator: torch.Generator) -> None:
    """Normal numbers of deviation 0.5, drawn in float32, so that every dtype gets the same ones rounded."""
    drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    tensor.copy_(drawn.mul_(0.5))
