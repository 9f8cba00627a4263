"""Attention of a transformers model that keeps its own keys and notes which tokens were looked at.

A transformers attention function (registered by its public `AttentionInterface`) finds a `ReconstructionAttention`
among the keyword arguments of the model's forward pass and hands it queries, keys and values of one layer. That object
holds keys and values of all layers in fixed buffers, attends causally, and while `scoring` is on keeps, per layer, KV
head and context token, the largest attention probability that any query gave it. Probabilities exist for one tile of
queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "longrun_reconstruction"
TILE_BYTES = 32 * 2**20
GPU_TILE_BYTES = 2**28
"""Of a long context a small tile holds a few queries only: a GPU would mostly wait to be told what to do next."""

# Without cuDNN's, which newer versions of torch prefer and which is planned again for every length of keys.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class ReconstructionAttention:
    """Keys and values of all layers, and the largest attention each context token got.

    A query at position q counts for context token j only if j >= sink_size and j <= q - recent_size: what a streaming
    head sees anyway (sinks and the last `recent_size` tokens, the query itself included) tells nothing.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model.
        context_len: tokens of the context, positions 0 .. context_len - 1.
        capacity: tokens that keys and values are held for; at least context_len and the longest part after it.
        sink_size, recent_size: the streaming window, tokens.
        dtype, device: of keys and values.
        tile_bytes: the most memory that the probabilities of one tile of queries take (one query at least).

    Attributes:
        maxima: float32 [num_layers, num_kv_heads, context_len] on `device`, 0 where nothing was counted.
        length: tokens whose keys are held; set it back to `context_len` to forget a part.
        scoring: whether queries count.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, context_len: int, capacity: int, sink_size: int,
        recent_size: int, dtype: torch.dtype, device: torch.device, tile_bytes: int = TILE_BYTES,
    ) -> None:  # fmt: skip
        shape = (num_layers, num_kv_heads, capacity, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.maxima = torch.zeros((num_layers, num_kv_heads, context_len), dtype=torch.float32, device=device)
        self.context_len, self.sink_size, self.recent_size = context_len, sink_size, recent_size
        self.tile_bytes = tile_bytes
        self.length = 0
        self.scoring = False

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Take in keys and values at positions length .. length + n - 1, and attend to all up to each query.

        Args:
            query: [num_qo_heads, n, head_dim], after RoPE.
            key, value: [num_kv_heads, n, head_dim].
            scale: of the scores.

        Returns:
            [num_qo_heads, n, head_dim] in the dtype of `query`. `length` is left to the caller.
        """
        num_kv_heads, num_tokens, head_dim = key.shape
        stop = self.length + num_tokens
        self._keys[layer_idx, :, self.length : stop] = key
        self._values[layer_idx, :, self.length : stop] = value
        grouped = query.reshape(num_kv_heads, -1, num_tokens, head_dim)
        keys, values = self._keys[layer_idx, :, :stop], self._values[layer_idx, :, :stop]
        attend = self._attend_and_score if self.scoring else self._attend
        return attend(layer_idx, grouped, keys, values, scale).reshape(query.shape)

    def _attend(self, layer_idx: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query [num_kv_heads, group, n, head_dim], keys and values [num_kv_heads, length + n, head_dim]."""
        group, num_tokens = query.shape[1:3]
        mask = None
        if self.length:
            positions = torch.arange(keys.shape[1], device=keys.device)
            mask = positions <= positions[self.length :, None]
        with sdpa_kernel(_BACKENDS) if query.is_cuda else nullcontext():
            return scaled_dot_product_attention(
                query,
                keys[:, None].expand(-1, group, -1, -1),
                values[:, None].expand(-1, group, -1, -1),
                mask,
                is_causal=mask is None and num_tokens > 1,
                scale=scale,
            )

    def _attend_and_score(self, layer_idx: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """As `_attend`, in tiles of queries with their probabilities in float32."""
        num_kv_heads, group, num_tokens, head_dim = query.shape
        tile = max(1, self.tile_bytes // (4 * num_kv_heads * group * keys.shape[1]))
        transposed, values32 = keys.float().transpose(1, 2), values.float()
        result = torch.empty_like(query)
        for start in range(0, num_tokens, tile):
            stop = min(start + tile, num_tokens)
            first, last = self.length + start, self.length + stop
            rows = query[:, :, start:stop].float().reshape(num_kv_heads, -1, head_dim)
            scores = torch.bmm(rows, transposed[:, :, :last]).mul_(scale)
            later = torch.ones((stop - start, stop - start), dtype=torch.bool, device=keys.device).triu_(1)
            by_query = scores.view(num_kv_heads, group, stop - start, last)
            by_query[..., first:].masked_fill_(later, float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            attended = torch.bmm(probabilities, values32[:, :last]).to(query.dtype)
            result[:, :, start:stop] = attended.view(num_kv_heads, group, stop - start, head_dim)
            self._count(layer_idx, probabilities.view(by_query.shape), first)
        return result

    def _count(self, layer_idx: int, probabilities: Tensor, first: int) -> None:
        """Raise the maxima by [num_kv_heads, group, t, keys] of queries at positions first .. first + t - 1."""
        begin, end = self.sink_size, min(self.context_len, probabilities.shape[-1])
        near = max(begin, first - self.recent_size + 1)  # from here on a token is in the window of some query
        if near < end:
            positions = torch.arange(first, first + probabilities.shape[2], device=probabilities.device)
            tokens = torch.arange(near, end, device=probabilities.device)
            inside = tokens > positions[:, None] - self.recent_size
            probabilities[..., near:end].masked_fill_(inside, 0.0)
        if begin < end:
            largest = probabilities[..., begin:end].amax(dim=(1, 2))
            torch.maximum(self.maxima[layer_idx, :, begin:end], largest, out=self.maxima[layer_idx, :, begin:end])


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    reconstruction: ReconstructionAttention, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: [1, heads, n, head_dim] in, [1, n, num_qo_heads, head_dim] out."""
    attended = reconstruction.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return attended.transpose(0, 1)[None], None


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` attends by `reconstruction=ReconstructionAttention(...)` of its forward call."""
    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
