"""Both attention backends over a small cache whose chunks are read sparsely, and what they choose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from longrun.attention.cuda_backend import CudaAttention
from longrun.attention.interface import Step
from longrun.attention.torch_backend import TorchAttention
from longrun.cache.dual import DualCache
from longrun.cache.page_movers import KernelPageMover
from longrun.kernels.gpu_kernels import reference_kernels
from longrun.quant.kv_format import PageFormat
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.prefill_spec import PrefillSpec
from longrun.specs.reach import ALL_TOKENS

DIM, KV_HEADS, GROUP, SINK, RECENT = 64, 4, 2, 20, 50
ALL = PrefillSpec(floor=10**6, cap=1.0)
BACKENDS = ("torch", "cuda")


def make(
    backend, prefill, capacity, kv="int4", device_share=1.0, page_size=16, reaches=((ALL_TOKENS,) * 3,), scratch=160,
    dtype=torch.float32, chunk_size=None, kernels=None, device="cpu",
):  # fmt: skip
    """A backend with one row of `reaches` a layer: heads beyond them stream. The GPU's runs over reference kernels
    where no others are given."""
    fmt = PageFormat(kv, page_size, DIM)
    pages, heads = fmt.pooled_pages(capacity), tuple(map(len, reaches))
    finite = any(reach < ALL_TOKENS for row in reaches for reach in row)
    spec = CacheSpec(
        heads, KV_HEADS, fmt, capacity, SINK, RECENT, int(pages * device_share), 18, reaches if finite else ()
    )  # fmt: skip
    fused = backend == "cuda"
    shape = AttentionSpec(
        scratch, max(heads), KV_HEADS * GROUP, KV_HEADS, DIM, dtype.itemsize, chunk_size or capacity, SINK, RECENT,
        fused=fused, fetch_table_pages=2 * pages * max(heads) if fused else 0, head_counts=len(set(heads)),
        num_layers=len(reaches), listed_pages=pages, prefill=prefill,
    )  # fmt: skip
    if not fused:
        return TorchAttention(DualCache(spec, torch.device(device)), shape, dtype, None)
    kernels = kernels or reference_kernels()
    mover = KernelPageMover(kernels.store_pages, kernels.copy_pages, kernels.digest_pages, kernels.on_gpu)
    host = torch.zeros(spec.host_pages, fmt.payload_bytes, dtype=torch.uint8, pin_memory=kernels.on_gpu)
    return CudaAttention(DualCache(spec, torch.device(device), mover, host), shape, dtype, kernels)


def random_tokens(n, layers=1, seed=0):
    """Queries and keys in steps of 1/8, so that sums of their products are the same in any order."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(layers, n, KV_HEADS * GROUP, DIM, generator=g)
    k, v = torch.randn(2, layers, n, KV_HEADS, DIM, generator=g)
    return (q * 8).round() / 8, (k * 8).round() / 8, v


def read(attention, q, k, v, chunks, start=0):
    """Feed tokens in chunks of (length, whether it is sparse); the outputs [layers, n, heads, head_dim]."""
    out = torch.full_like(q, float("nan"))
    for size, sparse in chunks:
        piece = slice(start, start + size)
        for layer in range(len(q)):
            given = [x[layer, piece].to(x.dtype, copy=True) for x in (q, k, v)]  # attention overwrites them
            out[layer, piece] = attention.run(layer, *given, Step(start, size, None, None, sparse=sparse))
        attention.cache.advance(size)
        attention.cache.check()
        start += size
    return out


@dataclass
class Spy:
    """Keeps what every call of `choose_tiles` chose; lists are poisoned before, and scores and lists behind."""

    choose: object
    calls: list = field(default_factory=list)

    def __call__(self, scores, own_lse, left, floor, cap, newest, lists, counts, missed):
        lists.fill_(-(2**30))
        assert scores.isfinite().all() and own_lse.isfinite().all()
        pages, given = scores.shape[2], (floor, cap, newest, left.clone())
        self.choose(scores, own_lse, left, floor, cap, newest, lists, counts, missed)
        scores.fill_(float("nan"))
        chosen = [row[:n].tolist() for row, n in zip(lists, counts.tolist(), strict=True)]
        self.calls.append((pages, given, chosen, missed.clone()))


def spied(attention):
    """Every choice of the attention from now on."""
    sparse = attention.sparse
    spy = Spy(sparse._kernels.choose_tiles)
    sparse._kernels = replace(sparse._kernels, choose_tiles=spy)
    return spy.calls


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()
