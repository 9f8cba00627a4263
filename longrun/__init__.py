"""longrun: one Llama-class model over millions of tokens on one GPU, with every byte planned first.

`longrun.load(model_dir, ...)` returns a `longrun.runtime.runtime.Runtime`. Nothing heavy is imported until a name is
used, so that `python -m longrun.plan` answers without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longrun.errors import LongrunError

if TYPE_CHECKING:
    from longrun.patterns.head_map import HeadMap
    from longrun.plan.budget import Budget
    from longrun.runtime.load import load
    from longrun.runtime.runtime import Runtime
    from longrun.session.session import Session

__version__ = "0.1.0"
__all__ = ["Budget", "HeadMap", "LongrunError", "Runtime", "Session", "load"]

_LAZY = {
    "Budget": "longrun.plan.budget",
    "HeadMap": "longrun.patterns.head_map",
    "Runtime": "longrun.runtime.runtime",
    "Session": "longrun.session.session",
    "load": "longrun.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'longrun' has no attribute {name!r}")
