"""Streaming-head attention over a chunk: sinks and a sliding window, cost linear in the chunk.

A query at position p sees the keys at positions below `sink_size` (never later than itself) and at positions
p - recent_size + 1 .. p. Queries are taken in tiles; a tile reads the sinks and the one stretch of keys its windows
cover, under a mask that is the same for all interior tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TILE = 256


@dataclass(frozen=True)
class BandTile:
    """Queries [first, stop) of the chunk; window keys [key_first, key_stop) of the window array; additive mask
    [stop - first, num_sinks + key_stop - key_first]."""

    first: int
    stop: int
    key_first: int
    key_stop: int
    mask: Tensor


@dataclass(frozen=True)
class BandPlan:
    """Made once a step, used by every layer.

    Attributes:
        num_sinks: sink positions [0, num_sinks) that any query of the chunk may see.
        window_start: position of the first key of the window array, which ends with the chunk.
    """

    start: int
    num_tokens: int
    num_sinks: int
    window_start: int
    tiles: tuple[BandTile, ...]


def plan_band(
    start: int, num_tokens: int, sink_size: int, recent_size: int, dtype: torch.dtype, device: torch.device
) -> BandPlan:
    """Tiles and masks for a chunk of tokens [start, start + num_tokens)."""
    stop = start + num_tokens
    num_sinks = min(sink_size, stop)
    window_start = max(num_sinks, start - recent_size + 1)
    sinks = torch.arange(num_sinks, device=device)
    tiles, masks = [], {}
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        key_first, key_stop = max(window_start, first - recent_size + 1), max(window_start, last)
        key = (last - first, first - key_first, key_stop - key_first)
        if first < num_sinks or key not in masks:
            queries = torch.arange(first, last, device=device)[:, None]
            window = torch.arange(key_first, key_stop, device=device)
            seen = torch.cat((sinks <= queries, (window <= queries) & (window > queries - recent_size)), dim=1)
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
            if first >= num_sinks:
                masks[key] = mask
        else:
            mask = masks[key]
        tiles.append(BandTile(first - start, last - start, key_first - window_start, key_stop - window_start, mask))
    return BandPlan(start, num_tokens, num_sinks, window_start, tuple(tiles))


def banded_attention(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, window_k: Tensor, window_v: Tensor, plan: BandPlan, softmax_scale: float
) -> Tensor:
    """Attention of one layer's streaming heads over a chunk.

    Args:
        q: [num_heads, group, T, head_dim].
        sink_k, sink_v: [num_heads, plan.num_sinks, head_dim].
        window_k, window_v: [num_heads, start + T - plan.window_start, head_dim].

    Returns:
        [num_heads, group, T, head_dim], dtype of q.
    """
    heads, group, _, dim = q.shape
    out = torch.empty_like(q)
    for tile in plan.tiles:
        k = torch.cat((sink_k, window_k[:, tile.key_first : tile.key_stop]), dim=1)
        v = torch.cat((sink_v, window_v[:, tile.key_first : tile.key_stop]), dim=1)
        count = tile.stop - tile.first
        packed = q[:, :, tile.first : tile.stop].reshape(1, heads, group * count, dim)
        mask = tile.mask.repeat(group, 1)
        found = scaled_dot_product_attention(packed, k[None], v[None], attn_mask=mask, scale=softmax_scale)
        out[:, :, tile.first : tile.stop] = found.view(heads, group, count, dim)
    return out
