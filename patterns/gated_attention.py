"""Attention of a transformers model with a gate per KV head between full and streaming attention.

Registered under a name of ours with `transformers.AttentionInterface`: a model loaded with it behaves as with "sdpa"
until its forward is given `longrun_gates`. Then the output of a KV head's query group is

    gate * full + (1 - gate) * streaming

in float32, where a streaming query at position p sees the positions below sink_size and p - recent_size + 1 .. p, as in
the runtime (kernels/banded_attention.py) and at any length. Gradients reach the gates and the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longrun.kernels.banded_attention import BandPlan, BandTile, plan_band

ATTN_IMPLEMENTATION = "longrun_gated"
BATCH_BYTES = 2**28
"""The most memory for one matrix of attention scores, float32, of tiles computed at once (one tile at least)."""

# The fused kernels whose backward pass can be deterministic; cuDNN's cannot, and newer versions of torch prefer it.
_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Gates:
    """What `longrun_gates` hands to every layer.

    Attributes:
        values: [num_layers, num_kv_heads], float32; 1 is full attention, 0 streaming.
        band: tiles and masks of the streaming attention over the whole text, in the model's dtype.
        repeatable: streaming tiles run as plain products and softmax, several at once, and once more in the backward
            pass: on a GPU the fused kernel that takes a mask adds its gradients in another order each time.
    """

    values: Tensor
    band: BandPlan
    repeatable: bool = False

    @classmethod
    def over(cls, values: Tensor, num_tokens: int, sink_size: int, recent_size: int, dtype: torch.dtype) -> Gates:
        """Gates for a text of `num_tokens` tokens that starts at position 0."""
        band = plan_band(0, num_tokens, sink_size, recent_size, dtype, values.device)
        return cls(values, band, repeatable=values.is_cuda)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, band: BandPlan, softmax_scale: float, repeatable: bool = False
) -> Tensor:
    """Sinks and window for a text from position 0, in tiles of queries: time and memory grow with T * window.

    Args:
        q: [num_kv_heads, group, T, head_dim].
        k, v: [num_kv_heads, T, head_dim].
        band: `plan_band(0, T, ...)`.
        repeatable: as in `Gates`.

    Returns:
        [num_kv_heads, group, T, head_dim]; differentiable (no in-place writes, unlike the runtime's).
    """
    heads, group, _, dim = q.shape
    if repeatable:
        most = BATCH_BYTES // (4 * heads * group)
        batches = [_streaming_batch(q, k, v, band, tiles, softmax_scale) for tiles in _alike(band.tiles, most)]
        return torch.cat(batches, dim=2)
    found = []
    for tile in band.tiles:
        window = slice(band.window_start + tile.key_first, band.window_start + tile.key_stop)
        tile_k = torch.cat((k[:, : band.num_sinks], k[:, window]), dim=1)
        tile_v = torch.cat((v[:, : band.num_sinks], v[:, window]), dim=1)
        count = tile.stop - tile.first
        packed = q[:, :, tile.first : tile.stop].reshape(1, heads, group * count, dim)
        mask = tile.mask.repeat(group, 1)
        out = scaled_dot_product_attention(packed, tile_k[None], tile_v[None], attn_mask=mask, scale=softmax_scale)
        found.append(out.view(heads, group, count, dim))
    return torch.cat(found, dim=2)


def _alike(tiles: tuple[BandTile, ...], most: int) -> Iterator[list[BandTile]]:
    """Runs of tiles that follow one another under the same mask, of at most `most` mask entries together."""
    run: list[BandTile] = []
    for tile in tiles:
        if run and (tile.mask is not run[0].mask or (len(run) + 1) * tile.mask.numel() > most):
            yield run
            run = []
        run.append(tile)
    yield run


def _streaming_batch(
    q: Tensor, k: Tensor, v: Tensor, band: BandPlan, tiles: list[BandTile], softmax_scale: float
) -> Tensor:
    """Tiles of `_alike`, as `streaming_attention` has them: [num_kv_heads, group, tokens of the tiles, head_dim]."""
    heads, group, _, dim = q.shape
    first, last, number = tiles[0], tiles[-1], len(tiles)
    count, width = first.stop - first.first, first.key_stop - first.key_first
    start, stop = band.window_start + first.key_first, band.window_start + last.key_stop

    def keys_of(x: Tensor) -> Tensor:
        sinks = x[:, : band.num_sinks].expand(number, -1, -1, -1)
        if not width:
            return sinks
        windows = x[:, start:stop].unfold(1, width, count)  # [heads, number, dim, width], a view
        return torch.cat((sinks, windows.permute(1, 0, 3, 2)), dim=2)

    packed = q[:, :, first.first : last.stop].unflatten(2, (number, count)).permute(2, 0, 1, 3, 4)
    packed = packed.reshape(number, heads, group * count, dim)
    inputs = (packed, keys_of(k), keys_of(v), first.mask.repeat(group, 1), softmax_scale)
    out = checkpoint(_plain_attention, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out.view(number, heads, group, count, dim).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)


def gated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    longrun_gates: Gates | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer; dropout and a checkpoint's own sliding window are ignored.

    Args:
        module: the layer's attention, with `layer_idx`.
        query: [1, num_qo_heads, T, head_dim] after RoPE.
        key, value: [1, num_kv_heads, T, head_dim].
        attention_mask: None; a batch of one needs no mask.

    Returns:
        ([1, T, num_qo_heads, head_dim], None).
    """
    with sdpa_kernel(_REPEATABLE) if query.is_cuda else nullcontext():
        full, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if longrun_gates is None:
        return full, None
    assert attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    heads, length, dim = key.shape[1:]
    scale = dim**-0.5 if scaling is None else scaling
    grouped = query.view(heads, -1, length, dim)
    streaming = streaming_attention(grouped, key[0], value[0], longrun_gates.band, scale, longrun_gates.repeatable)
    streaming = streaming.flatten(0, 1).transpose(0, 1)[None]
    gates = longrun_gates.values[module.layer_idx].repeat_interleave(query.shape[1] // heads)[:, None]
    return (gates * full + (1.0 - gates) * streaming).to(full.dtype), None


AttentionInterface.register(ATTN_IMPLEMENTATION, gated_attention_forward)
