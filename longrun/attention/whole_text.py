"""Attention over a text that is read in one chunk, without a cache: every KV head with a reach of its own.

For measuring what a reach costs; the cache's own attention gives the same up to rounding and page formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.window import WindowAttention
from longrun.kernels.dense_attention import attention_with_lse
from longrun.units import ALL_TOKENS

_PLAN_USES = 100  # calls of one shape: a text is read several times, and most layers are alike


class WholeTextAttention:
    """A head of reach R sees the first `sink_size` tokens and its newest R, the query's own included.

    Args:
        group: query heads of a KV head.
        softmax_scale: of the scores.
        reaches: tokens [num_layers][num_kv_heads], `ALL_TOKENS` for all; None: every head sees all tokens.
        window_attention: as `longrun.attention.window.WindowAttention`, which is used without one.
    """

    def __init__(
        self, group: int, softmax_scale: float, sink_size: int, reaches: Sequence[Sequence[int]] | None = None,
        window_attention: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        self.group, self.softmax_scale, self.sink_size, self.reaches = group, softmax_scale, sink_size, reaches
        self._window_attention = window_attention or WindowAttention()

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`; the step begins at position 0."""
        assert step.start == 0
        k, v = (x.transpose(0, 1).contiguous() for x in (k, v))
        row = (ALL_TOKENS,) * len(k) if self.reaches is None else tuple(self.reaches[layer_idx])
        by_head = q.unflatten(1, (-1, self.group))
        if min(row) >= len(q):
            return self._dense(by_head, k, v).reshape(q.shape)
        out = torch.empty_like(by_head, memory_format=torch.contiguous_format)
        for tokens in sorted(set(row)):
            heads = torch.tensor([head for head, own in enumerate(row) if own == tokens], device=q.device)
            some_q, some_k, some_v = by_head[:, heads], k[heads], v[heads]
            if tokens >= len(q):
                found = self._dense(some_q, some_k, some_v)
            else:
                found = torch.empty_like(some_q)
                self._window_attention(
                    some_q, some_k, some_v, some_k[:, :0], some_v[:, :0], 0, self.sink_size, tokens,
                    self.softmax_scale, found,
                )  # fmt: skip
            out[:, heads] = found
        return out.view(q.shape)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, num_heads, group, head_dim] of q in that shape."""
        q_rows = q.flatten(1, 2).transpose(0, 1)
        found, _ = attention_with_lse(q_rows, k, v, True, self.softmax_scale, plan_uses=_PLAN_USES)
        return found.transpose(0, 1).reshape(q.shape)
