"""The memory that torch's CPU allocator hands out while something runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def allocation_peak(function: Callable[[], object], folder: Path) -> int:
    """Largest sum of live allocations while `function` runs; the trace is left in `folder`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    assert events
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
