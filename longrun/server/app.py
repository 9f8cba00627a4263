"""The routes of the server."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from longrun.server import requests
from longrun.server.answers import ChatAnswer
from longrun.server.http import read_body, refusal, streamed_answer, unless_gone, whole_answer
from longrun.server.openai_errors import RequestError
from longrun.server.service import Service

_CLIENT_LEFT = 499  # for logs: nobody reads it


def make_app(service: Service) -> FastAPI:
    """The application; its worker has been started, or will be before the first request."""
    app = FastAPI(title="longrun", openapi_url=None, docs_url=None, redoc_url=None)
    started = int(time.time())

    async def unknown(request: Request, error: HTTPException) -> Response:
        told = f"there is no {request.method} {request.url.path} here: see docs/server.md for what is served"
        return refusal(RequestError(told, "not_found", status=error.status_code))

    async def failed(request: Request, error: Exception) -> Response:
        return refusal(error)

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)

    @app.get("/health")
    async def health() -> Response:
        worker = service.worker
        told = {
            "status": "ok" if worker.is_alive else "failed",
            "model": service.model_name,
            "running": worker.num_running,
            "waiting": worker.num_waiting,
            "context": service.capacity,
            "session_tokens": worker.num_tokens,
        }
        return JSONResponse(told, 200 if worker.is_alive else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": service.model_name, "object": "model", "created": started, "owned_by": "longrun"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": service.capacity}]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        async def answer() -> Response:
            service.check_model(name)
            return JSONResponse({"id": name, "object": "model", "created": started, "owned_by": "longrun"})

        return await _guarded(answer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async def answer() -> Response:
            body = requests.read_chat(await read_body(request, service.limits))
            ask = await unless_gone(request, service.chat_ask(body))
            written = ChatAnswer(service.model_name, body.includes_usage)
            events = service.start(ask)
            if body.stream:
                return streamed_answer(events, written, bool(body.return_progress))
            return JSONResponse(await unless_gone(request, whole_answer(events, written)))

        return await _guarded(answer)

    return app


async def _guarded(answer: Callable[[], Awaitable[Response]]) -> Response:
    """The answer, or the response that says why there is none."""
    try:
        return await answer()
    except ClientDisconnect:
        return Response(status_code=_CLIENT_LEFT)
    except Exception as error:
        return refusal(error)
