"""Paths as people write them, and where longrun keeps what it makes once: the demo model and compiled kernels."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from longrun.errors import InputError, LongrunError, quoted, short_path


def user_path(value: Any, what: str = "path", error: type[LongrunError] = InputError) -> Path:
    """A path that somebody wrote, with `~` and `~user` replaced; it need not exist.

    Raises:
        error: no str or path at all, empty, a NUL byte, a name longer than the file system takes, a folder on the way
            that may not be entered, a user or home folder that is not known.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise error(f"{what} {quoted(value)} is not a path: give a str or a pathlib.Path")
    text = os.fspath(value)
    if not text:
        raise error(f"{what} is empty: give a path")
    told = f"{what} {short_path(text)}"
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError:
        raise error(
            f"{told} names a home folder that is not known (no such user, or $HOME is not set): write the path out"
        ) from None
    except OSError as fault:
        raise error(f"{told} cannot be used ({fault.strerror or fault}): name another path") from None
    except ValueError:
        raise error(f"{told} holds a character that no path may hold: name another path") from None
    return path


def path_option(text: str) -> Path:
    """The `type` of a command-line option that takes a path."""
    try:
        return user_path(text)
    except LongrunError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_dir() -> Path:
    """`$LONGRUN_CACHE`, else `longrun` in `$XDG_CACHE_HOME` or `~/.cache`; not created here.

    Raises:
        InputError: there is no home folder, or what a variable names is no path.
    """
    advice = "set LONGRUN_CACHE to a folder that can be written"
    try:
        own = os.environ.get("LONGRUN_CACHE")
        if own:
            return user_path(own, "LONGRUN_CACHE")
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache folder") / "longrun"
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
