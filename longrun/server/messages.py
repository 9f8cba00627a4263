"""The messages of a request, and the functions that an answer may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from longrun.errors import quoted

_OBJECT = TypeAdapter(dict[str, Any])


class Strict(BaseModel):
    """Of exactly these fields and types."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(Strict):
    """One of several texts of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What an assistant called."""

    name: str
    arguments: str

    @property
    def argument_values(self) -> dict[str, Any]:
        """Raises ValueError: they are no JSON object."""
        try:
            return _OBJECT.validate_json(self.arguments)
        except ValidationError:
            raise ValueError(f"the arguments {quoted(self.arguments)} are no JSON object") from None

    @model_validator(mode="after")
    def _json_arguments(self) -> CalledFunction:
        self.argument_values  # noqa: B018  its errors belong to the body
        return self


class MessageCall(Strict):
    """A call in a message of an assistant."""

    id: str | None = None
    type: Literal["function"]
    function: CalledFunction


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content: send a text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are an assistant's: leave them out")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of role tool, and no other, has a tool_call_id")
        return self

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        """Clients send an answer back with fields that are null; a part that is no text gets a sentence of its own."""
        if not isinstance(value, dict):
            return value
        content = value.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"a part of type {quoted(kind)} is not served: send text")
        return {name: each for name, each in value.items() if each is not None}

    @property
    def pair(self) -> tuple[str, str]:
        """(role, content) as chat templates know them: several texts stand on lines of their own."""
        role, content = "system" if self.role == "developer" else self.role, self.content or ""
        return role, content if isinstance(content, str) else "\n".join(part.text for part in content)

    @property
    def more(self) -> dict[str, Any]:
        """The fields that only calls of functions have, as chat templates know them."""
        told: dict[str, Any] = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        if self.tool_calls:
            told["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.argument_values},
                }
                for call in self.tool_calls
            ]
        return told


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    """One of the functions of a request."""

    type: Literal["function"]
    function: Function
