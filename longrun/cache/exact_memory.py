"""One memory for all tails and rings of a sequence, so that a mark is a single copy of it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from longrun.quant.page_codec import exact_dtype
from longrun.specs.cache_spec import CacheSpec


class SavedState:
    """A copy of tails and rings at one point; its memory is used again when it is released or gone."""

    def __init__(self, copy: Tensor) -> None:
        self._copy: Tensor | None = copy

    @property
    def copy(self) -> Tensor:
        assert self._copy is not None, "this mark was released"
        return self._copy

    @property
    def is_released(self) -> bool:
        return self._copy is None

    def release(self) -> None:
        self._copy = None


class ExactParts:
    """Tails and rings one after the other in a memory of theirs, or in a copy of it.

    Args:
        memory: of the exact dtype.
    """

    def __init__(self, memory: Tensor, head_dim: int) -> None:
        self._memory, self._head_dim, self._taken = memory, head_dim, 0

    def take(self, num_heads: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The next keys and values: [num_heads, num_tokens, head_dim] each."""
        shape = (2, num_heads, num_tokens, self._head_dim)
        begin, self._taken = self._taken, self._taken + 2 * num_heads * num_tokens * self._head_dim
        k, v = self._memory[begin : self._taken].view(shape)
        return k, v


class ExactMemory:
    """Tails and rings of all layers in one tensor, and `spec.marks` more of that size for copies.

    Both lie on the compute device: a mark or a rewind costs a read and a write of `spec.exact_bytes` there, where a
    copy to host memory takes a hundred times as long (docs/benchmarks.md, "Mark and rewind").
    """

    def __init__(self, spec: CacheSpec, device: torch.device) -> None:
        self._head_dim = spec.page_format.head_dim
        dtype = exact_dtype(spec.page_format)
        elements = spec.exact_bytes // dtype.itemsize
        self._memory = torch.zeros(elements, dtype=dtype, device=device)
        # touched at once, as everything planned is, so that nothing fails later
        self._copies = [torch.zeros_like(self._memory) for _ in range(spec.marks)]
        self._owners: list[weakref.ref[SavedState] | None] = [None] * spec.marks

    @property
    def copies_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies)

    def parts(self) -> ExactParts:
        """The memory itself, zeros at first, to be divided."""
        return ExactParts(self._memory, self._head_dim)

    def parts_at(self, state: SavedState) -> ExactParts:
        """What `save` copied, to be divided as the memory itself; on its device."""
        return ExactParts(state.copy.to(self._memory.device), self._head_dim)

    def save(self) -> SavedState:
        """A copy of everything: on the device, or in host memory where all planned copies are in use."""
        for number, copy in enumerate(self._copies):
            owner = None if (ref := self._owners[number]) is None else ref()
            if owner is None or owner.is_released:
                state = SavedState(copy.copy_(self._memory))
                self._owners[number] = weakref.ref(state)
                return state
        return SavedState(self._memory.to("cpu", copy=True))

    def load(self, state: SavedState) -> None:
        """Put back what `save` copied."""
        self._memory.copy_(state.copy)
