"""The streaming heads' cache of one layer: sinks and a ring of the most recent tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.specs.cache_spec import ring_slot


class Ring:
    """Keys and values of `num_heads` streaming heads: positions below sink_size, and the last recent_size.

    Token p stands at slot p if p < sink_size, else at `sink_size + (p - sink_size) % recent_size`. The order
    within the ring does not matter to attention, since positions are in the keys already (RoPE comes first).

    Args:
        k, v: [num_heads, num_slots, head_dim], the ring's memory; its attributes of the same names.
    """

    def __init__(self, k: Tensor, v: Tensor, sink_size: int, recent_size: int) -> None:
        self.k, self.v, self.sink_size, self.recent_size = k, v, sink_size, recent_size

    @property
    def num_slots(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def _slots(self, first: int, stop: int) -> Tensor:
        positions = torch.arange(first, stop, device=self.k.device)
        wrapped = self.sink_size + (positions - self.sink_size) % self.recent_size
        return torch.where(positions < self.sink_size, positions, wrapped)

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Write tokens [start, start + T): k, v [num_heads, T, head_dim]."""
        stop = start + k.shape[1]
        if stop - start == 1:
            slot = ring_slot(start, self.sink_size, self.recent_size)
            self.k[:, slot], self.v[:, slot] = k[:, 0], v[:, 0]
            return
        sinks = max(0, min(self.sink_size, stop) - start)
        recent = max(start + sinks, stop - self.recent_size)
        for first, last in ((start, start + sinks), (recent, stop)):
            if first < last:
                slots = self._slots(first, last)
                self.k[:, slots] = k[:, first - start : last - start].to(self.k.dtype)
                self.v[:, slots] = v[:, first - start : last - start].to(self.v.dtype)

    def in_order(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens held when `seq_len` have been written, in order: [num_heads, n, head_dim]."""
        sinks = min(self.sink_size, seq_len)
        first = max(sinks, seq_len - self.recent_size)
        if first == sinks:
            return self.k[:, :seq_len], self.v[:, :seq_len]
        slots = torch.cat((torch.arange(sinks, device=self.k.device), self._slots(first, seq_len)))
        return self.k[:, slots], self.v[:, slots]
