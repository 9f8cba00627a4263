"""A server over a tiny model in this process, on a port of its own, and what it is asked."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from tiny_models import save_tokenizer, tiny_model
from transformers import AutoTokenizer

import longrun
from longrun.runtime.runtime import Runtime
from longrun.server.service import Limits
from longrun.server.serving import Serving, listening_socket
from longrun.text.chat_prompt import ChatPrompts

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
CONTEXT = 2000
LIMITS = Limits(max_new_tokens=20, request_seconds=100, body_bytes=10**6)


def save_chat_model(folder: Path, **shape: int) -> Path:
    """A tiny random model whose tokens are characters, with a chat template; greedy answers hardly ever end."""
    model = tiny_model("llama", **shape)
    with torch.no_grad():
        model.lm_head.weight[1:3] = 0  # both end an answer
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def copy_with_plain_template(model: Path, folder: Path) -> Path:
    """A copy of the model with a template that writes nothing but the messages, so that all stand in one text."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


@dataclass
class Served:
    """A running server, and the Python API over the same weights.

    Attributes:
        reference: a runtime whose sessions the server never sees.
    """

    serving: Serving
    reference: Runtime
    root: str

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.root}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        )

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(self.root + path, json=body, timeout=60, **settings)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.root}/health", timeout=60).json()

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        assert self.reference.tokenizer is not None
        return ChatPrompts(self.reference.tokenizer).ids([(m["role"], m["content"]) for m in messages])

    def expected(self, token_ids: Sequence[int], max_new_tokens: int, **settings: Any) -> str:
        """What `Runtime.stream` answers in a session of its own."""
        session = self.reference.new_session()
        session.prefill(token_ids)
        return "".join(self.reference.stream(session, max_new_tokens, **settings))


@contextmanager
def serve(
    folder: Path, limits: Limits = LIMITS, most_waiting: int = 64, key: str | None = None, origins: Sequence[str] = (),
    documents: Path | None = None, **settings: Any,
) -> Iterator[Served]:  # fmt: skip
    """Serve the model until the block ends."""
    given = {"kv_format": "fp32", "device": "cpu", "ctx": CONTEXT, "compiled_kernels": False, "marks": 16, **settings}
    runtime = longrun.load(folder, "cpu", **given)
    serving = Serving(runtime, NAME, limits, most_waiting, key, origins, documents)
    bound = listening_socket("127.0.0.1", 0)
    host, port = bound.getsockname()
    thread = threading.Thread(target=serving.run, args=(bound,))
    thread.start()
    try:
        wait_for(lambda: serving.is_listening)
        yield Served(serving, runtime.derive("full"), f"http://{host}:{port}")
    finally:
        serving.leave()
        thread.join(30)
    assert not thread.is_alive() and not serving.worker.is_alive
