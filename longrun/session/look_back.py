"""Which passages an answer attended to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from longrun.arguments import integer
from longrun.errors import InputError
from longrun.session.marks import SessionMark, SessionMarks
from longrun.session.passages import Passage, passages
from longrun.session.sequence import TokenSequence
from longrun.specs.look_back_spec import look_back_room

if TYPE_CHECKING:
    from longrun.plan.plan import Plan


def looked_at(
    sequence: TokenSequence, marks: SessionMarks, plan: Plan, mark: SessionMark, stop: int | None, before: int | None,
    most: int, check: Callable[[], object] | None,
) -> list[Passage]:  # fmt: skip
    """See `Session.looked_at`."""
    marks.check(mark)
    start, num_tokens, engine, spec = mark.num_tokens, sequence.num_tokens, sequence.engine, sequence.cache.spec
    if start == num_tokens:
        raise InputError(f"no token follows the mark at token {start:,}: generate an answer after it first")
    stop = num_tokens if stop is None else integer(stop, "stop", start + 1, num_tokens)
    before = start if before is None else integer(before, "before", 0, start)
    most = integer(most, "most", 1)
    page_size = spec.page_format.page_size
    if before <= page_size:
        return []
    room, tile_bytes = look_back_room(
        engine.decoder.config, plan.attention.compute_itemsize, plan.chunk_size, plan.device_type, start
    )
    stop = min(max(stop - 1, start + 1), start + room)  # nothing was written after the last token had looked
    ids = torch.tensor(sequence.ids[start:stop], dtype=torch.int64)
    return passages(engine.look_back(mark.cache, ids, tile_bytes, check)[:before], page_size, page_size, most)
