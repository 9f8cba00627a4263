"""How much of their attention tiles may leave to pages that they do not read, steered by what they catch.

Tiles choose by an estimate. Some dense rows tell what share of their attention the choice caught; where that falls
short of what is asked for, the heads leave less from the next chunk on, and where it is more, they leave more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longrun.specs.prefill_counts import PrefillCounts

LEAST_LEFT, MOST_LEFT = 1e-4, 4.0  # of all attention; times what may be missed
_STEP = 2.0  # the most by which one chunk changes a level
_NOTHING = 1e-6


class TileLevels:
    """By layer and query head, in the layer's order: levels and counts. Nothing here waits for the device but `counts`.

    Args:
        mass: the share of attention that is to be caught; None leaves nothing, and steers nothing.

    Attributes:
        left: float32 [num_layers, num_qo_heads], the share that tiles may leave.
    """

    def __init__(self, mass: float | None, num_layers: int, num_qo_heads: int, device: torch.device) -> None:
        self._missable = 0.0 if mass is None else 1 - mass
        shape = (num_layers, num_qo_heads)
        self.left = torch.full(shape, self._missable, device=device)
        self._read = torch.zeros(shape, dtype=torch.int64, device=device)
        self._caught = torch.zeros(shape, dtype=torch.float64, device=device)
        self._pages, self._rows = np.zeros((2, *shape), dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self._read.nbytes + self._caught.nbytes

    def begin(self) -> None:
        """Start as at first: how a text is read does not depend on what was read before it."""
        self.left.fill_(self._missable)

    def reset(self) -> None:
        """Forget all counts, and start as at first."""
        self.begin()
        for table in (self._read, self._caught):
            table.zero_()
        self._pages[:], self._rows[:] = 0, 0

    def add(self, layer_idx: int, heads: slice, read: Tensor, pages: int, caught: Tensor, rows: int) -> None:
        """Count a chunk, and steer by it.

        Args:
            heads: of the layer's query heads.
            read: int64 [heads], pages that their tiles read; pages: those that lay before all tiles of one head.
            caught: float32 [heads], shares caught, summed over `rows` rows of each head.
        """
        self._read[layer_idx, heads] += read
        self._caught[layer_idx, heads] += caught
        self._pages[layer_idx, heads] += pages
        self._rows[layer_idx, heads] += rows
        if rows and self._missable:
            missed = (1 - caught / rows).clamp_(min=_NOTHING)
            change = (self._missable / missed).sqrt_().clamp_(1 / _STEP, _STEP)
            self.left[layer_idx, heads] *= change
            self.left[layer_idx, heads].clamp_(LEAST_LEFT, MOST_LEFT * self._missable)

    def counts(self) -> PrefillCounts:
        """Of all chunks so far. Waits for the device."""
        tables = (self._read, self._pages, self._caught, self._rows)
        return PrefillCounts(*(tuple(map(tuple, table.tolist())) for table in tables))
