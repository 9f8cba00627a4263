"""From a runtime to a server that listens, and its end: signals, the worker's thread, the exit status."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from longrun.errors import InputError
from longrun.server.app import make_app
from longrun.server.service import Limits, Service
from longrun.server.worker import Worker

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime

_LAST_STEP_SECONDS = 30.0  # in which the worker finishes the step that it is in


class Terminated(BaseException):
    """SIGTERM was received, and the server has left."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address; connections are refused until the server listens.

    Args:
        port: 0 takes a free one.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host {host} is no address of this machine ({error}): use 127.0.0.1") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"port {port} of {host} cannot be used ({error.strerror or error}): choose another with --port, or end the "
            f"program that has it"
        ) from None
    return bound


class _Server(uvicorn.Server):
    """uvicorn's server; its first signal also ends the jobs, which would keep connections open."""

    def __init__(self, config: uvicorn.Config, on_leave: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_leave = on_leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_leave()
        super().handle_exit(sig, frame)


class Serving:
    """A server over one runtime. Making it starts the worker, which makes the session.

    Args:
        runtime: a model with a tokenizer.
        model_name: the id under which it is served.
        most_waiting: requests that may wait while one is answered.
        key, origins: see `make_app`.
        documents: folder of the documents that are kept; None keeps none.

    Raises:
        InputError: the folder cannot be used, or this model keeps no documents.
        PlanError: there is no memory for the session.
    """

    def __init__(
        self, runtime: Runtime, model_name: str, limits: Limits, most_waiting: int, key: str | None = None,
        origins: Sequence[str] = (), documents: Path | None = None,
    ) -> None:  # fmt: skip
        self.worker = Worker(runtime, most_waiting)
        self.service = Service(runtime, self.worker, model_name, limits, documents)
        config = uvicorn.Config(
            make_app(self.service, key, origins), log_level="warning", access_log=False, lifespan="off", http="h11",
            ws="none", loop="asyncio", timeout_keep_alive=30, server_header=False,
        )  # fmt: skip
        self._server = _Server(config, self.worker.close)
        try:
            self.worker.start()
        except BaseException:
            self.service.close()
            raise
        self.service.begin()

    @property
    def is_listening(self) -> bool:
        return self._server.started

    def run(self, bound: socket.socket) -> None:
        """Serve until a signal or `leave`; in the main thread SIGINT and SIGTERM go on to their handlers then."""
        try:
            self._server.run(sockets=[bound])
        finally:
            self.worker.close()
            self.worker.join(_LAST_STEP_SECONDS)
            self.service.close()

    def leave(self) -> None:
        """Let `run` return, from another thread; what is being answered ends with an error."""
        self.worker.close()
        self._server.should_exit = True


def terminate_on_sigterm() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread."""

    def on_sigterm(number: int, frame: Any) -> NoReturn:
        for heard in (signal.SIGTERM, signal.SIGINT):
            signal.signal(heard, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
