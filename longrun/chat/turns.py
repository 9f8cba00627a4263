"""Parts of a conversation: an answer that was cut, a point to come back to, what is read next; and its saved shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrun.session.marks import SessionMark

_OLD_ENTRY = {"name": str, "sha256": str, "stop": int}
_ENTRY = {**_OLD_ENTRY, "start": int, "line": int}


@dataclass(frozen=True)
class AnswerCut:
    """An answer that was stopped before its end: the tokens of the session from `start` on.

    Attributes:
        seed: with which its random draws began; None where nothing was drawn.
    """

    start: int
    seed: int | None


@dataclass(frozen=True, eq=False)
class ConversationMark:
    """A point of a conversation to come back to with `Conversation.rewind`."""

    session: SessionMark
    state: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What is to be read next.

    Attributes:
        token_ids: to be prefilled; may be empty where all was read before.
        asks: an answer is due after them.
        already_read: names of documents that the session holds and that are not read again.
        changed: a sentence about each file that has changed since the session read it.
        resumed_at, resumed_of: tokens of an interrupted message that stand in the session, and of the whole message;
            0 and 0 where nothing was interrupted.
    """

    token_ids: list[int]
    asks: bool
    already_read: tuple[str, ...] = ()
    resumed_at: int = 0
    resumed_of: int = 0
    changed: tuple[str, ...] = ()


def is_conversation(saved: object) -> bool:
    """Whether what a session keeps has the shape that `Conversation` gives it."""
    if not isinstance(saved, dict):
        return False
    documents, turn, cut = saved.get("documents"), saved.get("turn", 0), saved.get("cut")
    return (
        isinstance(saved.get("system"), str | None)
        and isinstance(saved.get("options", {}), dict)
        and _has_types(saved.get("first"), [str, str])
        and isinstance(documents, list)
        and all(_has_types(document, _ENTRY) or _has_types(document, _OLD_ENTRY) for document in documents)
        and (turn is None or _has_types(turn, {"start": int, "stop": int, "asks": bool}))
        and (cut is None or _has_types(cut, [int, int]) or _has_types(cut, [int, type(None)]))
    )


def _has_types(value: object, kinds: list[type] | dict[str, type]) -> bool:
    """Whether a list, or a dictionary, holds exactly values of these types, numbers from 0 on."""
    if type(value) is not type(kinds) or len(value) != len(kinds):
        return False
    pairs = zip(value, kinds, strict=True) if isinstance(kinds, list) else ((value.get(k), kinds[k]) for k in kinds)
    return all(type(found) is kind and (kind is not int or found >= 0) for found, kind in pairs)
