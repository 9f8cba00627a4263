"""What the benchmark commands share: options, devices, loading, memory against the plan, and how results leave."""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import longrun
from longrun.arguments import SEED, SHARE
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError, PlanError
from longrun.hub.find import add_model_option
from longrun.hub.names import model_name
from longrun.lab.planted import NOTE, is_planted
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.hot_pool import HOT_POOL_HELP
from longrun.plan.pages_read import selection_facts
from longrun.plan.plan import Plan
from longrun.plan.prefill import add_prefill_options, prefill_facts
from longrun.plan.selection import SELECT_HELP
from longrun.plan.split import KV_BYTES_HELP
from longrun.quant.kv_format import KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.runtime.runtime import Runtime
from longrun.specs.prefill_spec import parse_dense_tokens
from longrun.units import TOKENS, format_bytes, format_tokens, parse_tokens

DEFAULT_BUDGETS = {"cpu": "cpu", "cuda": "h100-80g"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run a model."""
    add_model_option(parser, default=None)
    parser.add_argument(
        "--head-map", type=path_option, metavar="DIR", help="head map folder (default: every head is kept)"
    )
    parser.add_argument(
        "--retrieval-ratio", type=SHARE, metavar="R",
        help="share of the KV heads to keep; without --head-map an arbitrary choice, which is good for timing only",
    )  # fmt: skip
    parser.add_argument("--kv-bytes", metavar="SIZE", help=KV_BYTES_HELP)
    parser.add_argument("--select", metavar="N|P%|off", help=SELECT_HELP)
    parser.add_argument("--hot-pool", metavar="SIZE|off", help=HOT_POOL_HELP)
    add_prefill_options(parser)
    parser.add_argument("--weight-format", choices=WEIGHT_FORMATS, help="default: the budget's")
    parser.add_argument("--kv", choices=KV_FORMATS, help="page format (default: the budget's)")
    parser.add_argument("--chunk-size", type=TOKENS, metavar="N", help="tokens of a prefill step")
    parser.add_argument("--budget", metavar="NAME_OR_FILE", help="default: h100-80g on cuda, cpu on cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seed", type=SEED, default=0)
    add_json_option(parser)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the JSON object here as well")


def parse_lengths(text: str | None, option: str = "--lengths") -> list[int]:
    """`128K,1M` as token counts; nothing where the option is missing or empty."""
    return [parse_tokens(part.strip(), option) for part in (text or "").split(",") if part.strip()]


def check_device(name: str) -> torch.device:
    """The device. Raises InputError where torch finds no GPU and one was asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("this benchmark was asked to run on cuda and torch finds no GPU here: use --device cpu")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_runtime(
    args: argparse.Namespace, capacity: int, hooks: dict[str, Any] | None = None,
    yarn: float | None = None, **memory: int | None,
) -> Runtime:  # fmt: skip
    """The model as the options ask, planned for `capacity` tokens.

    Args:
        hooks: `longrun.load`'s `on_plan`, `device_share` and the like; yarn: its `yarn`.
        memory: device_bytes and host_bytes in place of the budget's, where they are not None.
    """
    head_map: HeadMap | Path | str = args.head_map or "full"
    ratio = args.retrieval_ratio
    if args.head_map is None and ratio is not None:
        config = ModelConfig.from_dir(args.model)
        head_map = HeadMap.uniform(config.num_layers, config.num_kv_heads, ratio)
    budget = Budget.load(args.budget or DEFAULT_BUDGETS[args.device]).override(**memory)
    dense = args.prefill_dense
    return longrun.load(
        args.model, budget, head_map, args.kv, args.weight_format, args.device, ctx=capacity, retrieval_ratio=ratio,
        kv_bytes=args.kv_bytes, select=args.select, select_from=None if args.select is None else 0,
        hot_pool=args.hot_pool, prefill=args.prefill, prefill_share=args.prefill_share, prefill_mass=args.prefill_mass,
        prefill_dense=None if dense is None else parse_dense_tokens(dense, "--prefill-dense"),
        chunk_size=args.chunk_size, yarn=yarn, **(hooks or {}),
    )  # fmt: skip


def describe(runtime: Runtime, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run, as results record them."""
    plan, split = runtime.plan, runtime.split

    def without_folders(text: str) -> str:
        for path in (args.head_map, args.model):
            text = text if path is None else text.replace(str(path), path.name)
        return text

    note = without_folders(plan.split_note)
    if args.head_map is None and args.retrieval_ratio is not None:
        note = "arbitrary heads, for timing only"
    return {
        "model": model_name(runtime.model_dir),
        "shape": plan.model,
        "note": NOTE if is_planted(runtime.model_dir) else None,
        "weight_format": plan.weight_format,
        "kv_format": plan.kv_format,
        "page_size": plan.page_size,
        "chunk_size": plan.chunk_size,
        "retrieval_heads": split.total_retrieval,
        "reaches": [list(row) for row in split.reaches] or None,
        "kv_heads": split.num_layers * split.num_kv_heads,
        "sink_size": split.sink_size,
        "recent_size": split.recent_size,
        "split_hash": split.hash,
        "split_note": note,
        "selection": selection_facts(plan),
        "prefill": prefill_facts(plan.attention),
        "hot_pages_per_head": plan.cache.hot_slots,
        "budget": plan.budget_source,
        "device": plan.device_type,
        "notices": [without_folders(text) for text in runtime.notices],
    }


class MemoryWatch:
    """Memory of this process against what the plan says; make it before anything touches the GPU.

    On a GPU the driver's count is the truth (context, kernels and all that torch does not know); what others had taken
    before is subtracted, as nvidia-smi reports it before this process has a context. On a CPU it is the process's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = nvidia_smi_used() if device.type == "cuda" else None

    def start(self) -> None:
        """Forget earlier peaks; call before a session is made."""
        release(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def measure(self, plan: Plan) -> dict[str, Any]:
        """Bytes used against the plan; `ratio_to_plan` is used / planned on the device."""
        found: dict[str, Any] = {"plan_device_bytes": plan.device_bytes, "plan_host_bytes": plan.host_bytes}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["torch_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            found["used_before_bytes"] = self.before
            found["used_bytes"] = total - free - (self.before or 0)
            return {**found, "ratio_to_plan": found["used_bytes"] / plan.device_bytes}
        found["used_bytes"] = peak_resident()
        if found["used_bytes"] is not None:
            found["ratio_to_plan"] = found["used_bytes"] / plan.total_bytes
        return found


def nvidia_smi_used() -> int | None:
    """Bytes taken on the first visible GPU, all processes; None where nvidia-smi does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def peak_resident() -> int | None:
    """The most bytes of main memory that this process has held; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def or_out_of_memory(row: dict[str, Any], work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """`row` with what `work` adds to it, or with `error` where no plan fits into memory, or torch runs out of it, on
    the GPU or on the CPU."""
    problem = None
    try:
        row = {**row, **work()}
    except (RuntimeError, MemoryError, PlanError) as error:
        text = str(error) or type(error).__name__
        known = isinstance(error, torch.OutOfMemoryError | MemoryError | PlanError)
        if not known and "can't allocate memory" not in text:
            raise
        problem = f"out of memory: {text.splitlines()[0][:200]}"
    release(device)  # the traceback, which holds the tensors, is gone here
    return row if problem is None else {**row, "error": problem}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most and mean of at least one value."""
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values), "mean": statistics.fmean(values),
    }  # fmt: skip


def memory_text(found: dict[str, Any]) -> str:
    """`68.1 GB (99% of plan)`."""
    if found.get("used_bytes") is None:
        return "-"
    return f"{format_bytes(found['used_bytes'])} ({found['ratio_to_plan']:.0%} of plan)"


def percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def tokens_text(count: int) -> str:
    return format_tokens(count)


def save(result: dict[str, Any], args: argparse.Namespace, complete: bool = False) -> str:
    """Write the object so far to the file that was asked for, so that a run that breaks off leaves what it measured.

    Returns:
        The object as one line of JSON, environment included.

    Raises:
        InputError: the file cannot be written (the object is still printed).
    """
    result = {**result, "complete": complete, "environment": environment()}
    if args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(json.dumps(result))
            raise InputError(
                f"--json {args.json} cannot be written ({error.strerror}): the object stands above instead"
            ) from error
    return json.dumps(result)


_SHARES = (
    "share", "of_matmul_and_attention", "floor_over_measured", "link_over_measured", "fraction_of_ceiling",
    "read_share", "prefill_of_product",
)  # fmt: skip


def finish_timed(result: dict[str, Any], args: argparse.Namespace) -> int:
    """`finish` for a benchmark of speed: every row of ours says which share of a ceiling of the same run it reaches.

    A time alone does not show that it is worse than it need be. Rows of other libraries and failed ones are exempt.
    """
    for row in result["rows"]:
        others = any(name in str(row.get("runner")) for name in ("transformers", "llama.cpp"))
        ours = "error" not in row and not others
        assert not ours or any(name in row for name in _SHARES), row
    return finish(result, args)


def finish(result: dict[str, Any], args: argparse.Namespace) -> int:
    """Save the complete object and print it as the last line. Raises InputError as `save`."""
    print(save(result, args, complete=True))
    return 0
