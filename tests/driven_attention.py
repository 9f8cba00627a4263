"""The CPU's attention driven without a model: chunks through torch, single tokens as a session decodes them."""

import numpy as np
import torch

from longrun.attention.cpu_decode import CpuDecode
from longrun.attention.interface import Step
from longrun.attention.torch_backend import TorchAttention
from longrun.cache.dual import DualCache
from longrun.kernels.cpu_kernels import load_cpu_kernels
from longrun.paths import cache_dir


def cpu_kernels():
    return load_cpu_kernels(cache_dir() / "kernels")[0]  # compiled by whichever test comes first


def attention_over(spec, shape, dtype=torch.float32, kernels=None):
    """`decode` of what is returned runs single tokens, where there are compiled kernels."""
    attention = TorchAttention(DualCache(spec, torch.device("cpu")), shape, dtype, kernels and kernels.pages)
    attention.decode = kernels and CpuDecode(attention, dtype, kernels)
    return attention


def drive(attention, q, k, v, chunks):
    """Feed tokens, keys and queries as after RoPE, in the given chunk sizes; the outputs [layers, n, heads, dim]."""
    out, start = torch.full_like(q, float("nan")), 0
    for size in chunks:
        piece = slice(start, start + size)
        decode = attention.decode if size == 1 else None
        if decode:
            decode.begin_decode(start, np.ones(q.shape[3], np.float32), np.zeros(q.shape[3], np.float32))
        for layer in range(len(q)):
            given = [x[layer, piece].clone() for x in (q, k, v)]  # attention may overwrite them
            if decode:
                decode.calls = []
                found = decode.decode(layer, torch.cat(given, dim=1).view(1, -1), None, None, 0.0)
                for call in decode.calls:
                    call()
                out[layer, piece] = found.view(q[layer, piece].shape)
            else:
                out[layer, piece] = attention.run(layer, *given, Step(start, size, None, None))
        attention.cache.advance(size)
        attention.cache.check()
        start += size
    return out
