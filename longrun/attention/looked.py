"""How much the far-reaching heads attend to each token of the past: sums over queries and heads.

A token counts with the square of every attention weight that it got: a head that stares at a few tokens says where an
answer came from, one that spreads its weight over thousands does not, and the sum of many small weights drowns the
few large ones (docs/citations.md). Nothing but one number a token is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LookedTokens:
    """Adds up squared attention weights by position.

    Args:
        num_tokens: positions [0, num_tokens) are counted.
        softmax_scale: of the scores.
        tile_bytes: of scores and their copies that are held at once, beside a single column or row of them.

    Attributes:
        sums: float32 [num_tokens], over everything added so far.
    """

    def __init__(self, num_tokens: int, softmax_scale: float, tile_bytes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_tokens, dtype=torch.float32, device=device)
        self._scale, self._tile = softmax_scale, tile_bytes // 8

    def add(self, q: Tensor, k: Tensor, lse: Tensor, places: Sequence[range]) -> None:
        """Queries that see all of some tokens.

        Args:
            q: [num_heads, rows, head_dim], of a KV head all queries of its group; k: [num_heads, n, head_dim].
            lse: float32 [num_heads, rows], natural log-sum-exp of each query's scaled scores over all that it sees.
            places: positions of the n keys, in their order.
        """
        width = max(1, self._tile // q.shape[1])
        for head_q, head_k, head_lse in zip(q, k, lse[..., None], strict=True):
            head_q, at = head_q.float(), 0
            for place in places:
                for first in range(place.start, place.stop, width):
                    stop = min(first + width, place.stop)
                    scores = head_q @ head_k[at : at + stop - first].float().T
                    self.sums[first:stop] += _squared_weights_(scores.mul_(self._scale), head_lse).sum(dim=0)
                    at += stop - first

    def add_window(
        self, q: Tensor, k: Tensor, past_k: Tensor, start: int, first: int, sink_size: int, reach: int
    ) -> None:
        """Queries at positions `start` on that see the sinks and their newest `reach` tokens, their own included.

        Args:
            q: [T, num_heads, group, head_dim]; k: [num_heads, T, head_dim], the queries' own tokens.
            past_k: [num_heads, n, head_dim]: the sinks below `start`, then the tokens [first, start).
        """
        device = q.device
        sinks = past_k.shape[1] - (start - first)
        own = torch.arange(start, start + len(q), device=device)
        keys = torch.cat((torch.arange(sinks, device=device), torch.arange(first, start, device=device), own))
        held, rows = past_k.shape[1], max(1, self._tile // (q.shape[2] * len(keys)))
        for head in range(q.shape[1]):
            all_k = torch.cat((past_k[head], k[head])).float()
            for begin in range(0, len(q), rows):
                part = slice(begin, begin + rows)
                asking = own[part, None]
                hidden = (keys > asking) | ((keys >= sink_size) & (keys <= asking - reach))
                scores = (q[part, head].float() @ all_k.T).mul_(self._scale)
                scores.masked_fill_(hidden[:, None], -torch.inf)
                lse = scores.logsumexp(dim=-1, keepdim=True)
                found = _squared_weights_(scores[..., :held], lse).sum(dim=(0, 1))
                self.sums[:sinks] += found[:sinks]
                self.sums[first:start] += found[sinks:]


def _squared_weights_(scores: Tensor, lse: Tensor) -> Tensor:
    """Squares of the weights exp(scores - lse), in place of the scores."""
    return scores.sub_(lse).mul_(2).exp_()
