"""Whether the machine has free now what a plan needs: before the first weight is read, and before every session."""

from __future__ import annotations

import torch

from longrun.errors import PlanError
from longrun.machine.host_memory import resident_bytes, still_needed
from longrun.plan.plan import Plan
from longrun.units import format_bytes

_NOTICED_BYTES = 10**8  # what the system keeps of freed memory is less


def check_free_memory(
    plan: Plan, loaded: bool = False, compiled: bool = False, pinned_bytes: int = 0, copied_bytes: int = 0
) -> None:
    """The machine has free now what the plan still needs, so that nothing runs out of memory later.

    Args:
        loaded: weights and the sessions that the plan calls reserved stand in memory already: they are not asked for
            twice.
        compiled: so do the GPU's kernels and libraries. Those of the CPU always do.
        pinned_bytes: pinned host memory that is kept for the next session (on cuda).
        copied_bytes: of what the plan calls reserved, weights that are yet to be copied.

    Raises:
        PlanError: it has not.
    """
    held = {"weights", "reserved"} if loaded else set()
    if compiled or plan.device_type == "cpu":
        held.add("runtime base")
    already = sum(item.bytes for item in plan.items if item.name in held) - copied_bytes
    if plan.device_type == "cpu":
        needed, free = still_needed(plan.total_bytes, already, loaded)
        if needed > free:
            raise PlanError(
                f"the plan needs {_more(plan.total_bytes, needed)} of main memory and {format_bytes(free)} are "
                f"free: ask for a smaller context than {plan.capacity:,} tokens, or free memory"
            )
        return
    _check_gpu_memory(plan, already)
    needed, free = still_needed(plan.host_bytes, pinned_bytes, loaded)
    if plan.host_bytes and needed > free:
        raise PlanError(
            f"the plan's host pool needs {_more(plan.host_bytes, needed)} of main memory and {format_bytes(free)} "
            f"are free: ask for a smaller context than {plan.capacity:,} tokens, give a budget with less in host of "
            f"its [memory] section, or free memory"
        )


def library_notice(plan: Plan, before: int) -> list[str]:
    """A sentence where libraries hold clearly more here than the plan counts, once a model is loaded on the CPU.

    Args:
        before: `resident_bytes` when loading began; what exceeds the plan's base there is the caller's own.
    """
    sizes = {item.name: item.bytes for item in plan.items}
    base = sizes["runtime base"] + sizes.get("server", 0)
    found = resident_bytes() - sizes["weights"] - max(0, before - base)
    if plan.device_type != "cpu" or found <= base + _NOTICED_BYTES:
        return []
    return [
        f"libraries hold {format_bytes(found)} of main memory here, and the plan counts {format_bytes(base)} for them: "
        f"this run holds {format_bytes(found - base)} more than planned"
    ]


def bytes_in_use(device_type: str) -> tuple[int, int]:
    """Bytes in use now on the device and in host memory: of a GPU by all programs, as its driver counts; of main memory
    by this process, files that it has mapped included. On the CPU main memory is the device, and the host has 0."""
    if device_type == "cpu":
        return resident_bytes(), 0
    free, total = torch.cuda.mem_get_info()
    return total - free, resident_bytes()


def _check_gpu_memory(plan: Plan, already: int) -> None:
    free, total = torch.cuda.mem_get_info()
    # What torch keeps without using it serves this process.
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    needed = plan.device_bytes - already
    if needed > free + kept:
        raise PlanError(
            f"the plan needs {_more(plan.device_bytes, needed)} of GPU memory, and {format_bytes(free + kept)} of its "
            f"{format_bytes(total)} are free, as {format_bytes(total - free)} are taken already: end what else uses "
            f"the GPU, or give a budget with less in gpu of its [memory] section"
        )


def _more(planned: int, needed: int) -> str:
    """`1.20 GB`, or `0.80 GB more (1.20 GB in all)` where a part of it is held already."""
    return (
        format_bytes(planned) if needed >= planned else f"{format_bytes(needed)} more ({format_bytes(planned)} in all)"
    )
