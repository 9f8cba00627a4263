"""What stands between HTTP and the worker: checked requests become jobs, and their events come back to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longrun.arguments import check_text
from longrun.errors import InputError, PlanError, quoted
from longrun.server.document_files import checked_name
from longrun.server.document_prompts import numbers_with_document, with_document
from longrun.server.documents import Documents
from longrun.server.events import Events
from longrun.server.jobs import Ask
from longrun.server.looked import PromptSources, chat_sources, text_sources
from longrun.server.messages import Message
from longrun.server.metrics import Metrics
from longrun.server.openai_errors import RequestError
from longrun.server.requests import AnswerRequest, ChatRequest, TextRequest
from longrun.server.status import Status
from longrun.server.worker import QueueFullError, Worker
from longrun.specs.look_back_spec import look_back_room
from longrun.text.chat_prompt import ChatPrompts, PromptText
from longrun.text.chat_template import has_template
from longrun.text.encoder import TextEncoder, leading_ids
from longrun.text.spelling import TokenSpelling
from longrun.text.tool_calls import takes_tools
from longrun.units import format_tokens

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.text.json_answers import JsonRule

Result = TypeVar("Result")

_DEFAULT_COMPLETION = 16  # tokens of a completion whose request does not say how many, as OpenAI's API has it


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        max_new_tokens: tokens of an answer whose request does not say how many.
        request_seconds: from the queue to the last token.
        body_bytes: of a request; body_seconds: in which it must have arrived.
        unpacked_bytes: of the files in an archive; None is four times `body_bytes`.
    """

    max_new_tokens: int
    request_seconds: float
    body_bytes: int
    body_seconds: float = 60.0
    unpacked_bytes: int | None = None


