"""Who may ask: a key, and the host names that lead here. Around the whole application, before any body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from longrun.errors import InputError, quoted
from longrun.server.http import refusal
from longrun.server.openai_errors import RequestError
from longrun.server.page_files import PAGE_FILES

OPEN_PATHS = frozenset({"/health", *PAGE_FILES})
"""Served without a key."""

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def checked_key(key: str | None, what: str) -> str | None:
    """The key, which clients send in a header.

    Raises:
        InputError: it is empty, or holds what a header cannot.
    """
    if key is not None and not (key and all("!" <= c <= "~" for c in key)):
        raise InputError(f"{what} must be of printable ASCII characters without spaces, at least one: choose another")
    return key


def check_exposure(address: str, key: str | None, origins: Collection[str]) -> None:
    """Whether a server at this numeric address may start.

    Raises:
        InputError: others could ask it without a key.
    """
    if key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise InputError(
            f"host {address} can be reached from other machines: give a key with --api-key or LONGRUN_API_KEY, or use "
            f"127.0.0.1"
        )
    if key is None and "*" in origins:
        raise InputError("--cors * lets every web page ask this server: name the pages' origins, or give a key")


class Guard:
    """Lets through what has the key or, without one, what was addressed to this machine by a name of its own: a web
    page elsewhere can give its own name this machine's address.

    Args:
        app: what is guarded.
        key: None where none is needed.
    """

    def __init__(self, app: ASGIApp, key: str | None = None) -> None:
        self._app = app
        self._digest = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refused(scope["path"], Headers(scope=scope))
        await (self._app if error is None else refusal(error))(scope, receive, send)

    def _refused(self, path: str, headers: Headers) -> RequestError | None:
        if self._digest is None:
            name = _host_name(headers.get("host", ""))
            if name in _LOOPBACK_NAMES:
                return None
            return RequestError(
                f"host {quoted(name)} is not this machine: ask 127.0.0.1, or start the server with a key", "wrong_host",
                status=403,
            )  # fmt: skip
        if path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self._digest):
            return None
        return RequestError("the API key is missing or wrong: send it as Authorization: Bearer KEY",
                            "invalid_api_key", status=401)  # fmt: skip


def _digest(key: str) -> bytes:
    """Of one length for all keys, so that comparing takes one time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
