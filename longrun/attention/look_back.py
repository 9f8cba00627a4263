"""Attention of tokens over the cache as it stood before them, which appends nothing and tells what they looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.looked import LookedTokens
from longrun.cache.pages import PagedHeads
from longrun.cache.ring import Ring


class Looks(Protocol):
    """A backend that can attend without appending."""

    def look(
        self, pages: PagedHeads | None, ring: Ring | None, q: Tensor, k: Tensor, v: Tensor, start: int,
        looked: LookedTokens,
    ) -> Tensor:  # fmt: skip
        """Attention of one layer over what `pages` and `ring` held at `start` tokens, and over the chunk itself.

        Args:
            q, k, v: as in `Attention.run`; overwritten in the same way.
            looked: is told what the retrieval heads attend to before `start`.

        Returns:
            As `Attention.run`.
        """
        ...


class LookBack:
    """An `Attention` for one forward pass that leaves the cache as it is.

    Args:
        layers: `DualCache.layers_at` of the length at which the pass begins.
        check: called before every layer; what it raises ends the pass.
    """

    def __init__(
        self, backend: Looks, layers: Sequence[tuple[PagedHeads | None, Ring | None]], looked: LookedTokens,
        check: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self._backend, self._layers, self._looked, self._check = backend, layers, looked, check

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        if self._check is not None:
            self._check()
        return self._backend.look(*self._layers[layer_idx], q, k, v, step.start, self._looked)
