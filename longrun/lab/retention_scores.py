"""Which tokens of a KV head matter once the prompt has been read: one dataclass with one method a way to score them.

Keys are shared by a group of query heads, and what a group's heads say is averaged, so that a KV head keeps one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

_TILE = 1 << 25  # attention weights that stand in memory at a time: 128 MiB of float32
_TILE_ROWS = 256  # query tokens of a tile


@dataclass(frozen=True)
class LayerPrompt:
    """One layer at the end of the prompt, n tokens of which the newest w, its window, are kept anyway.

    Attributes:
        queries: [w, num_qo_heads, head_dim] of the window, after RoPE; keys: [num_kv_heads, n, head_dim].
        received: float32 [num_kv_heads, n], see `received_attention`, summed over the prompt; None where the score does
            not read it.
    """

    layer_idx: int
    num_layers: int
    queries: Tensor
    keys: Tensor
    received: Tensor | None
    softmax_scale: float

    @property
    def num_candidates(self) -> int:
        """Tokens before the window."""
        return self.keys.shape[1] - len(self.queries)


class Score(Protocol):
    """A way to score. `reads_received`: it needs `LayerPrompt.received`, which costs prefill time."""

    reads_received: ClassVar[bool]

    def score(self, prompt: LayerPrompt) -> Tensor:
        """float32 [num_kv_heads, num_candidates]; more is better."""
        ...


@dataclass(frozen=True)
class SnapKVScore:
    """Attention from the window (SnapKV, arXiv 2404.14469): its queries' softmax weights summed, and averaged over
    `kernel` neighbours (odd; the paper uses 5 and 7), so that a token is kept with what stands around it.

    The paper selects per query head after repeating keys over the group, which would multiply the cache by the group.
    """

    kernel: int = 7
    reads_received: ClassVar[bool] = False

    def score(self, prompt: LayerPrompt) -> Tensor:
        """See `Score.score`. The scores of one KV head stand in memory at a time."""
        heads, count, dim = prompt.keys.shape
        window = len(prompt.queries)
        future = torch.ones(window, count, dtype=torch.bool, device=prompt.keys.device).triu(count - window + 1)
        grouped = prompt.queries.view(window, heads, -1, dim)
        votes = []
        for head in range(heads):
            scaled = (grouped[:, head].float() * prompt.softmax_scale).transpose(0, 1)
            weights = (scaled @ prompt.keys[head].float().T).masked_fill_(future, float("-inf")).softmax(dim=-1)
            votes.append(weights.sum(dim=1).mean(dim=0)[: prompt.num_candidates])
        return avg_pool1d(torch.stack(votes)[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]


@dataclass(frozen=True)
class HeavyHitterScore:
    """Attention from every query of the prompt (H2O, arXiv 2306.14048). The paper evicts at every step and gives half
    of the budget to the newest tokens; here the prompt is read whole and the window is as in the other rules."""

    reads_received: ClassVar[bool] = True

    def score(self, prompt: LayerPrompt) -> Tensor:
        """See `Score.score`."""
        assert prompt.received is not None and prompt.received.shape[1] == prompt.keys.shape[1]
        return prompt.received[:, : prompt.num_candidates]


@dataclass(frozen=True)
class RecencyScore:
    """The first `sink_size` tokens, then the newest ones (the window of StreamingLLM, arXiv 2309.17453, which uses 4
    sinks). Unlike there the prompt is read whole, and kept tokens stay at their own positions."""

    sink_size: int = 4
    reads_received: ClassVar[bool] = False

    def score(self, prompt: LayerPrompt) -> Tensor:
        """See `Score.score`."""
        newest = torch.arange(prompt.num_candidates, dtype=torch.float32, device=prompt.keys.device)
        newest[: self.sink_size] = float("inf")
        return newest.expand(prompt.keys.shape[0], -1)


@dataclass(frozen=True)
class RandomScore:
    """Tokens drawn at random, every KV head its own: what any score must beat. The same on every device."""

    seed: int = 0
    reads_received: ClassVar[bool] = False

    def score(self, prompt: LayerPrompt) -> Tensor:
        """See `Score.score`."""
        generator = torch.Generator().manual_seed(self.seed * prompt.num_layers + prompt.layer_idx)
        drawn = torch.rand(prompt.keys.shape[0], prompt.num_candidates, generator=generator)
        return drawn.to(prompt.keys.device)


def received_attention(
    q: Tensor, keys: Tensor, lse: Tensor, start: int, softmax_scale: float, tile: int = _TILE
) -> Tensor:
    """The attention that each key gets from a chunk of queries, causal, in tiles of a bounded size.

    Args:
        q: [T, num_qo_heads, head_dim] at positions start, start + 1, ...; keys: [num_kv_heads, start + T, head_dim].
        lse: float32 [num_qo_heads, T], log-sum-exp of each query's scaled scores over all keys that it sees.
        tile: attention weights, in float32, that stand in memory at a time (at least one row of heads).

    Returns:
        float32 [num_kv_heads, start + T]: softmax weights summed over the queries, averaged over the group's heads.
    """
    tokens, num_qo_heads, dim = q.shape
    heads, count = keys.shape[:2]
    assert count == start + tokens
    received = torch.zeros(heads, count, device=keys.device)
    rows = min(_TILE_ROWS, tokens)
    width = max(1, tile // (num_qo_heads * rows))
    for first in range(0, tokens, rows):
        part = q[first : first + rows].float().transpose(0, 1) * softmax_scale
        own, oldest, seen = part.reshape(heads, -1, dim), start + first, start + first + part.shape[1]
        own_lse = lse[:, first : first + rows].reshape(heads, -1, 1)
        for left in range(0, seen, width):
            right = min(left + width, seen)
            k = keys[:, left:right].to(q.dtype).float()
            weights = torch.baddbmm(own_lse, own, k.transpose(1, 2), beta=-1).exp_()
            if right > oldest + 1:
                future = torch.ones(part.shape[1], right - left, dtype=torch.bool, device=q.device)
                weights.view(heads, -1, *future.shape).masked_fill_(future.triu(oldest - left + 1), 0.0)
            received[:, left:right] += weights.sum(dim=1)
    return received.div_(num_qo_heads // heads)
