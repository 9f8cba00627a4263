"""What stands between HTTP and the worker: checked requests become jobs, and their events come back to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from longrun.errors import quoted
from longrun.server.jobs import Ask, Event, Failed, Finished, Job
from longrun.server.openai_errors import RequestError
from longrun.server.requests import ChatRequest
from longrun.text.chat_prompt import ChatPrompts
from longrun.text.chat_template import has_template
from longrun.units import format_tokens

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.server.worker import Worker

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        max_new_tokens: tokens of an answer whose request does not say how many.
        request_seconds: from the queue to the last token.
        body_bytes: of a request; body_seconds: in which it must have arrived.
    """

    max_new_tokens: int
    request_seconds: float
    body_bytes: int
    body_seconds: float = 60.0


class Events:
    """The events of one job, for asyncio. Made within the event loop; the job is in the queue then.

    Raises:
        QueueFullError, StoppedError: it was not taken.
    """

    def __init__(self, worker: Worker, ask: Ask, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._job = Job(ask, self._emit, seconds)
        worker.submit(self._job)

    def _emit(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop has ended, and so has everybody who waited
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._job.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events up to `Finished`; where the caller leaves before, the job is cancelled.

        Raises:
            Exception: what the job failed with.
        """
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.cancel()


class Service:
    """Requests over one runtime.

    Args:
        runtime: a model with a tokenizer, the worker's.
        model_name: the id under which it is served.
    """

    def __init__(self, runtime: Runtime, worker: Worker, model_name: str, limits: Limits) -> None:
        assert runtime.tokenizer is not None
        self.worker, self.model_name, self.limits = worker, model_name, limits
        self.capacity = runtime.plan.capacity
        self._runtime = runtime
        self._prompts = ChatPrompts(runtime.tokenizer) if has_template(runtime.tokenizer) else None
        # Tokenizing a long text takes seconds: beside the event loop, one text at a time.
        self._tokenizing = ThreadPoolExecutor(1, "longrun-tokenizer")

    async def chat_ask(self, request: ChatRequest) -> Ask:
        """What a chat completion asks of the worker.

        Raises:
            RequestError: another model, messages that the template refuses, or too many tokens.
        """
        self.check_model(request.model)
        if self._prompts is None:
            raise RequestError("this model has no chat template: send a text to /v1/completions", "no_chat_template")
        pairs = [message.pair for message in request.messages]
        ids = await self._tokenized(lambda prompts=self._prompts: prompts.ids(pairs))
        return Ask(ids, self._room(len(ids), request.new_tokens), request.sampling, request.seed, request.stops)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError: there is no such model here."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"there is no model {quoted(name)} here: {self.model_name} is served", "model_not_found", "model", 404
            )

    def start(self, ask: Ask) -> Events:
        """Put the job into the queue.

        Raises:
            QueueFullError, StoppedError: it was not taken.
        """
        return Events(self.worker, ask, self.limits.request_seconds)

    def close(self) -> None:
        """Tokenize no more."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def _tokenized(self, make: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make)

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        """Tokens that the answer may have.

        Raises:
            RequestError: prompt and answer do not fit into the context.
        """
        left = self.capacity - prompt_tokens
        if left < (1 if asked is None else asked):
            answer = "" if not asked else f" and the {asked:,} asked for as an answer"
            raise RequestError(
                f"the {prompt_tokens:,} tokens of the prompt{answer} exceed the context of "
                f"{format_tokens(self.capacity)} tokens: send a shorter text, or start the server with a larger --ctx",
                "context_length_exceeded",
                "messages",
            )
        return min(left, self.limits.max_new_tokens) if asked is None else asked
