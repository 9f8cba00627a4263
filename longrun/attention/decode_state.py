"""What changes from token to token in decode, in one device buffer that one copy fills."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longrun.cache.dual import TokenPlace

_WORDS = 4  # int64: the likeliest token's id and its logit, tail slot, ring slot
_INTS = 4  # int32: three lengths, ring length


class DecodeState:
    """Device tensors that the kernels of a decode step read when they run.

    Attributes:
        best: int64 [2], where a step writes the likeliest token and its logit; see `longrun.engine.best_token`.
        token_id: int64 [1], the token to take in: the first word of `best`, so that a step leaves it for the next one.
        slots: int64 [2], where the token's keys and values go: slot in the tail, slot in the ring.
        cos, sin: float32 [head_dim].
        lengths: int32 [3], as `ExactTokens` has them.
        ring_len: int32 [1], valid slots of the rings.
    """

    def __init__(self, head_dim: int, device: torch.device) -> None:
        sizes = (8 * _WORDS, 4 * _INTS, 8 * head_dim)
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._host_parts = [part.numpy() for part in self._split(self._host, sizes)]
        words, ints, angles = self._split(self._device, sizes)
        self.best, self.token_id, self.slots = words[:2], words[:1], words[2:]
        self.lengths, self.ring_len = ints[:3], ints[3:4]
        self.cos, self.sin = angles[:head_dim], angles[head_dim:]

    @staticmethod
    def _split(buffer: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        words, ints, angles = buffer.split(sizes)
        return words.view(torch.int64), ints.view(torch.int32), angles.view(torch.float32)

    @property
    def nbytes(self) -> int:
        return self._device.nbytes

    def fill(self, token_id: int | None, place: TokenPlace, cos: np.ndarray, sin: np.ndarray) -> None:
        """Describe the next token, on the current stream. Everything comes as numpy arrays or numbers: a handful of
        torch operations would take a tenth of a millisecond a token.

        Args:
            token_id: None leaves the one that the step before this one found.
            cos, sin: float32 [head_dim].
        """
        if self._copied is not None:
            self._copied.synchronize()  # the previous copy still reads the host buffer
        words, ints, angles = self._host_parts
        words[:] = token_id or 0, 0, place.tail_slot, place.ring_slot
        ints[:] = place.sink_tokens, place.tail_tokens, place.tail_start, place.ring_tokens
        angles[: len(cos)], angles[len(cos) :] = cos, sin
        kept = self.best.nbytes if token_id is None else 0  # it comes first
        self._device[kept:].copy_(self._host[kept:], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
