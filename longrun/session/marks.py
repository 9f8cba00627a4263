"""Points of a session to come back to."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from longrun.cache.dual import CacheMark
from longrun.errors import InputError, SessionError
from longrun.session.sequence import TokenSequence


@dataclass(frozen=True, eq=False)
class SessionMark:
    """A point of a session to come back to with `Session.rewind`; of no use to another session."""

    cache: CacheMark
    num_tokens: int
    sparse_tokens: int
    logits: Tensor | None
    generator_state: Tensor


class SessionMarks:
    """The marks of one sequence whose tokens still stand."""

    def __init__(self, sequence: TokenSequence) -> None:
        self._sequence = sequence
        self._marks: weakref.WeakSet[SessionMark] = weakref.WeakSet()

    def take(self) -> SessionMark:
        """See `Session.mark`."""
        sequence = self._sequence
        sequence.take_waiting()
        sequence.engine.check_whole()
        if sequence.num_tokens and sequence.cache.holds_back_pages:
            raise SessionError(
                f"{sequence.cache.spec.marks} marks are alive, and the plan has no room for the pages of another: give "
                f"one back with release()"
            )
        logits = None if sequence.logits is None else sequence.logits.clone()
        mark = SessionMark(
            sequence.cache.mark(), sequence.num_tokens, sequence.sparse_tokens, logits, sequence.generator.get_state()
        )
        self._marks.add(mark)
        return mark

    def check(self, mark: SessionMark) -> None:
        """Raises InputError unless `mark` is one of these."""
        if not isinstance(mark, SessionMark):
            raise InputError(f"rewind needs a mark that this session's mark() gave, not {type(mark).__name__}")
        if mark not in self._marks:
            raise InputError(
                f"this mark at token {mark.num_tokens:,} is of another session, or its tokens were dropped by a rewind "
                f"to an earlier mark: take a new one with mark()"
            )

    def release(self, mark: SessionMark) -> None:
        """See `Session.release`."""
        if not isinstance(mark, SessionMark):
            raise InputError(f"release needs a mark that mark() gave, not {type(mark).__name__}")
        self._marks.discard(mark)
        self._sequence.cache.release(mark.cache)

    def rewind(self, mark: SessionMark) -> None:
        """Back to `mark`, one of these; later ones end. The caller holds signals back."""
        sequence = self._sequence
        sequence.cache.rewind(mark.cache)
        sequence.engine.rewound()
        del sequence.ids[mark.num_tokens :]
        sequence.sparse_tokens, sequence.unread_stop = mark.sparse_tokens, None
        sequence.logits = None if mark.logits is None else mark.logits.clone()
        sequence.generator.set_state(mark.generator_state)
        for later in [other for other in self._marks if other.num_tokens > mark.num_tokens]:
            self._marks.discard(later)
