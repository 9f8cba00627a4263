"""Bodies in, answers out: what every route does with HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect

from longrun.engine.sampling import TokenScore
from longrun.errors import quoted, shortened
from longrun.server.answers import Answer
from longrun.server.events import Events
from longrun.server.jobs import Finished, LookedAt, Piece, Progress, PromptScores
from longrun.server.openai_errors import RequestError, error_of
from longrun.server.service import Limits

PING_SECONDS = 10
"""Between two comments in a stream that has nothing to say."""

_FAREWELL_SECONDS = 20.0  # in which a stream may end by itself while the server leaves

Result = TypeVar("Result")


JSON = ("application/json",)


def content_type(request: Request) -> str:
    """What the body is, without parameters; empty where the request does not say."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_query(request: Request, known: Collection[str]) -> None:
    """Refuse a misspelled query parameter, which would change nothing.

    Raises:
        RequestError: one of the request's is not `known`.
    """
    for name in request.query_params:
        if name not in known:
            told = f"query parameter {quoted(name)} is unknown: use {' or '.join(known)}"
            raise RequestError(told, "unknown_parameter", shortened(name))


async def read_body(request: Request, limits: Limits, kinds: Sequence[str] = JSON) -> bytes:
    """The body of a request.

    Args:
        kinds: types of content that it may have.

    Raises:
        RequestError: another type of content, too long, or too slow.
        ClientDisconnect: nobody is there any more.
    """
    if content_type(request) not in kinds:
        what = "JSON" if kinds == JSON else "text, Markdown, HTML, PDF, or a zip, tar or tar.gz archive"
        raise RequestError(
            f"the body must be {what}: send the header Content-Type: {' or '.join(kinds)}",
            "unsupported_media_type",
            status=415,
        )
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise RequestError(
                        f"the body is longer than the {limits.body_bytes:,} bytes that one may have: send a shorter "
                        f"text, or start the server with a larger --max-body",
                        "request_too_large", status=413,
                    )  # fmt: skip
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {limits.body_seconds:g} seconds: send it at once", "timeout", status=408
        ) from None
    return bytes(body)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled where the client leaves; the body has been read before.

    Raises:
        ClientDisconnect: the client left.
        Exception: what `work` raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole_answer(events: Events, answer: Answer) -> dict[str, Any]:
    """The answer as one object.

    Raises:
        Exception: what the job failed with.
    """
    pieces: list[Piece] = []
    prompt_scores: list[TokenScore] = []
    async for event in events:
        if isinstance(event, Piece):
            pieces.append(event)
        elif isinstance(event, PromptScores):
            prompt_scores += event.scores
        elif isinstance(event, LookedAt):
            answer.looked_at = event.passages
        elif isinstance(event, Finished):
            return answer.whole(prompt_scores, pieces, event)
    raise AssertionError("a job's events end with Finished")


def streamed_answer(events: Events, answer: Answer, progress: bool) -> EventSourceResponse:
    """The answer as server-sent events, with comments while there is nothing to say.

    Args:
        progress: say how far the prompt was read.
    """

    async def left(_: Any) -> None:
        events.cancel()

    return EventSourceResponse(
        _as_sent(_chunks(events, answer, progress)), ping=PING_SECONDS, sep="\n", client_close_handler_callable=left,
        shutdown_event=anyio.Event(), shutdown_grace_period=_FAREWELL_SECONDS,
    )  # fmt: skip


async def _chunks(events: Events, answer: Answer, progress: bool) -> AsyncIterator[dict[str, Any]]:
    """The stream's chunks; the first ones come at once, or when the prompt has been scored."""
    prompt_scores: list[TokenScore] = []
    begun = not events.ask.scores_prompt
    if begun:
        for chunk in answer.first([]):
            yield chunk
    async for event in events:
        if isinstance(event, PromptScores):
            prompt_scores += event.scores
        elif isinstance(event, Progress):
            if progress:
                yield answer.progress(event)
            continue
        elif not begun:
            begun = True
            for chunk in answer.first(prompt_scores):
                yield chunk
        if isinstance(event, Piece):
            yield answer.piece(event)
        elif isinstance(event, LookedAt):
            answer.looked_at = event.passages
        elif isinstance(event, Finished):
            for chunk in answer.last(event):
                yield chunk


async def _as_sent(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[ServerSentEvent]:
    """Chunks as events; the error that ends them is one, too."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:
        yield _event(error_of(error)[1])
    yield ServerSentEvent(data="[DONE]", sep="\n")


def _event(chunk: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(data=json.dumps(chunk, ensure_ascii=False), sep="\n")


def refusal(error: Exception) -> JSONResponse:
    """The response that says why there is no answer."""
    status, body = error_of(error)
    return JSONResponse(body, status)
