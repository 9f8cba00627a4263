"""Continuing where an earlier request agrees: marks in the one session, and which of them a new prompt begins from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrun.session.marks import SessionMark
    from longrun.session.session import Session

GRID = 32_768
"""A mark stands at every so many tokens of a text."""

BEFORE_END = (32, 128, 512, 2048)
"""Marks stand so many tokens before a prompt's end: another question over the same text branches off near there."""

NEAR = 16
"""Fewer tokens than these are read again rather than marked."""


@dataclass
class _Point:
    """A mark, whether it is one of the grid's, and the number of the request that needed it last."""

    mark: SessionMark
    in_grid: bool
    used: int

    @property
    def position(self) -> int:
        return self.mark.num_tokens


class PrefixMarks:
    """The marks of a session that one request after the other continues.

    Args:
        session: an empty one; nobody else changes it or marks it.
        end_ids: tokens that end a message.
    """

    def __init__(self, session: Session, end_ids: Collection[int]) -> None:
        assert not session.num_tokens
        self._session, self._end_ids = session, end_ids
        self._empty = session.mark()
        self._points: list[_Point] = []  # by position
        self._room = session.cache.spec.marks
        self._request = 0

    @property
    def positions(self) -> list[int]:
        """Tokens before each mark, ascending."""
        return [point.position for point in self._points]

    def forget(self) -> None:
        """Back to the empty session, also after a step that broke off."""
        self._session.rewind(self._empty)
        for point in self._points:
            self._session.release(point.mark)
        self._points = []

    def reach(self, token_ids: Sequence[int]) -> int:
        """How many of its tokens `resume` would find in the session; changes nothing."""
        same = self._session.common_prefix(token_ids)
        if same == self._session.num_tokens:
            return same
        return max((position for position in self.positions if position <= same), default=0)

    def resume(self, token_ids: Sequence[int]) -> tuple[int, list[int]]:
        """Bring the session to the most of its tokens that `token_ids` begin with.

        Returns:
            How many of the prompt's tokens the session holds then, and where marks are to be taken while the others are
            read (`take`).
        """
        self._request += 1
        session, same = self._session, self._session.common_prefix(token_ids)
        branch = None
        if same < session.num_tokens:
            branch = same
            point = next((point for point in reversed(self._points) if point.position <= same), None)
            session.rewind(self._empty if point is None else point.mark)
            if point is not None:
                point.used = self._request
            self._points = [point for point in self._points if point.position <= session.num_tokens]
        start = session.num_tokens
        return start, self._places(token_ids, start, branch)

    def take(self) -> SessionMark:
        """The mark at the session's end, in place of one that is needed less where there is no more room."""
        position = self._session.num_tokens
        for point in self._points:
            if point.position == position:
                point.used = self._request
                return point.mark
        while len(self._points) >= self._room:
            point = self._least()
            self._points.remove(point)
            self._session.release(point.mark)
        self._points.append(_Point(self._session.mark(), position % GRID == 0, self._request))
        return self._points[-1].mark

    def _places(self, token_ids: Sequence[int], start: int, branch: int | None) -> list[int]:
        """Where to take marks in [start, len(token_ids)], ascending: of the grid, and the most useful others."""
        stop = len(token_ids)
        ends = [place for place in range(start + 1, stop) if token_ids[place - 1] in self._end_ids]
        near, far = ([stop - back for back in backs] for backs in (BEFORE_END[:2], BEFORE_END[2:]))
        wanted = [stop, branch, *near, *ends[-1:], *far, *ends[:1], *ends[-3:-1]]
        chosen: list[int] = []
        for place in wanted:
            fits = place is not None and start < place <= stop and len(chosen) < max(1, self._room // 2)
            if fits and all(abs(place - other) >= NEAR for other in (start, *chosen)):
                chosen.append(place)
        if stop not in chosen:  # a few tokens only: the end is marked in any case
            chosen.append(stop)
        return sorted({*chosen, *range(start // GRID * GRID + GRID, stop, GRID)})

    def _least(self) -> _Point:
        """The mark to give up: of a grid that takes more than half of the room, the one whose loss costs least reading;
        otherwise the one that was needed longest ago."""
        grid = [point for point in self._points if point.in_grid]
        others = [point for point in self._points if not point.in_grid]
        if others and len(grid) <= self._room // 2:
            return min(others, key=lambda point: (point.used, point.position))
        before = dict(zip(self.positions, [0, *self.positions], strict=False))
        return min(grid, key=lambda point: point.position - before[point.position])
