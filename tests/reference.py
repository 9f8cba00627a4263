"""Attention by masks, written independently of the cache: what every other implementation is compared with.

Keeps all keys and values; each head sees what a [T, T_total] boolean mask lets it see. Retrieval heads: everything up
to themselves. Streaming heads: positions below sink_size, and the last recent_size positions, their own included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrun.attention.interface import Step


def visible(
    start: int, num_tokens: int, retrieval: bool, sink_size: int = 0, recent_size: int = 0, device: str = "cpu"
) -> Tensor:
    """Boolean [num_tokens, start + num_tokens]: may the query at position start + i see the key at position j?"""
    query = torch.arange(start, start + num_tokens, device=device)[:, None]
    key = torch.arange(start + num_tokens, device=device)[None, :]
    causal = key <= query
    if retrieval:
        return causal
    return causal & ((key < sink_size) | (key > query - recent_size))


class ReferenceAttention:
    """`longrun.attention.interface.Attention` for tests.

    Args:
        num_retrieval: per layer, how many KV heads (the first ones) are retrieval heads; None for all.
        dtype: of the kept keys and values and of the arithmetic.
    """

    def __init__(
        self,
        num_layers: int,
        num_retrieval: Sequence[int] | None = None,
        sink_size: int = 0,
        recent_size: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_retrieval = num_retrieval
        self.sink_size = sink_size
        self.recent_size = recent_size
        self.dtype = dtype
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        keys = self._append(self.keys, layer_idx, k)
        values = self._append(self.values, layer_idx, v)
        assert keys.shape[0] == step.start + step.num_tokens == step.start + q.shape[0]
        group_size = q.shape[1] // k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for head in range(q.shape[1]):
            kv_head = head // group_size
            retrieval = self.num_retrieval is None or kv_head < self.num_retrieval[layer_idx]
            mask = visible(
                step.start, step.num_tokens, retrieval, self.sink_size, self.recent_size, device=str(q.device)
            )
            scores = q[:, head].to(self.dtype) @ keys[:, kv_head].T * q.shape[2] ** -0.5
            weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
            out[:, head] = (weights @ values[:, kv_head]).to(q.dtype)
        return out

    def _append(self, store: list[Tensor | None], layer_idx: int, new: Tensor) -> Tensor:
        new = new.to(self.dtype, copy=True)
        old = store[layer_idx]
        store[layer_idx] = new if old is None else torch.cat((old, new))
        return store[layer_idx]
