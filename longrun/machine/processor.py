"""What this processor's bf16 products cost in memory, found without torch: from its flags and oneDNN's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_AVX512_CORE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BF16 = {"avx512_bf16", "amx_bf16"}

# Names of oneDNN's variable that leave it without a bf16 product of its own: torch then multiplies itself.
_NO_BF16_AT_ALL = {"sse41", "avx", "avx2", "avx2_vnni"}
_WITHOUT_BF16_INSTRUCTIONS = {"avx512_core", "avx512_core_vnni"}


def bf16_product_copy_bytes(cpuinfo: Path = _CPUINFO, environment: Mapping[str, str] = os.environ) -> int:
    """Bytes an element that a product of bf16 matrices holds besides its bf16 result while it runs, on this CPU.

    oneDNN adds up in float32. With bf16 instructions (AVX-512 BF16, AMX) it does so in small buffers: 0. With AVX-512
    alone the whole result stands in float32 first: 4. Below AVX-512 torch multiplies without oneDNN: 0. Measured
    with torch 2.13 and `ONEDNN_MAX_CPU_ISA`, which lowers what oneDNN takes the processor for and counts here as well.
    Where the flags cannot be read, or are of another architecture, 4: the plan then holds more than is used.
    """
    flags = _flags(cpuinfo)
    limit = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").lower()
    if not flags:
        return 4
    if limit in _NO_BF16_AT_ALL:
        return 0
    if limit == "avx2_vnni_2" or not flags >= _AVX512_CORE:
        return 4 if "avx_ne_convert" in flags else 0
    return 4 if limit in _WITHOUT_BF16_INSTRUCTIONS or not flags & _BF16 else 0


def _flags(cpuinfo: Path) -> set[str]:
    """The x86 feature flags of the first processor; empty elsewhere."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
