"""Errors a person can cause and fix. Each message is one sentence with the value, the limit and what to do.

Command-line programs print the message and leave with status 2 (see `longrun.cli.run`); anything else that is
raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection

MESSAGE_LIMIT = 500
"""Characters of a message; of a longer one the middle is left out, so that what is wrong and what to do remain."""

VALUE_LIMIT = 80
"""Characters of a value that a message quotes."""


class LongrunError(Exception):
    """Base of every error that bad input, a bad file or a lack of memory can cause: one printable line of at most
    `MESSAGE_LIMIT` characters, whatever a file or a person put into it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, MESSAGE_LIMIT))

    def told_by(self, options: Collection[str]) -> str:
        """The message as a command with these options prints it; its advice may name them."""
        return str(self)


class InputError(LongrunError):
    """A command-line argument, a prompt or a text file cannot be used as given."""


class ConfigError(LongrunError):
    """A model's config.json or a budget file holds an unknown key, a wrong type or an impossible value."""


class PlanError(LongrunError):
    """The memory budget cannot hold what was asked; the message states the shortfall and what would fit."""


class CheckpointError(LongrunError):
    """A checkpoint folder is missing, incomplete, damaged or of an unsupported architecture."""


class HeadMapError(LongrunError):
    """A head map has the wrong shape, holds NaN, or cannot be split as asked."""


class SessionError(LongrunError):
    """A saved session is damaged, of another version, or belongs to another model or head split."""


class ContextFullError(LongrunError):
    """The session's capacity is used up; the session itself is intact and can be saved."""


def shortened(text: object, limit: int = VALUE_LIMIT) -> str:
    """`text` on one printable line of at most `limit` characters, the middle left out where it is longer.

    For names and paths, which stand in a message as they are; line breaks and control characters are escaped.
    """
    text = str(text)
    if len(text) > 2 * limit:  # the middle would be empty
        text = text[:limit] + "\0" + text[-limit:]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(line) <= limit:
        return line
    tail = (limit - 5) // 3
    return f"{line[: limit - 5 - tail]} ... {line[-tail:]}"


def short_path(path: object) -> str:
    """A path, or another name of a file, as it stands in a message: at most twice as long as a value."""
    return shortened(path, 2 * VALUE_LIMIT)


def quoted(value: object, limit: int = VALUE_LIMIT) -> str:
    """A value of any type as it stands in a message: its repr, cut to at most `limit` characters."""
    return shortened(_SHORT.repr(value), limit)


class _ShortRepr(reprlib.Repr):
    """Bounded in depth, items and characters before anything long is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = VALUE_LIMIT
        self.maxdict = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out an int of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 128 else f"a number of about {int(x.bit_length() * 0.30103) + 1:,} digits"


_SHORT = _ShortRepr()


def logits_not_finite() -> CheckpointError:
    """What to raise where a model's logits hold NaN or an infinite number."""
    return CheckpointError(
        "the model's logits are not finite numbers: its weights (or its adapter's) hold NaN or infinite values, or "
        "overflow in this weight format; check the files or load them with another weight format"
    )
