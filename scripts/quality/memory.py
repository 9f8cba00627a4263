"""Memory that measurements leave behind."""

from __future__ import annotations

import gc


def release_memory() -> None:
    """Give back what nothing refers to any more: sessions may stand in reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
