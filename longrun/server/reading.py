"""Reading a prompt in steps that are short enough to stop between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrun.plan.plan import Plan
    from longrun.runtime.runtime import Runtime

STEP_SECONDS = 2.5
"""How long a step of reading should take at most, so that a client who leaves is noticed in time."""

_FIRST_STEP = 256  # tokens, before anything is known about the machine
_GROWTH = 4  # the most by which a step outgrows the one before it


def reads_whole(runtime: Runtime) -> bool:
    """Whether nothing can be read in parts: the angles of this type change with the length of what is read at once."""
    rope = runtime.parts.rotary_host.params
    return rope.rope_type == "dynamic" and runtime.plan.capacity > rope.max_position_embeddings


def scored_at_once(plan: Plan, vocab_size: int) -> int:
    """How many of a prompt's tokens are scored in one step: as many as have room, with three copies of their logits in
    float32, in the memory that is planned for the activations of a chunk; at least one."""
    activations = next(item.bytes for item in plan.items if item.name == "activations")
    return max(1, min(plan.chunk_size, activations // (12 * vocab_size + activations // plan.chunk_size)))


class StepSizes:
    """How many tokens the next step may read, by how long the last one took.

    Far into a text every token costs more, and a step must not take longer for it: steps shrink.

    Args:
        page_size: steps are whole pages where they can be.
        most: tokens of the largest step, the plan's chunk.
    """

    def __init__(self, page_size: int, most: int) -> None:
        self._page_size, self._most = page_size, most
        self._next = min(_FIRST_STEP, most)

    @property
    def next(self) -> int:
        return self._next

    def took(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if 2 * tokens < self._next and seconds < STEP_SECONDS:
            return  # a rest says little about a whole step
        wanted = int(tokens * min(_GROWTH, STEP_SECONDS / max(seconds, 1e-6)))
        whole = max(wanted // self._page_size, 1) * self._page_size
        self._next = min(whole, self._most)


def read_steps(
    start: int, stop: int, marks: Collection[int], sizes: StepSizes, read: Callable[[int, int], None]
) -> None:
    """Read tokens [start, stop) in steps that end at `marks`, too.

    Args:
        read: called with the first token and the one past the last of each step; what it raises goes through.
    """
    ends = sorted({mark for mark in marks if start < mark < stop} | {stop})
    for end in ends:
        while start < end:
            to = min(start + sizes.next, end)
            began = time.perf_counter()
            read(start, to)
            sizes.took(to - start, time.perf_counter() - began)
            start = to
