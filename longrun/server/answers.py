"""Answers as OpenAI's API writes them: one JSON object, or chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from longrun.engine.sampling import TokenScore
from longrun.server.jobs import STOP, Finished, Piece, Progress
from longrun.text.spelling import TokenSpelling
from longrun.text.tool_calls import ToolCall, ToolCallText

TOOL_CALLS = "tool_calls"
"""Why an answer ended that calls functions."""

_LEAST_LOGPROB = -9999.0  # JSON has no infinite number


def usage(finished: Finished) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.new_tokens,
        "total_tokens": finished.prompt_tokens + finished.new_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


class Answer(ABC):
    """An answer being written.

    Args:
        model: the id under which the model is served.
        spelling: spells the tokens that are scored.
        scored: tokens of the answer are scored.
        include_usage: a stream's last chunk counts tokens; then every other one has usage null.

    Attributes:
        looked_at: the passages that it looked at, told at its end; None where nobody asked.
    """

    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, model: str, spelling: TokenSpelling, scored: bool = False, include_usage: bool = False) -> None:
        self._model, self._spelling, self._scored, self._include_usage = model, spelling, scored, include_usage
        self.looked_at: list[dict[str, Any]] | None = None
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, prompt_scores: Sequence[TokenScore], pieces: Sequence[Piece], finished: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        scores = [score for piece in pieces for score in piece.scores]
        choice = self._whole_choice(prompt_scores, "".join(piece.text for piece in pieces), scores)
        choice |= {"index": 0, "finish_reason": finished.reason}
        looked_at = {} if self.looked_at is None else {"looked_at": self.looked_at}
        return self._object(self.whole_kind, [choice]) | {"usage": usage(finished)} | looked_at

    @abstractmethod
    def first(self, prompt_scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        """Chunks before the answer's text; the prompt has been read, and scored where that was asked for."""

    def progress(self, progress: Progress) -> dict[str, Any]:
        """A chunk that says how far the prompt was read, under the name that llama.cpp's server gives it."""
        told = {
            "total": progress.total,
            "cache": progress.cached,
            "processed": progress.processed,
            "time_ms": round(1000 * progress.seconds),
        }
        return self._chunk(self._change("", [])) | {"prompt_progress": told}

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk(self._change(piece.text, piece.scores))

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        """Chunks after the text."""
        chunks = [self._chunk(self._change("", []), finished.reason)]
        if self.looked_at is not None:
            no_usage = {"usage": None} if self._include_usage else {}
            chunks.append(self._object(self.chunk_kind, []) | no_usage | {"looked_at": self.looked_at})
        if self._include_usage:
            chunks.append(self._object(self.chunk_kind, []) | {"usage": usage(finished)})
        return chunks

    @abstractmethod
    def _whole_choice(
        self, prompt_scores: Sequence[TokenScore], text: str, scores: Sequence[TokenScore]
    ) -> dict[str, Any]:
        """What the choice of a whole answer holds besides index and reason."""

    @abstractmethod
    def _change(self, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """What a chunk's choice holds besides index and reason; without text where it is empty."""

    def _chunk(self, change: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        chunk = self._object(self.chunk_kind, [change | {"index": 0, "finish_reason": reason}])
        return chunk | {"usage": None} if self._include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def joined_answers(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whole answers to several prompts as one object: a choice each, and the sums of what was counted."""
    whole = dict(answers[0])
    whole["choices"] = [answer["choices"][0] | {"index": index} for index, answer in enumerate(answers)]
    counts = [answer["usage"] for answer in answers]
    whole["usage"] = {name: sum(count[name] for count in counts) for name in counts[0] if name.endswith("_tokens")}
    cached = sum(count["prompt_tokens_details"]["cached_tokens"] for count in counts)
    whole["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
    return whole


class ChatAnswer(Answer):
    """A chat completion.

    Args:
        tools: calls of functions in its text are told as such, in a stream at its end.
    """

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, spelling: TokenSpelling, scored: bool = False, include_usage: bool = False,
        tools: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, spelling, scored, include_usage)
        self._calls = ToolCallText() if tools else None

    def first(self, prompt_scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}, "logprobs": None})]

    def piece(self, piece: Piece) -> dict[str, Any]:
        return super().piece(piece if self._calls is None else replace(piece, text=self._calls.feed(piece.text)))

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        before: list[dict[str, Any]] = []
        if self._calls is not None:
            said, calls = self._calls.finish()
            if said:
                before.append(self._chunk(self._change(said, [])))
            if calls:
                told = [{"index": number, **call} for number, call in enumerate(map(_told, calls))]
                before.append(self._chunk({"delta": {"tool_calls": told}, "logprobs": None}))
                finished = replace(finished, reason=_called(finished.reason))
        return [*before, *super().last(finished)]

    def whole(self, prompt_scores: Sequence[TokenScore], pieces: Sequence[Piece], finished: Finished) -> dict[str, Any]:
        if self._calls is None:
            return super().whole(prompt_scores, pieces, finished)
        before = self._calls.feed("".join(piece.text for piece in pieces))
        said, calls = self._calls.finish()
        reason = _called(finished.reason) if calls else finished.reason
        told = super().whole(prompt_scores, [Piece(before + said)], replace(finished, reason=reason))
        if calls:
            message = told["choices"][0]["message"]
            message |= {"content": message["content"].strip() or None, "tool_calls": [_told(call) for call in calls]}
        return told

    def _whole_choice(
        self, prompt_scores: Sequence[TokenScore], text: str, scores: Sequence[TokenScore]
    ) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": self._logprobs(scores)}

    def _change(self, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        delta = {"content": text} if text or scores else {}
        return {"delta": delta, "logprobs": self._logprobs(scores) if scores else None}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        content = [
            self._token(score.token_id, score.logprob) | {"top_logprobs": [self._token(*each) for each in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelling = self._spelling
        return {"token": spelling.text(token_id), "logprob": _finite(logprob), "bytes": spelling.bytes(token_id)}


class TextAnswer(Answer):
    """A completion of a text.

    Args:
        echo: the prompt's text, with which the answer begins; None leaves it out.
        echo_ids: its tokens, for which there are scores where the answer's tokens are scored.
    """

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, spelling: TokenSpelling, scored: bool = False, include_usage: bool = False,
        echo: str | None = None, echo_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, spelling, scored, include_usage)
        self._echo, self._echo_ids = echo, echo_ids
        self._offset = 0  # characters of the tokens that were written down

    def first(self, prompt_scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        if self._echo is None:
            return []
        return [self._chunk({"text": self._echo, "logprobs": self._logprobs(prompt_scores, self._echo_ids[:1])})]

    def _whole_choice(
        self, prompt_scores: Sequence[TokenScore], text: str, scores: Sequence[TokenScore]
    ) -> dict[str, Any]:
        logprobs = self._logprobs([*prompt_scores, *scores], self._echo_ids[:1])
        return {"text": (self._echo or "") + text, "logprobs": logprobs}

    def _change(self, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(scores) if scores else None}

    def _logprobs(self, scores: Sequence[TokenScore], unscored: Sequence[int] = ()) -> dict[str, Any] | None:
        """Four lists, one entry a token; those before the scored ones, an echoed prompt's first, have no score."""
        if not self._scored:
            return None
        tokens = [self._spelling.text(token_id) for token_id in unscored]
        logprobs: list[float | None] = [None for _ in unscored]
        top: list[dict[str, float] | None] = [None for _ in unscored]
        for score in scores:
            tokens.append(self._spelling.text(score.token_id))
            logprobs.append(_finite(score.logprob))
            top.append({self._spelling.text(token_id): _finite(each) for token_id, each in score.top})
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def _called(reason: str) -> str:
    return TOOL_CALLS if reason == STOP else reason


def _told(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
