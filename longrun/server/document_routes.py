"""The routes of documents."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from longrun.server.document_files import checked_name
from longrun.server.document_prompts import KINDS
from longrun.server.documents import Documents
from longrun.server.http import check_query, content_type, read_body
from longrun.server.service import Service


class DocumentRoutes:
    """What is served of documents, over one service that has some."""

    def __init__(self, service: Service, documents: Documents) -> None:
        self._service, self._documents = service, documents

    async def list(self, request: Request) -> Response:
        """All of them."""
        return JSONResponse({"object": "list", "data": self._documents.all()})

    async def status(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self._documents.status(_name(request)))

    async def text(self, request: Request) -> Response:
        """The text of one, of which `looked_at` tells lines and bytes."""
        name = _name(request)
        text = await self._service.aside(lambda: self._documents.text(name))
        return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})

    async def put(self, request: Request) -> Response:
        """Take one, or other content for one; it is read later, as ?prefill= says."""
        name, kind = _name(request), content_type(request)
        check_query(request, ("prefill",))
        with self._service.admitted():
            raw = await read_body(request, self._service.limits, KINDS)
            prefill = request.query_params.get("prefill")
            told, changed = await self._service.aside(lambda: self._documents.put(name, raw, kind, prefill))
        return JSONResponse(told, 202 if changed else 200)

    async def delete(self, request: Request) -> Response:
        """Forget one."""
        name = _name(request)
        await self._service.aside(lambda: self._documents.delete(name))
        return JSONResponse({"object": "document", "name": name, "deleted": True})


def _name(request: Request) -> str:
    return checked_name(request.path_params["name"])
