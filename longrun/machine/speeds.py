"""How fast a machine computes and moves bytes: measured here once and kept, or taken from a GPU's data sheet."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from longrun.arguments import number
from longrun.errors import CheckpointError, LongrunError
from longrun.files.user_files import read_object
from longrun.files.whole_file import write_whole
from longrun.paths import cache_dir

_VERSION = 1
_GPUS = Path("/proc/driver/nvidia/gpus")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Speeds:
    """What a machine does at best.

    Attributes:
        device: the GPU's or the processor's name.
        matmul_tflops: of a large matrix product, bf16 on a GPU, float32 on a CPU; in 10**12 operations a second.
        attention_tflops: of causal attention over a long chunk.
        memory_gb_s: of the device's memory, in 10**9 bytes a second: a GPU's copy (read and written), a CPU's reading.
        link_gb_s: from host memory to the device; on a CPU a copy within main memory.
        measured: on this machine; otherwise an estimate.
    """

    device: str
    matmul_tflops: float
    attention_tflops: float
    memory_gb_s: float
    link_gb_s: float
    measured: bool = False

    @property
    def origin(self) -> str:
        """Where the figures come from, in words."""
        return "by what this machine measured" if self.measured else f"an estimate for {self.device}"


# What an H100's measured figures are of its data sheet's 989 TFLOP/s (bf16, dense), 3,350 GB/s and 64 GB/s; the other
# GPUs are taken to do as well. See docs/results/h100-decode-k5v3.json, h100-prefill.json and h100-offload-1m.json.
_MATMUL, _ATTENTION, _MEMORY, _LINK = 0.70, 0.61, 0.90, 0.86


def _sheet(device: str, tflops: float, memory_gb_s: float, link_gb_s: float) -> Speeds:
    return Speeds(device, _MATMUL * tflops, _ATTENTION * tflops, _MEMORY * memory_gb_s, _LINK * link_gb_s)


DATA_SHEETS = {
    "H100": _sheet("an H100 80 GB SXM", 989, 3350, 64),
    "A100": _sheet("an A100 80 GB SXM", 312, 2039, 32),
    "4090": _sheet("an RTX 4090", 165, 1008, 32),
}
"""By what stands in the GPU's name and in that of a shipped budget."""

# A CPU's attention beside its matrix product, from docs/results/cpu-peer-smollm2-135m.json.
CPU_ATTENTION = 0.6


def known_speeds(device_type: str, wanted: str = "") -> Speeds | None:
    """The speeds to plan with, without measuring: those kept for this machine, else an estimate.

    Args:
        device_type: "cpu" or "cuda".
        wanted: what the budget is called; where it names a GPU, this machine's figures count only if it has one.

    Returns:
        None where the GPU is unknown.
    """
    if device_type == "cpu":
        return kept_speeds("cpu") or _estimated_cpu()
    kind = next((kind for kind in DATA_SHEETS if kind.lower() in wanted.lower()), None)
    kept = kept_speeds("cuda")
    if kept is not None and (kind is None or kind.lower() in kept.device.lower()):
        return kept
    own = gpu_name() or ""
    return next((DATA_SHEETS[each] for each in DATA_SHEETS if each == kind or (kind is None and each in own)), None)


def kept_speeds(device_type: str) -> Speeds | None:
    """What was measured on this machine before; None where nothing was, or where it cannot be read."""
    try:
        data = read_object(_file(device_type), CheckpointError, "")
        if data.pop("version", None) != _VERSION:
            return None
        device = str(data.pop("device"))
        figures = {key: number(value, key, 0, above=True) for key, value in data.items()}
        return Speeds(device, measured=True, **figures)
    except (LongrunError, TypeError, KeyError):
        return None


def keep_speeds(device_type: str, speeds: Speeds) -> None:
    """Keep what was measured; where the cache folder cannot be written, it is measured again next time."""
    data = asdict(speeds)
    del data["measured"]
    try:
        file = _file(device_type)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"version": _VERSION, **data}, indent=2).encode())
    except (OSError, LongrunError):
        return


def gpu_name(folder: Path = _GPUS) -> str | None:
    """The first NVIDIA GPU as its driver calls it, told without torch; None where there is none to be seen."""
    for file in sorted(folder.glob("*/information")):
        found = re.search(r"^Model:\s*(.+?)\s*$", _text(file), re.MULTILINE)
        if found:
            return found[1]
    return None


def num_cores(cpuinfo: Path = _CPUINFO) -> int:
    """Cores that torch uses here: those that this process may use, hyperthreads counted once, or $OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ids = re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", _text(cpuinfo), re.MULTILINE | re.DOTALL)
    return min(allowed, len(set(ids)) or allowed)


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", _text(cpuinfo), re.MULTILINE)
    return found[1] if found else "this processor"


def _estimated_cpu(cpuinfo: Path = _CPUINFO) -> Speeds:
    """From cores, clock and instructions: a product at 3 quarters of what the arithmetic units do, 12 GB/s a core."""
    text, cores = _text(cpuinfo), num_cores(cpuinfo)
    clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)
    per_cycle = 64 if "avx512f" in text else 32 if "avx2" in text else 8
    product = 0.75 * cores * per_cycle * (float(clock[1]) if clock else 2500) / 1e6
    memory = min(12.0 * cores, 100.0)
    return Speeds(f"{cpu_name(cpuinfo)}, {cores} cores", product, CPU_ATTENTION * product, memory, memory / 3)


def _file(device_type: str) -> Path:
    name = (gpu_name() or "gpu") if device_type == "cuda" else f"{cpu_name()} {num_cores()}"
    return cache_dir() / "speeds" / f"{device_type}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:80]}.json"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
