"""Counts for Prometheus, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from longrun.server.jobs import Finished

if TYPE_CHECKING:
    from longrun.server.worker import Worker

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


class Metrics:
    """What the server has done since it started, and what its worker is doing.

    Attributes:
        media_type: of `page`.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker, capacity: int) -> None:
        self._registry = CollectorRegistry()
        self._worker, self._capacity = worker, capacity
        self._registry.register(self)
        self._requests = self._counter("requests", "Responses by path and HTTP status", ("path", "status"))
        self._prompt = self._counter("prompt_tokens", "Tokens of the prompts of finished answers")
        self._cached = self._counter("cached_tokens", "Those of them that were not read again")
        self._generated = self._counter("generated_tokens", "Tokens of finished answers")
        self._cancelled = self._counter("cancelled_requests", "Answers whose client left, or that failed")
        self._first = Histogram(
            "longrun_first_text_seconds", "From the queue to the first text", registry=self._registry, buckets=_SECONDS
        )

        self._loaded = Histogram(
            "longrun_session_load_seconds", "To load a document's session", registry=self._registry, buckets=_SECONDS
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The worker's state, asked for when a page is made."""
        for name, told, value in (
            ("longrun_waiting_requests", "Requests in the queue", self._worker.num_waiting),
            ("longrun_running_requests", "Requests being answered", self._worker.num_running),
            ("longrun_session_tokens", "Tokens that the session holds", self._worker.num_tokens),
            ("longrun_context_tokens", "Tokens that it has room for", self._capacity),
        ):
            yield GaugeMetricFamily(name, told, value=value)

    def responded(self, path: str, status: int) -> None:
        """A response was begun."""
        self._requests.labels(path, str(status)).inc()

    def first_text(self, seconds: float) -> None:
        """The first text of an answer came so long after its request."""
        self._first.observe(seconds)

    def loaded(self, seconds: float) -> None:
        """A document's session was loaded within so long."""
        self._loaded.observe(seconds)

    def ended(self, finished: Finished | None) -> None:
        """An answer was finished, or not."""
        if finished is None:
            self._cancelled.inc()
            return
        self._prompt.inc(finished.prompt_tokens)
        self._cached.inc(finished.cached_tokens)
        self._generated.inc(finished.new_tokens)

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"longrun_{name}", told, labels, registry=self._registry)
