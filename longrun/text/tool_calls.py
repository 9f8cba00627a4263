"""Functions that a model may call: the form in which chat templates tell it of them, and the calls in its answer.

Read is what the templates of Qwen 2.5 and 3, Hermes 2 and others ask for: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`, any number of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun.text.chat_template import has_template
from longrun.text.stream import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGIN = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template names tools and asks for calls in the form that is read here."""
    if not has_template(tokenizer):
        return False
    template = tokenizer.get_chat_template(tools=[{}])
    return re.search(r"\btools\b", template) is not None and _BEGIN in template


@dataclass(frozen=True)
class ToolCall:
    """A call in an answer.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


class ToolCallText:
    """Splits an answer that comes in pieces into what it says and what it calls."""

    def __init__(self) -> None:
        self._before, self._text, self._given = StopStrings([_BEGIN]), "", 0

    def feed(self, text: str) -> str:
        """The part of the text so far that is sure to stand before any call."""
        self._text += text
        given = self._before.feed(text)
        self._given += len(given)
        return given

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What else the answer says, and its calls. What only looks like a call is text."""
        rest, said, calls, start = self._text[self._given :], "", [], 0
        for match in _CALL.finditer(rest):
            call = _call(match[1])
            if call is not None:
                said, start = said + rest[start : match.start()], match.end()
                calls.append(call)
        said += rest[start:]
        return said.rstrip() if calls else said, calls


def _call(text: str) -> ToolCall | None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
