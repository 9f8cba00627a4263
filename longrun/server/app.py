"""The routes of the server."""

from __future__ import annotations

import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from longrun.errors import LongrunError
from longrun.server import requests
from longrun.server.answers import Answer, ChatAnswer, TextAnswer, joined_answers
from longrun.server.document_routes import DocumentRoutes
from longrun.server.guard import Guard
from longrun.server.http import read_body, refusal, streamed_answer, unless_gone, whole_answer
from longrun.server.jobs import Ask
from longrun.server.openai_errors import RequestError
from longrun.server.page_files import PAGE_FILES, page_file
from longrun.server.service import Service

_CLIENT_LEFT = 499  # for the counts: nobody reads it

Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, key: str | None = None, origins: Sequence[str] = ()) -> ASGIApp:
    """The application; its worker has been started, or will be before the first request.

    Args:
        key: what every client must send; None asks for none.
        origins: web pages that may ask; none by default.
    """
    app = FastAPI(title="longrun", openapi_url=None, docs_url=None, redoc_url=None)
    routes = Routes(service)
    for method, path, handler in routes.all():
        app.add_api_route(path, _guarded(service, path, handler), methods=[method])

    async def unknown(request: Request, error: HTTPException) -> Response:
        told = f"there is no {request.method} {request.url.path} here: see docs/server.md for what is served"
        return refusal(RequestError(told, "not_found", status=error.status_code))

    app.add_exception_handler(HTTPException, unknown)
    guarded = Guard(app, key)
    if not origins:
        return guarded
    return CORSMiddleware(
        guarded, allow_origins=origins, allow_methods=["GET", "POST", "PUT", "DELETE"], allow_headers=["*"]
    )


def _guarded(service: Service, path: str, handler: Handler) -> Handler:
    """The handler's response, or the one that says why there is none; counted."""

    async def respond(request: Request) -> Response:
        try:
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            if not isinstance(error, LongrunError):
                traceback.print_exc()
            response = refusal(error)
        service.metrics.responded(path, response.status_code)
        return response

    return respond


class Routes:
    """What is served, over one service."""

    def __init__(self, service: Service) -> None:
        self._service, self._started = service, int(time.time())

    def all(self) -> list[tuple[str, str, Handler]]:
        """(method, path, handler) of each."""
        documents: list[tuple[str, str, Handler]] = []
        if self._service.documents is not None:
            routes = DocumentRoutes(self._service, self._service.documents)
            documents = [
                ("GET", "/documents", routes.list),
                ("GET", "/documents/{name:path}/text", routes.text),
                ("GET", "/documents/{name:path}", routes.status),
                ("PUT", "/documents/{name:path}", routes.put),
                ("DELETE", "/documents/{name:path}", routes.delete),
            ]
        return [
            *(("GET", path, page_file(file)) for path, file in PAGE_FILES.items()),
            *documents,
            ("GET", "/status", self.status),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/tokenizer_info", self.tokenizer_info),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completion),
        ]

    async def health(self, request: Request) -> Response:
        """Whether the worker lives, and how many wait."""
        service, worker = self._service, self._service.worker
        told = {
            "status": "ok" if worker.is_alive else "failed",
            "model": service.model_name,
            "running": worker.num_running,
            "waiting": worker.num_waiting,
            "context": service.capacity,
            "session_tokens": worker.num_tokens,
        }
        return JSONResponse(told, 200 if worker.is_alive else 503)

    async def status(self, request: Request) -> Response:
        """Memory, heads and speed."""
        service = self._service
        return JSONResponse(await anyio.to_thread.run_sync(service.status.told, service.documents))

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        return Response(self._service.metrics.page(), media_type=self._service.metrics.media_type)

    async def models(self, request: Request) -> Response:
        """The model, by itself and with each document."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.model_ids]})

    async def model(self, request: Request) -> Response:
        """One of them, by its id."""
        self._service.check_model(request.path_params["name"])
        return JSONResponse(self._model(request.path_params["name"]))

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, a prompt or a chat."""
        service = self._service
        with service.admitted():
            body = requests.read_tokenize(await read_body(request, service.limits))
            if body.messages is not None:
                ids = await unless_gone(request, service.chat_ids(body.messages))
            elif body.prompt is not None:
                ids = await unless_gone(request, service.prompt_ids(body.prompt, bool(body.add_special_tokens)))
            else:
                ids = await unless_gone(request, service.text_ids(body.content or "", bool(body.add_special)))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.capacity})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        service = self._service
        with service.admitted():
            body = requests.read_detokenize(await read_body(request, service.limits))
            text = await unless_gone(request, service.aside(lambda: service.decoded(body.tokens, "tokens")))
        return JSONResponse({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """What a client must know to tokenize as this server does."""
        return JSONResponse(self._service.tokenizer_info)

    async def chat(self, request: Request) -> Response:
        """An answer to messages."""
        service = self._service
        with service.admitted():
            body = requests.read_chat(await read_body(request, service.limits))
            ask = await unless_gone(request, service.chat_ask(body))
        answer = ChatAnswer(
            body.model or service.model_name, service.spelling, body.scored is not None, body.includes_usage,
            body.callable_tools is not None,
        )  # fmt: skip
        return await self._answered(request, body, ask, answer)

    async def completion(self, request: Request) -> Response:
        """A text's continuation, or several texts', one after another."""
        service = self._service
        with service.admitted():
            body = requests.read_text(await read_body(request, service.limits))
            asks = [await unless_gone(request, service.text_ask(body, prompt)) for prompt in body.prompts]
        answers = [
            TextAnswer(
                service.model_name, service.spelling, body.logprobs is not None, body.includes_usage,
                *((text, ask.token_ids) if body.echo else ()),
            )
            for ask, text in asks
        ]  # fmt: skip
        if len(asks) == 1:
            return await self._answered(request, body, asks[0][0], answers[0])
        whole = [
            await unless_gone(request, whole_answer(service.start(ask), answer))
            for (ask, _), answer in zip(asks, answers, strict=True)
        ]
        return JSONResponse(joined_answers(whole))

    async def _answered(self, request: Request, body: requests.AnswerRequest, ask: Ask, answer: Answer) -> Response:
        events = self._service.start(ask)
        if body.stream:
            return streamed_answer(events, answer, bool(body.return_progress))
        return JSONResponse(await unless_gone(request, whole_answer(events, answer)))

    def _model(self, name: str) -> dict[str, Any]:
        length = self._service.capacity
        return {
            "id": name, "object": "model", "created": self._started, "owned_by": "longrun", "max_model_len": length
        }  # fmt: skip
