"""What changes from token to token in decode, in one device buffer that one copy fills."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORDS = 4  # int64: the likeliest token's id and its logit, tail slot, ring slot
_INTS = 8  # int32: four lengths, ring length, host pages, unused, unused


class DecodeState:
    """Device tensors that the kernels of a decode step read when they run.

    Attributes:
        best: int64 [2], where a step writes the likeliest token and its logit; see `longrun.engine.best_token`.
        token_id: int64 [1], the token to take in: the first word of `best`, so that a step leaves it for the next one.
        slots: int64 [2], where the token's keys and values go: slot in the tail, slot in the ring.
        cos, sin: float32 [head_dim].
        lengths: int32 [4], first device page, number of device pages, sink tokens, tail tokens.
        ring_len: int32 [1], valid slots of the rings.
        host_pages: int32 [1], pages of every retrieval head that stand in the host pool.
        rounds: int32 [num_rounds, 4], lengths of every round of fetched host pages.
    """

    def __init__(self, head_dim: int, num_rounds: int, device: torch.device) -> None:
        sizes = (8 * _WORDS, 4 * _INTS, 16 * num_rounds, 8 * head_dim)
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._host_parts = [part.numpy() for part in self._split(self._host, sizes)]
        words, ints, rounds, angles = self._split(self._device, sizes)
        self.best, self.token_id, self.slots = words[:2], words[:1], words[2:]
        self.lengths, self.ring_len, self.host_pages = ints[:4], ints[4:5], ints[5:6]
        self.rounds = rounds.view(num_rounds, 4)
        self.cos, self.sin = angles[:head_dim], angles[head_dim:]

    @staticmethod
    def _split(buffer: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        words, ints, rounds, angles = buffer.split(sizes)
        return words.view(torch.int64), ints.view(torch.int32), rounds.view(torch.int32), angles.view(torch.float32)

    @property
    def nbytes(self) -> int:
        return self._device.nbytes

    def fill(
        self, token_id: int | None, slots: tuple[int, int], lengths: tuple[int, int, int, int], ring_len: int,
        host_pages: int, round_lengths: np.ndarray | None, cos: np.ndarray, sin: np.ndarray,
    ) -> None:  # fmt: skip
        """Describe the next token, on the current stream. Everything comes as numpy arrays or numbers: a handful of
        torch operations would take a tenth of a millisecond a token.

        Args:
            token_id: None leaves the one that the step before this one found.
            round_lengths: int32 [num_rounds, 4], or None without rounds.
            cos, sin: float32 [head_dim].
        """
        if self._copied is not None:
            self._copied.synchronize()  # the previous copy still reads the host buffer
        words, ints, rounds, angles = self._host_parts
        words[:] = token_id or 0, 0, *slots
        ints[:6] = *lengths, ring_len, host_pages
        if round_lengths is not None:
            rounds[:] = round_lengths.reshape(-1)
        angles[: len(cos)], angles[len(cos) :] = cos, sin
        kept = self.best.nbytes if token_id is None else 0  # it comes first
        self._device[kept:].copy_(self._host[kept:], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
