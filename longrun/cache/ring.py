"""The streaming heads' cache of one layer: sinks and a ring of the most recent tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Ring:
    """Keys and values of `num_heads` streaming heads: positions below sink_size always, then the last recent_size.

    Token p stands at slot p if p < sink_size, else at `sink_size + (p - sink_size) % recent_size`. The order within
    the ring does not matter to attention, since positions are in the keys already (RoPE comes first).

    Attributes:
        k, v: [num_heads, num_slots, head_dim] of `dtype`.
    """

    def __init__(
        self, num_heads: int, num_slots: int, sink_size: int, recent_size: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.sink_size, self.recent_size = sink_size, recent_size
        self.k = torch.zeros(num_heads, num_slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    @property
    def num_slots(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def num_valid(self, seq_len: int) -> int:
        """Leading slots that hold a token of the window when `seq_len` tokens have been written."""
        return min(seq_len, self.sink_size + self.recent_size)

    def _slots(self, first: int, stop: int) -> Tensor:
        positions = torch.arange(first, stop, device=self.k.device)
        wrapped = self.sink_size + (positions - self.sink_size) % self.recent_size
        return torch.where(positions < self.sink_size, positions, wrapped)

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Write tokens [start, start + T): k, v [num_heads, T, head_dim]."""
        stop = start + k.shape[1]
        if stop - start == 1:
            slot = start if start < self.sink_size else self.sink_size + (start - self.sink_size) % self.recent_size
            self.k[:, slot], self.v[:, slot] = k[:, 0], v[:, 0]
            return
        sinks = max(0, min(self.sink_size, stop) - start)
        recent = max(start + sinks, stop - self.recent_size)
        for first, last in ((start, start + sinks), (recent, stop)):
            if first < last:
                slots = self._slots(first, last)
                self.k[:, slots] = k[:, first - start : last - start].to(self.k.dtype)
                self.v[:, slots] = v[:, first - start : last - start].to(self.v.dtype)

    def window(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions [first, stop) in order, [num_heads, stop - first, head_dim]; they must be
        held: sinks, or among the last recent_size before the next token."""
        slots = self._slots(first, stop)
        return self.k[:, slots], self.v[:, slots]
