"""Pinned memory that outlives the session it was made for: pinning 100 GiB takes half a minute, once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from longrun.cache.pinned import PinnedBuffer, pinned_bytes


class PinnedMemory:
    """Host memory for page pools, kept from one session to the next.

    Args:
        on_pin: called with (bytes pinned, bytes in all) while memory is pinned.
        pin: makes the memory; `pinned_bytes`, or a stand-in for tests.
    """

    def __init__(
        self, on_pin: Callable[[int, int], None] | None = None, pin: Callable[..., PinnedBuffer] = pinned_bytes
    ) -> None:
        self._on_pin, self._pin = on_pin, pin
        self._kept: PinnedBuffer | None = None
        self._owner: Callable[[], Any] = lambda: None

    @property
    def kept_bytes(self) -> int:
        """Bytes that the next owner may have: pinned for one that is gone."""
        return 0 if self._kept is None or self._owner() is not None else len(self._kept.tensor)

    def take(self, num_bytes: int, owner: object) -> Tensor:
        """uint8 [num_bytes], pinned, of any content, for as long as `owner` lives.

        What an owner that is gone has left is used again where it is large enough, and given back where it is not.

        Raises:
            PlanError: so much cannot be pinned.
        """
        if self._kept is None or self._owner() is not None or len(self._kept.tensor) < num_bytes:
            if self._owner() is None:
                self._kept = None  # before asking for more
            self._kept = self._pin(num_bytes, self._on_pin)
        self._owner = weakref.ref(owner)
        return self._kept.tensor[:num_bytes]
