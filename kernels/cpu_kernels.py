"""All compiled kernels of the CPU, built together or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longrun.kernels.cpu_int4 import CpuInt4
from longrun.kernels.cpu_linear import CpuLinear
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.cpu_rope_store import CpuRopeStore
from longrun.kernels.cpu_select import CpuSelect


@dataclass(frozen=True)
class CpuKernels:
    """Each documents itself."""

    linear: CpuLinear
    rope_store: CpuRopeStore
    pages: CpuPageKernels
    int4: CpuInt4
    select: CpuSelect


def load_cpu_kernels(cache_dir: Path | None) -> tuple[CpuKernels, list[str]]:
    """The kernels, and sentences on what was wrong with kept libraries or their folder.

    Raises:
        KernelUnavailable: no compiler, or a build failed.
    """
    kernels = CpuKernels(
        CpuLinear(cache_dir), CpuRopeStore(cache_dir), CpuPageKernels(cache_dir), CpuInt4(cache_dir),
        CpuSelect(cache_dir),
    )  # fmt: skip
    parts = (kernels.linear, kernels.rope_store, kernels.pages, kernels.int4, kernels.select)
    notices = [notice for part in parts for notice in part.notices]
    return kernels, list(dict.fromkeys(notices))
