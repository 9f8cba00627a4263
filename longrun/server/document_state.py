"""What a server knows of one document: what is kept of it, how far it was read, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longrun.server.document_files import Record
from longrun.server.jobs import Job, ReadSparsely
from longrun.server.kept import KeptSession

QUEUED, READING, READY, FAILED = "queued", "reading", "ready", "failed"


@dataclass
class Document:
    """One document's state.

    Attributes:
        record, kept: what is on disk.
        done: tokens that were read; sparse: those of them that were read sparsely.
        error: why it failed.
        job: the one that reads it.
    """

    name: str
    record: Record
    kept: KeptSession
    state: str = QUEUED
    done: int = 0
    sparse: int = 0
    error: str | None = None
    job: Job | None = None

    def read_sparsely(self, event: ReadSparsely) -> None:
        """Count what a step of its reading read of the past."""
        self.sparse = event.tokens
        counts = [one + more for one, more in zip(self._counts, event.counts.sums, strict=True)]
        self.record = replace(self.record, sparse_counts=counts)

    def told(self) -> dict[str, Any]:
        """What a client is told of it, JSON types; of what was read sparsely the shares of the past's pages and of the
        attention, null where nothing was."""
        read, pages, caught, rows = self._counts
        return {
            "object": "document",
            "name": self.name,
            "state": self.state,
            "bytes": self.record.bytes,
            "tokens": self.record.tokens,
            "tokens_done": self.done,
            "created": self.record.created,
            "notices": self.record.notices,
            "reading": {
                "prefill": self.record.prefill,
                "sparse_tokens": self.sparse,
                "read_share": read / pages if pages else None,
                "caught_share": caught / rows if rows else None,
            },
            "error": self.error,
        }

    @property
    def _counts(self) -> list[float]:
        return self.record.sparse_counts or [0.0] * 4
