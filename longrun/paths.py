"""Where longrun keeps what it makes once: the demo model and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LONGRUN_CACHE`, else `longrun` in `$XDG_CACHE_HOME` or `~/.cache`; not created here."""
    own = os.environ.get("LONGRUN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longrun"
