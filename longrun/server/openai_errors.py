"""Refusals in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from longrun.errors import LongrunError, shortened
from longrun.server.jobs import StoppedError
from longrun.server.worker import QueueFullError

INVALID, SERVER = "invalid_request_error", "server_error"


class RequestError(LongrunError):
    """A request that cannot be served as it is.

    Attributes:
        status: HTTP status.
        code: what programs tell errors apart by; param: the field that is wrong.
    """

    def __init__(self, message: str, code: str | None = None, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for whatever ended a request; what is not a person's mistake says nothing of its insides."""
    if isinstance(error, RequestError):
        return error.status, _body(str(error), INVALID, error.param, error.code)
    if isinstance(error, QueueFullError):
        return 429, _body(str(error), "rate_limit_error", None, "queue_full")
    if isinstance(error, StoppedError):
        return 503, _body(str(error), SERVER, None, "stopped")
    if isinstance(error, LongrunError):
        return 400, _body(str(error), INVALID, None, None)
    return 500, _body("the server failed on this request, which is a defect of longrun", SERVER, None, None)


def refused_fields(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a body, in one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    kind, said = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return RequestError(f"the body is not JSON ({said}): send a JSON object", "invalid_json")
    if kind == "extra_forbidden":
        return RequestError(f"{shortened(param)} is not served: leave it out", "unknown_parameter", shortened(param))
    if param is None:
        return RequestError(said)
    return RequestError(f"{shortened(param)}: {said}", "invalid_value", shortened(param))


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
