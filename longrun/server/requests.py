"""The bodies of requests. A field that longrun does not act on is refused unless its value changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from longrun.arguments import check_text
from longrun.engine.sampling import SamplingParams
from longrun.errors import InputError
from longrun.server.messages import Message, Strict, Tool
from longrun.server.openai_errors import RequestError, refused_fields
from longrun.text.stream import StopStrings

MAX_STOPS, MAX_LOGPROBS, MAX_PROMPTS = 16, 20, 1000

Kind = TypeVar("Kind", bound="AnswerRequest")
Plain = TypeVar("Plain", bound="Strict")

# Fields of OpenAI's API and the values of them that ask for nothing; what they would ask for is not served.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "audio": (),
    "web_search_options": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
}
# They only say who asks, for accounts that longrun does not keep.
_LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata"})


class StreamOptions(Strict):
    """Attributes: include_usage: a last chunk counts the tokens."""

    include_usage: bool | None = None


class AnswerRequest(Strict):
    """What both kinds of request have in common; None is as if a field were not there."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    looked_at: bool | None = None
    response_format: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"{len(stop):,} stop strings are more than the {MAX_STOPS} that may be given")
        return stop

    @property
    def sampling(self) -> SamplingParams:
        """Raises InputError: a value outside its range."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    @property
    def stops(self) -> tuple[str, ...]:
        """Raises InputError: an empty stop string, or one that is no text."""
        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        StopStrings(stops)
        for text in stops:
            check_text(text, "a stop string")
        return stops

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Raises RequestError: fields that do not go together."""
        if not self.stream and self.stream_options is not None:
            raise RequestError("stream_options need stream: true", "invalid_value", "stream_options")
        if not self.stream and self.return_progress:
            raise RequestError("return_progress needs stream: true", "invalid_value", "return_progress")


class ChatRequest(AnswerRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def callable_tools(self) -> list[dict[str, Any]] | None:
        """The functions that the model is told of; None without any."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def new_tokens(self) -> int | None:
        """How many tokens the answer may have, or None where nothing says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Raises RequestError: fields that do not go together."""
        super().check()
        given = [value for value in (self.max_tokens, self.max_completion_tokens) if value is not None]
        if len(set(given)) > 1:
            raise RequestError(
                f"max_tokens {given[0]:,} and max_completion_tokens {given[1]:,} differ: send one of them",
                "invalid_value", "max_tokens",
            )  # fmt: skip
        if self.max_tokens == 0:
            raise RequestError("max_tokens 0 is too small: it must be at least 1", "invalid_value", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs need logprobs: true", "invalid_value", "top_logprobs")
        if self.callable_tools is not None:
            wrong = {
                "logprobs": self.logprobs,
                "response_format": (self.response_format or {}).get("type", "text") != "text",
                "parallel_tool_calls": self.parallel_tool_calls is False,
            }
            for name in (name for name, given in wrong.items() if given):
                raise RequestError(f"{name} is not served with tools: leave one out", "unsupported_value", name)

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are named in every place; None where nothing is scored."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(AnswerRequest):
    """Body of /v1/completions: one prompt or several, each a text or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Raises RequestError: none, or one that is empty."""
        prompt = self.prompt
        one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if one else list(prompt)
        if not all(prompts) or not prompts:
            raise RequestError("the prompt is empty: send at least one character", "invalid_value", "prompt")
        return prompts

    def check(self) -> None:
        """Raises RequestError: fields that do not go together."""
        super().check()
        if len(self.prompts) > MAX_PROMPTS:
            raise RequestError(
                f"{len(self.prompts):,} prompts are more than the {MAX_PROMPTS:,} of one request: send fewer",
                "invalid_value", "prompt",
            )  # fmt: skip
        if len(self.prompts) > 1 and self.stream:
            raise RequestError(
                f"{len(self.prompts):,} prompts are not streamed in one request: send one, or leave stream out",
                "unsupported_value", "prompt",
            )  # fmt: skip
        if self.looked_at and (len(self.prompts) > 1 or self.max_tokens == 0):
            raise RequestError(
                "looked_at needs a single prompt and max_tokens of at least 1", "invalid_value", "looked_at"
            )


class TokenizeRequest(Strict):
    """Body of /tokenize: a text, a prompt or the messages of a chat.

    Attributes:
        content: a text, in which a control token's spelling is only text; add_special: it begins the sequence.
        prompt, add_special_tokens: the same with control tokens where they are spelled, under vLLM's names.
    """

    content: str | None = None
    add_special: bool | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if sum(each is not None for each in (self.content, self.prompt, self.messages)) != 1:
            raise ValueError("send one of content (a text), prompt (a text with control tokens in it) and messages")
        if self.content is None and self.add_special is not None:
            raise ValueError("add_special goes with content: a chat's template says what stands around messages")
        if self.prompt is None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens goes with prompt: send add_special with content")
        return self


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    tokens: list[int]


def read_chat(body: bytes) -> ChatRequest:
    """Raises RequestError: not JSON, a field that is not served, or a wrong value."""
    return _read(ChatRequest, body)


def read_text(body: bytes) -> TextRequest:
    """Raises RequestError: as `read_chat`."""
    return _read(TextRequest, body)


def read_tokenize(body: bytes) -> TokenizeRequest:
    """Raises RequestError: as `read_chat`."""
    return _validated(TokenizeRequest, body)


def read_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises RequestError: as `read_chat`."""
    return _validated(DetokenizeRequest, body)


def _validated(kind: type[Plain], body: bytes) -> Plain:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refused_fields(error) from None


def _read(kind: type[Kind], body: bytes) -> Kind:
    try:
        fields = _Fields.model_validate_json(body).model_extra or {}
        request = kind.model_validate(_without_neutral(fields, kind), strict=True)
    except ValidationError as error:
        raise refused_fields(error) from None
    try:
        request.sampling, request.stops  # noqa: B018  their errors belong to the body
    except InputError as error:
        raise RequestError(str(error), "invalid_value") from None
    request.check()
    return request


class _Fields(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="allow")


def _without_neutral(fields: dict[str, Any], kind: type[AnswerRequest]) -> dict[str, Any]:
    """The fields but those that ask for nothing and are none of this kind's.

    Raises:
        RequestError: one that asks for something which is not served.
    """
    left = {}
    for name, value in fields.items():
        if value is None or name in _LABELS:
            continue
        if name not in _NEUTRAL or name in kind.model_fields:
            left[name] = value
        elif not _is_one_of(value, _NEUTRAL[name]):
            only = f" but as {_listed(_NEUTRAL[name])}" if _NEUTRAL[name] else ""
            raise RequestError(f"{name} is not served{only}: leave it out", "unsupported_value", name)
    return left


def _is_one_of(value: Any, values: Sequence[Any]) -> bool:
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _listed(values: Sequence[Any]) -> str:
    return " or ".join(json.dumps(value) for value in values)
