"""A pool of page payloads in one memory, with its free list."""

from __future__ import annotations

import torch
from torch import Tensor


class PagePool:
    """`num_slots` payloads of `payload_bytes` each, allocated and touched at once so that nothing fails later.

    Slots are numbered from `first_slot` on, so that one page table can name the slots of several pools.

    Args:
        storage: memory to use instead, uint8 [num_slots, payload_bytes], contiguous, on `device`, touched already: on
            a GPU machine the host pool's pinned memory (`longrun.cache.pinned`). The pool keeps it alive.

    Attributes:
        storage: uint8 [num_slots, payload_bytes].
    """

    def __init__(
        self, num_slots: int, payload_bytes: int, device: torch.device, first_slot: int = 0,
        storage: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.first_slot = first_slot
        if storage is None:
            # torch.zeros would take untouched pages from the system; writing commits them now, not in mid-prefill
            storage = torch.empty(num_slots, payload_bytes, dtype=torch.uint8, device=device).fill_(0)
        assert storage.shape == (num_slots, payload_bytes) and storage.dtype == torch.uint8
        assert storage.is_contiguous() and storage.device.type == device.type
        self.storage = storage
        self._free = torch.arange(num_slots - 1, -1, -1, dtype=torch.int32)  # a stack: the top is the end
        self._num_free = num_slots

    @property
    def num_slots(self) -> int:
        return self.storage.shape[0]

    @property
    def num_used(self) -> int:
        return self.num_slots - self._num_free

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def free_list_bytes(self) -> int:
        return self._free.nbytes

    def allocate(self, count: int) -> Tensor:
        """int32 [count] slots, no longer free. The plan sizes the pool, so running out is our own defect."""
        assert count <= self._num_free, f"{count} pages asked of a pool with {self._num_free} free"
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].flip(0) + self.first_slot

    def release(self, slots: Tensor) -> None:
        """Give back slots (int32, any shape) that `allocate` returned."""
        slots = slots.reshape(-1).to("cpu", torch.int32) - self.first_slot
        assert self._num_free + len(slots) <= self.num_slots, "more slots released than were taken"
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def write(self, slots: Tensor, payload: Tensor) -> None:
        """Store payloads (uint8 [..., payload_bytes]) at `slots` (int32 [...])."""
        where = slots.reshape(-1).long().to(self.storage.device) - self.first_slot
        self.storage[where] = payload.reshape(-1, self.storage.shape[1]).to(self.storage.device)

    def read(self, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """Payloads at `slots` (int32 [...]) as uint8 [..., payload_bytes], into `out` [n, payload_bytes] if given."""
        where = slots.reshape(-1).long().to(self.storage.device) - self.first_slot
        if out is None or out.device == self.storage.device:
            found = torch.index_select(self.storage, 0, where, out=out)
        else:
            found = out.copy_(torch.index_select(self.storage, 0, where))
        return found.view(*slots.shape, self.storage.shape[1])

    def check(self, live: Tensor) -> None:
        """Conservation: `live` (the slots that page tables name in this pool) and the free ones are all, once each."""
        free = self._free[: self._num_free] + self.first_slot
        everything = torch.cat((free, live.reshape(-1).to("cpu", torch.int32))).sort().values
        expected = torch.arange(self.first_slot, self.first_slot + self.num_slots, dtype=torch.int32)
        assert len(everything) == self.num_slots, f"{len(everything)} slots accounted for, {self.num_slots} exist"
        assert torch.equal(everything, expected), "a slot is both free and used, or used twice"
