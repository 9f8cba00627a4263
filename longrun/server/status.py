"""What the server holds and does now, against its plan: the JSON object of /status, for the page and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from longrun.plan.prefill import prefill_facts
from longrun.plan.report import heads_line
from longrun.plan.times import host_bytes
from longrun.runtime.memory_checks import bytes_in_use
from longrun.server.pace import Rate
from longrun.units import ALL_TOKENS

if TYPE_CHECKING:
    from longrun.patterns.head_split import HeadSplit
    from longrun.plan.plan import Plan
    from longrun.runtime.runtime import Runtime
    from longrun.server.documents import Documents
    from longrun.server.worker import Worker
    from longrun.specs.hot_counts import HotCounts

ALL, STREAMING = "all", "streaming"
"""Reaches that are no number: of heads that keep every token, and of those that keep sinks and window."""


class Status:
    """The state of one runtime and its worker.

    Args:
        runtime: the worker's.
        model_name: the id under which it is served.
        body_bytes: the most that a request may have.
    """

    def __init__(self, runtime: Runtime, worker: Worker, model_name: str, body_bytes: int) -> None:
        self._runtime, self._worker, self._model_name, self._body_bytes = runtime, worker, model_name, body_bytes

    def told(self, documents: Documents | None) -> dict[str, Any]:
        """JSON types; sizes are bytes. It asks the system and reads a folder, so call it beside the event loop."""
        plan, worker = self._runtime.plan, self._worker
        cache, tokens = plan.cache, min(worker.num_tokens, plan.capacity)
        in_use = dict(zip(("device", "host"), bytes_in_use(plan.device_type), strict=True))
        return {
            "model": {
                "name": self._model_name,
                "shape": plan.model,
                "device": plan.device_type,
                "weights": plan.weight_format,
                "pages": plan.kv_format,
                "page_size": plan.page_size,
                "chunk_size": plan.chunk_size,
            },
            "context": {"tokens": tokens, "capacity": plan.capacity, "sparse_tokens": worker.sparse_tokens},
            "prefill": prefill_facts(plan.attention),
            "queue": {"running": worker.num_running, "waiting": worker.num_waiting, "most": worker.most_waiting},
            "body_bytes": self._body_bytes,
            "last": {
                "reading": _rate(worker.pace.reading),
                "writing": _rate(worker.pace.writing),
                "loading": _rate(worker.pace.loading),
            },
            "memory": {
                "items": [asdict(item) for item in plan.items],
                "device": {"in_use": in_use["device"], "planned": plan.device_bytes, "allowed": plan.device_budget},
                "host": {"in_use": in_use["host"], "planned": plan.host_bytes, "allowed": plan.host_budget},
                "cache": {
                    "filled": cache.filled_bytes(tokens),
                    "on_host": host_bytes(plan, tokens),
                    "planned": plan.cache_bytes,
                },
                "hot_pool": None if worker.hot is None else _hot_pool(plan, worker.hot),
            },
            "documents": None if documents is None else documents.disk(),
            "heads": {
                "summary": heads_line(cache),
                "note": plan.split_note,
                "sink_size": cache.sink_size,
                "recent_size": cache.recent_size,
                "reaches": told_reaches(self._runtime.split),
            },
        }


def told_reaches(split: HeadSplit) -> list[list[int | str]]:
    """[num_layers][num_kv_heads], heads in the order of the checkpoint: tokens, `ALL` or `STREAMING`."""

    def told(keep: bool, reach: int) -> int | str:
        return STREAMING if not keep else ALL if reach == ALL_TOKENS else reach

    rows = zip(split.retrieval, split.all_reaches, strict=True)
    return [[told(keep, reach) for keep, reach in zip(*row, strict=True)] for row in rows]


def _hot_pool(plan: Plan, counts: HotCounts) -> dict[str, Any]:
    """Its bytes, and what the session's decode steps chose of host pages so far."""
    told = counts.to_dict()
    del told["by_layer"]
    return {"planned": sum(item.bytes for item in plan.items if item.name == "hot pool"), **told}


def _rate(rate: Rate | None) -> dict[str, float] | None:
    return None if rate is None else {**asdict(rate), "tokens_per_s": rate.tokens / max(rate.seconds, 1e-9)}
