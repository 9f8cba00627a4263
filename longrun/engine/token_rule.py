"""Answers of a given form: which tokens may come next, and logits without the others."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TokenRule(Protocol):
    """Which tokens may come next in one answer, from its first token on. Its methods raise InputError where the form
    turns out to be too complicated to follow."""

    @property
    def is_complete(self) -> bool:
        """Nothing may follow any more."""
        ...

    def allowed(self) -> bytes:
        """A bit for every token id of the vocabulary, the lowest bit of the first byte first; one is set at least."""
        ...

    def take(self, token_id: int) -> None:
        """This token, an allowed one, comes next."""
        ...


def masked_logits(logits: Tensor, allowed: bytes) -> Tensor:
    """A copy of the logits, -inf for every token that is not allowed.

    Args:
        logits: float32 [vocab_size].
        allowed: as `TokenRule.allowed` gives it.
    """
    held = torch.frombuffer(bytearray(allowed), dtype=torch.uint8).to(logits.device)
    bits = (held[:, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    return logits.masked_fill(bits.flatten()[: len(logits)] == 0, -torch.inf)
