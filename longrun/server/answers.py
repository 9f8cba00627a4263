"""Answers as OpenAI's API writes them: one JSON object, or chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from longrun.server.jobs import Finished, Piece, Progress


def usage(finished: Finished) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.new_tokens,
        "total_tokens": finished.prompt_tokens + finished.new_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


@dataclass
class ChatAnswer:
    """A chat completion being written.

    Args:
        model: the id under which the model is served.
        include_usage: a stream's last chunk counts tokens; then every other one has usage null.
    """

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: list[Piece], finished: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
        return self._object("chat.completion", [choice]) | {"usage": usage(finished)}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def progress(self, progress: Progress) -> dict[str, Any]:
        """A chunk that says how far the prompt was read."""
        told = {
            "total": progress.total,
            "cache": progress.cached,
            "processed": progress.processed,
            "time_ms": round(1000 * progress.seconds),
        }
        return self._chunk({}) | {"prompt_progress": told}

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"content": piece.text})

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        """Chunks after the text."""
        chunks = [self._chunk({}, finished.reason)]
        if self.include_usage:
            chunks.append(self._object("chat.completion.chunk", []) | {"usage": usage(finished)})
        return chunks

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = self._object("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
