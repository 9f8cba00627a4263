"""Chat templates of checkpoints, rendered with bounds on time, memory and size, in the sandbox and in a process of
their own (see `longrun.text.template_child`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.errors import CheckpointError, InputError, LongrunError, quoted, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS, WALL_SECONDS = 2, 60  # a template takes milliseconds; a machine under load may take seconds to start it
MEMORY_BYTES = 512 * 2**20
MAX_CHARS = 2**20
_KEPT_CHARS = 2**16  # of a request whose answer is kept in memory

_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")

Chat = Sequence[tuple[str, str]]


class TemplateError(LongrunError):
    """A template that refuses the messages it was given, or that cannot be rendered; the message is its own."""


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    add_generation_prompt: bool = True,
    options: Mapping[str, Any] | None = None,
    now: float | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    more: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """The chats as the tokenizer's template writes them.

    Args:
        chats: each a list of (role, content).
        add_generation_prompt: write what begins an answer, too.
        options: JSON values of names that the template itself asks for, such as `enable_thinking`.
        now: the time that a template may write, in seconds since 1970; None is the clock's.
        tools: JSON of functions that the model may call.
        more: other fields of each message; with it there is a single chat.

    Raises:
        InputError: an option that the template does not know, or a name that is not for options.
        TemplateError: the template does not take the messages or is no template.
        CheckpointError: it ran for longer than it may, or needed more memory or wrote more text than it may.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise TemplateError(str(error)) from error
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    for name in options or {}:
        if name in _RESERVED or name in names or not re.search(rf"\b{re.escape(name)}\b", template):
            raise InputError(
                f"the model's chat template has no option {quoted(name)}: leave it out, or look the name up in the "
                f"template"
            )
    others = 0 if tools is None and more is None else len(json.dumps([tools, more]))
    request = {
        "template": template,
        "names": {**names, **(options or {}), **({"tools": tools} if tools else {})},
        "chats": [
            {
                "messages": [
                    {"role": role, "content": content, **fields}
                    for (role, content), fields in zip(chat, more or [{}] * len(chat), strict=True)
                ],
                "add_generation_prompt": add_generation_prompt,
            }
            for chat in chats
        ],
        "now": now,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        "max_chars": MAX_CHARS + 4 * (sum(len(content) for chat in chats for _, content in chat) + others),
    }
    answer = json.loads(_in_child(json.dumps(request)))
    if "texts" in answer:
        return answer["texts"]
    if "too_much" in answer:
        raise CheckpointError(
            f"the checkpoint's chat template {answer['too_much']} for a message of a few characters: it is damaged or "
            f"hostile; restore the tokenizer's files, or remove the template"
        )
    raise TemplateError(shortened(answer["refused"], 200))


def cut_at(text: str, marker: str) -> tuple[str, str]:
    """What a template wrote before and after a message that is `marker`.

    Raises:
        CheckpointError: it shows the message not at all, or more than once.
    """
    parts = text.split(marker)
    if len(parts) != 2:
        raise CheckpointError(
            f"the checkpoint's chat template shows a message {len(parts) - 1} times instead of once: it cannot be "
            f"used for a chat that is read piece by piece"
        )
    return parts[0], parts[1]


def _in_child(request: str) -> str:
    """The child's answer, from memory where a short request was made before: the same question has the same one, which
    spares the start of a process."""
    return _kept_answer(request) if len(request) <= _KEPT_CHARS else _answer(request)


@lru_cache(maxsize=32)
def _kept_answer(request: str) -> str:
    return _answer(request)


def _answer(request: str) -> str:
    found = [find_spec(package) for package in ("jinja2", "markupsafe")]
    folders = sorted({str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin})
    child = str(Path(__file__).with_name("template_child.py"))
    code = f"import sys, runpy; sys.path += {folders!r}; runpy.run_path({child!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, encoding="utf-8", timeout=WALL_SECONDS,
            start_new_session=True, check=False,
        )  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"no process could be started to render the chat template in: {error}") from error
    except subprocess.TimeoutExpired:
        return _too_much(f"ran for more than {WALL_SECONDS} seconds")
    if done.returncode < 0:  # a signal: of the limit on processor time, of the system's for memory, or a crash
        return _too_much(f"ran for more than {CPU_SECONDS} seconds of processor time, or crashed")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return _too_much(f"ended its process ({shortened(' '.join(last), 160)})")
    return done.stdout


def _too_much(what: str) -> str:
    return json.dumps({"too_much": what})