class Service:
    """Requests over one runtime.

    Args:
        runtime: a model with a tokenizer, the worker's.
        model_name: the id under which it is served.
        documents: folder of the documents; None keeps none.

    Attributes:
        documents: those in the folder.
        status: what /status tells.

    Raises:
        InputError: see `Documents`.
    """

    def __init__(
        self, runtime: Runtime, worker: Worker, model_name: str, limits: Limits, documents: Path | None = None
    ) -> None:
        assert runtime.tokenizer is not None
        self.worker, self.model_name, self.limits = worker, model_name, limits
        self.capacity = runtime.plan.capacity
        self.metrics = Metrics(worker, self.capacity)
        self.status = Status(runtime, worker, model_name, limits.body_bytes)
        self._runtime = runtime
        self.spelling = TokenSpelling(runtime.tokenizer)
        self._tokenizer = runtime.tokenizer
        self._encoder = TextEncoder(runtime.tokenizer)
        self._preparing = 0
        self._prompts = ChatPrompts(runtime.tokenizer) if has_template(runtime.tokenizer) else None
        self._takes_tools = takes_tools(runtime.tokenizer)
        # Tokenizing a long text takes seconds: beside the event loop, one text at a time.
        self._tokenizing = ThreadPoolExecutor(1, "longrun-tokenizer")
        self.documents = None
        if documents is not None:
            self.documents = Documents(
                documents, runtime, worker, self._prompts, lambda tokens: self._room(tokens, None, "document"),
                limits.unpacked_bytes or 4 * limits.body_bytes,
            )  # fmt: skip

    def begin(self) -> None:
        """Go on reading documents; the worker has been started."""
        if self.documents is not None:
            self._tokenizing.submit(self.documents.start)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request is read and made ready within this block, which holds its body in memory.

        Raises:
            QueueFullError: as many as may wait are here already.
        """
        if self._preparing >= self.worker.most_waiting:
            raise QueueFullError(f"{self._preparing:,} requests are being made ready: ask again later")
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def chat_ask(self, request: ChatRequest) -> Ask:
        """What a chat completion asks of the worker.

        Raises:
            RequestError: another model, messages that the template refuses, or too many tokens.
        """
        name, kept, now, document = self.check_model(request.model), None, None, None
        chat = given = [message.pair for message in request.messages]
        tools, more = request.callable_tools, [message.more for message in request.messages]
        self._check_tools(tools, more, name)
        if self.documents is not None and name is not None:
            text, kept, now = await self.aside(lambda documents=self.documents: documents.taken(name))
            document, chat = (name, text), with_document(text, given)
            more = [more[held[-1] or 0] for held in numbers_with_document(given)]
        rule = await self._rule(request)
        ids, texts = await self._read_pairs(chat, now, tools, more)
        room = self._room(len(ids), request.new_tokens, "messages")
        sources = await self._sources(request, ids, lambda: chat_sources(self._runtime, ids, texts, given, document))
        return Ask(
            ids, room, request.sampling, request.seed, request.stops, request.scored, kept=kept, rule=rule,
            sources=sources, sparse=kept is None,
        )  # fmt: skip

    async def text_ask(self, request: TextRequest, prompt: str | list[int]) -> tuple[Ask, str]:
        """What a completion asks of the worker for one of its prompts, and the text that it begins with.

        Raises:
            RequestError: another model, token ids that are none, or too many tokens.
        """
        if self.check_model(request.model) is not None:
            raise RequestError(
                "a document stands in a chat: ask POST /v1/chat/completions", "unsupported_value", "model"
            )
        rule = await self._rule(request)
        if isinstance(prompt, str):
            ids, text = await self.text_ids(prompt, True), prompt
        else:
            ids, text = prompt, self.decoded(prompt, "prompt")
        scores_prompt = bool(request.echo) and request.logprobs is not None
        asked = _DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        room = self._room(len(ids), asked, "prompt")
        sources = await self._sources(request, ids, lambda: text_sources(self._runtime, ids, text))
        ask = Ask(
            ids, room, request.sampling, request.seed, request.stops, request.logprobs, scores_prompt, scores_end=True,
            rule=rule, sources=sources,
        )  # fmt: skip
        return ask, text

    async def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat, up to where the answer begins.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        more = [message.more for message in messages]
        self._check_tools(None, more, None)
        return (await self._read_pairs([message.pair for message in messages], None, None, more))[0]

    def _check_tools(self, tools: object, more: Sequence[dict[str, Any]], document: str | None) -> None:
        """Raises RequestError: tools, or messages of their use, that the model's chat template does not take; tools
        with a document, whose session was read without them."""
        wrong = "tools" if tools is not None else "messages" if any(more) else None
        if wrong is not None and not self._takes_tools:
            raise RequestError(
                f"this model's chat template takes no {'tools' if tools is not None else 'calls of tools'} in a form "
                f"that longrun reads: leave them out",
                "unsupported_value", wrong,
            )  # fmt: skip
        if tools is not None and document is not None:
            raise RequestError(
                "tools are not served with a document: the text would have to be read again behind them",
                "unsupported_value", "tools",
            )  # fmt: skip

    async def _read_pairs(
        self, pairs: Sequence[tuple[str, str]], now: float | None, tools: Sequence[dict[str, Any]] | None,
        more: Sequence[dict[str, Any]],
    ) -> tuple[list[int], list[PromptText]]:  # fmt: skip
        if self._prompts is None:
            raise RequestError("this model has no chat template: send a text to /v1/completions", "no_chat_template")
        return await self.aside(lambda prompts=self._prompts: prompts.read(pairs, now, tools, more))

    async def _rule(self, request: AnswerRequest) -> JsonRule | None:
        """Which tokens the answer may have.

        Raises:
            RequestError: a form that is not served.
        """
        try:
            return await self.aside(lambda: self._runtime.json_rule(request.response_format))
        except InputError as error:
            raise RequestError(str(error), "unsupported_value", "response_format") from None

    async def _sources(
        self, request: AnswerRequest, ids: list[int], make: Callable[[], PromptSources]
    ) -> PromptSources | None:
        """By what the passages of a prompt are named; None where nobody asks for them.

        Raises:
            RequestError: the plan has no memory to look back over so many tokens.
        """
        if not request.looked_at:
            return None
        plan, config = self._runtime.plan, self._runtime.config
        try:
            look_back_room(config, plan.attention.compute_itemsize, plan.chunk_size, plan.device_type, len(ids))
        except PlanError as error:
            raise RequestError(str(error), "unsupported_value", "looked_at") from None
        return await self.aside(make)

    async def text_ids(self, text: str, begins: bool) -> list[int]:
        """Tokens of a text; where it `begins` the sequence with what the tokenizer puts there."""
        return await self.aside(lambda: self._runtime.encode(text, begins))

    async def prompt_ids(self, prompt: str, begins: bool) -> list[int]:
        """Tokens of a text in which the spellings of control tokens stand for these."""
        leading = leading_ids(self._tokenizer) if begins else []
        return leading + await self.aside(lambda: self._encoder.marked_ids(check_text(prompt, "prompt")))

    def decoded(self, token_ids: list[int], field: str) -> str:
        """The text that tokens spell, control tokens as they are written.

        Raises:
            RequestError: one that is no token's id.
        """
        vocab_size = self._runtime.config.vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {quoted(wrong)} is outside the model's vocabulary of {vocab_size:,}", "invalid_value", field
            )
        return self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        """Which tokens begin, end and fill a text, as they are written, and the chat template; under vLLM's names."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found = {name: getattr(self._tokenizer, name) for name in names}
        return {"tokenizer_class": type(self._tokenizer).__name__, **found,
                "chat_template": self._tokenizer.chat_template}  # fmt: skip

    @property
    def model_ids(self) -> list[str]:
        """The model, and the model with each of the documents that are ready."""
        names = [] if self.documents is None else self.documents.names()
        return [self.model_name, *(f"{self.model_name}@{name}" for name in names)]

    def check_model(self, name: str | None) -> str | None:
        """The document's name where it is the model with a document.

        Raises:
            RequestError: there is no such model here, or its document has not been read.
        """
        if name is None or name == self.model_name:
            return None
        before = f"{self.model_name}@"
        if self.documents is not None and name.startswith(before):
            document = checked_name(name.removeprefix(before))
            self.documents.check_ready(document)
            return document
        raise RequestError(
            f"there is no model {quoted(name)} here: {self.model_name} is served", "model_not_found", "model", 404
        )

    def start(self, ask: Ask) -> Events:
        """Put the job into the queue.

        Raises:
            QueueFullError, StoppedError: it was not taken.
        """
        return Events(self.worker, ask, self.limits.request_seconds, self.metrics)

    def close(self) -> None:
        """Tokenize no more; the worker has ended."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        if self.documents is not None:
            self.documents.close()

    async def aside(self, make: Callable[[], Result]) -> Result:
        """What `make` returns, called beside the event loop, one at a time.

        Raises:
            Exception: what `make` raises.
        """
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make)

    def _room(self, prompt_tokens: int, asked: int | None, field: str) -> int:
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
                field,
            )
        return min(left, self.limits.max_new_tokens) if asked is None else asked
