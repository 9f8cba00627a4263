"""Programmatic dependent launch (sm_90 and newer): a kernel begins while the one before it on the stream still ends.

A kernel launched so (`launch_pdl=True`, PDL true) may do before its `gdc_wait` only what does not depend on earlier
kernels: load weights, say. It must wait before it reads what they wrote and before it writes anything, in every
program, so that its own end means theirs. On older GPUs the same kernels run one after the other.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import lru_cache

import torch

OVERLAP_CAPABILITY = (9, 0)


@lru_cache(maxsize=8)
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY
