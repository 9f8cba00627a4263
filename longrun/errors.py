"""Errors a person can cause and mend. Each message is one sentence with the value, the limit and the way out.

Command-line programs print the message and leave with status 2 (see `longrun.cli.run`); anything else that is
raised is a defect of ours and keeps its traceback.
"""


class LongrunError(Exception):
    """Base of every error that bad input, a bad file or a lack of memory can cause."""


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
