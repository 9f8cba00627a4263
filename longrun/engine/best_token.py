"""The likeliest next token: found on the device by one kernel, brought to the host by one copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrun.errors import logits_not_finite


class BestToken:
    """The id and the logit of the likeliest token, side by side in memory that may be the host's or the device's.

    Args:
        words: int64 [2], used in place: the token id, and a word whose first half is the logit as float32.
    """

    def __init__(self, words: Tensor) -> None:
        assert words.shape == (2,) and words.dtype == torch.int64
        self.words = words
        self._token_id, self._logit = words[0], words.view(torch.float32)[2]

    def find(self, logits: Tensor) -> None:
        """Write the largest of `logits` (float32 [vocab_size], where `words` are) and its index. Of equal ones the
        first is taken, and NaN counts as the largest."""
        torch.max(logits, 0, out=(self._logit, self._token_id))

    def read(self) -> int:
        """The token id, from words in host memory.

        Raises:
            CheckpointError: its logit is NaN or infinite.
        """
        assert self.words.device.type == "cpu"
        if not math.isfinite(self._logit.item()):
            raise logits_not_finite()
        return int(self._token_id.item())
