"""A chunk's attention to sinks and a sliding window in torch, with the past's tokens in order."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.kernels.banded_attention import BandPlan, banded_attention, plan_band


class WindowAttention:
    """`kernels.banded_prefill.banded_prefill` through `kernels.banded_attention`, on any device."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, int], BandPlan] = {}  # by window, of one step
        self._step = (-1, -1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, start: int, sink_size: int,
        recent_size: int, softmax_scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        """
        Args:
            q, out: [T, num_heads, group, head_dim].
            k, v: [num_heads, T, head_dim], the chunk's own.
            past_k, past_v: [num_heads, n, head_dim], any dtype: sinks below `start`, then the newest tokens before
                `start`, at most recent_size of them, in order.
        """
        plan = self._plan(start, len(q), sink_size, recent_size, q.dtype, q.device)
        held = min(plan.num_sinks, start)
        sinks = [x[:, :held].to(q.dtype) for x in (past_k, past_v)]
        if held < plan.num_sinks:
            new = slice(held - start, plan.num_sinks - start)
            sinks = [torch.cat((old, x[:, new]), dim=1) for old, x in zip(sinks, (k, v), strict=True)]
        if plan.window_start < start:
            older = [x[:, x.shape[1] - (start - plan.window_start) :].to(q.dtype) for x in (past_k, past_v)]
            window = [torch.cat((old, x), dim=1) for old, x in zip(older, (k, v), strict=True)]
        else:
            window = [x[:, plan.window_start - start :] for x in (k, v)]
        found = banded_attention(q.permute(1, 2, 0, 3), *sinks, *window, plan, softmax_scale)
        out.copy_(found.permute(2, 0, 1, 3))

    def _plan(
        self, start: int, num_tokens: int, sink_size: int, recent_size: int, dtype: torch.dtype, device: torch.device
    ) -> BandPlan:
        if self._step != (start, num_tokens):
            self._plans, self._step = {}, (start, num_tokens)
        key = sink_size, recent_size
        if key not in self._plans:
            self._plans[key] = plan_band(start, num_tokens, sink_size, recent_size, dtype, device)
        return self._plans[key]
