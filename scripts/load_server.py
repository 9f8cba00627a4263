"""Many requests from several clients at once, with clients that leave, bad bodies and prompts that are too long in
between: every answer must be the Python API's, none may be lost, and the server's memory must not grow.

The last line of stdout is one JSON object. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import openai
import psutil

import longrun
from longrun.arguments import COUNT, SEED
from longrun.cli import Parser, run
from longrun.lab.report_env import environment
from longrun.needles.needles import generate_sentences
from longrun.runtime.runtime import Runtime
from longrun.text.chat_prompt import ChatPrompts
from scripts.server_process import planted_folder, server

CONTEXT = 3000
# Exact pages: prompts are read in other steps than in the reference, and quantized, rounding may become a step of the
# grid and turn a tie of two tokens around.
KV = "fp32"
KINDS = (
    "chat",
    "chat",
    "chat",
    "text",
    "text",
    "text",
    "stream",
    "stream",
    "leaves",
    "leaves early",
    "bad",
    "too long",
)
_WARM_SHARE = 0.25  # of the requests, before memory is measured for the first time
_BAD = (
    b"{", b'{"prompt": 7}', b'{"prompt": "a", "n": 3}', b'{"prompt": "a", "max_tokens": "x"}', b'{"messages": []}',
    b"\xff\xfe",
)  # fmt: skip


@dataclass
class Load:
    """One run over a server.

    Attributes:
        root: the server's address, without /v1.
        reference: a runtime over the same model in this process; it answers one request at a time.
        faults: what went wrong, in sentences.
        done: how many requests of each kind were made.
    """

    root: str
    reference: Runtime
    model_name: str
    context: int = CONTEXT
    faults: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, requests: int, clients: int, seed: int, sample: Callable[[], None] = lambda: None) -> None:
        """Make the requests, `clients` of them at a time.

        Args:
            sample: called once after the first quarter, and once at the end, when no request is being made.
        """
        numbers, warm = list(range(requests)), int(requests * _WARM_SHARE)
        for some in (numbers[:warm], numbers[warm:]):
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda number: self._one(random.Random(f"{seed} {number}")), some))
            self._check_idle()
            sample()

    def _one(self, draw: random.Random) -> None:
        kind = draw.choice(KINDS)
        try:
            self._make(kind, draw)
        except Exception as error:
            self._fault(f"{kind}: {type(error).__name__}: {error}")
        with self._lock:
            self.done[kind] += 1

    def _make(self, kind: str, draw: random.Random) -> None:
        prompt = self._prompt(draw)
        settings: dict[str, Any] = {"max_tokens": draw.randrange(1, 25)}
        if draw.random() < 0.3:
            settings |= {"temperature": 1.5, "seed": draw.randrange(10**6)}
        if kind == "bad":
            self._expect_refusal(draw.choice(_BAD), 400)
        elif kind == "too long":
            self._expect_refusal(json.dumps({"prompt": "word " * (self.context + 1)}).encode(), 400)
        elif kind == "leaves":
            chunks = self._client().completions.create(
                model=self.model_name, prompt=prompt, max_tokens=400, stream=True
            )
            next(iter(chunks))
            chunks.close()
        elif kind == "leaves early":
            body = {"prompt": prompt, "max_tokens": 400}
            with suppress(httpx.ReadTimeout):
                httpx.post(
                    f"{self.root}/v1/completions", json=body, timeout=httpx.Timeout(60, read=draw.uniform(0.01, 0.5))
                )
        elif kind == "chat":
            answer = self._client().chat.completions.create(
                model=self.model_name, messages=[{"role": "user", "content": prompt}], **settings
            )
            self._compare(prompt, True, settings, answer.choices[0].message.content)
        elif kind == "text":
            answer = self._client().completions.create(model=self.model_name, prompt=prompt, **settings)
            self._compare(prompt, False, settings, answer.choices[0].text)
        else:
            chunks = self._client().completions.create(model=self.model_name, prompt=prompt, stream=True, **settings)
            self._compare(prompt, False, settings, "".join(chunk.choices[0].text for chunk in chunks))

    def _prompt(self, draw: random.Random) -> str:
        """A short text, or a question after one of three long ones."""
        if draw.random() < 0.3:
            return " ".join(islice(generate_sentences(draw.randrange(10**6)), draw.randrange(1, 4)))
        text = " ".join(islice(generate_sentences(draw.randrange(3)), 80))[: self.context // 3]
        return f"{text} {next(iter(generate_sentences(draw.randrange(10**6))))}"

    def _compare(self, prompt: str, chat: bool, settings: dict[str, Any], answer: str) -> None:
        expected = self._expected(prompt, chat, settings)
        if answer != expected:
            self._fault(f"the answer to {prompt[-40:]!r} is {answer!r}, the Python API's {expected!r}")

    def _expected(self, prompt: str, chat: bool, settings: dict[str, Any]) -> str:
        with self._lock:  # one session at a time
            session, tokenizer = self.reference.new_session(), self.reference.tokenizer
            assert tokenizer is not None
            ids = ChatPrompts(tokenizer).ids([("user", prompt)]) if chat else self.reference.encode(prompt)
            session.prefill(ids)
            given = {name: value for name, value in settings.items() if name != "max_tokens"}
            return "".join(self.reference.stream(session, settings["max_tokens"], **given))

    def _expect_refusal(self, body: bytes, status: int) -> None:
        answer = httpx.post(
            f"{self.root}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=120
        )
        if answer.status_code != status or not answer.json()["error"]["message"]:
            self._fault(f"the body {body[:60]!r} got status {answer.status_code} instead of {status}")

    def _check_idle(self) -> None:
        """Those who left are forgotten soon."""
        until = time.monotonic() + 20
        while True:
            health = httpx.get(f"{self.root}/health", timeout=60).json()
            if (health["running"], health["waiting"]) == (0, 0):
                return
            if time.monotonic() > until:
                self._fault(f"after all requests the server says {health}")
                return
            time.sleep(0.1)

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=300)

    def _fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run against a server of its own; returns the exit status."""
    parser = Parser(prog="python scripts/load_server.py", description=__doc__)
    parser.add_argument("--requests", type=COUNT, default=200, metavar="N", help="default: 200")
    parser.add_argument("--clients", type=COUNT, default=8, metavar="N", help="at a time (default: 8)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="default: 0")
    args = parser.parse_args(argv)
    memory: list[int] = []
    started = time.perf_counter()
    with planted_folder() as model, server("--model", str(model), "--ctx", str(CONTEXT), "--kv", KV) as served:
        load = Load(served.root, longrun.load(model, ctx=CONTEXT, kv_format=KV), model.name)
        of_server = psutil.Process(served.process.pid)
        load.run(args.requests, args.clients, args.seed, lambda: memory.append(of_server.memory_info().rss))
    growth = memory[1] / memory[0] - 1
    if growth > 0.02:
        load.faults.append(
            f"the server's memory grew by {100 * growth:.1f}%, from {memory[0]:,} to {memory[1]:,} bytes"
        )
    for fault in load.faults:
        print(fault)
    result = {
        "requests": args.requests, "clients": args.clients, "kinds": dict(sorted(load.done.items())),
        "faults": load.faults, "resident_bytes": memory, "memory_growth": growth,
        "seconds": time.perf_counter() - started, "environment": environment(),
    }  # fmt: skip
    print(json.dumps(result))
    return 1 if load.faults else 0


if __name__ == "__main__":
    run(main)
