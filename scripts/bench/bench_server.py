"""How soon a server answers independent questions over one text, and how soon it notices that a client has left.

The demo model and its text. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import openai

from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.report_env import environment
from longrun.paths import cache_dir
from scripts.demo import write_text
from scripts.server_process import ServedModel, server

QUESTIONS = ("What is a lambda expression?", "What does the pass statement do?", "What does the break statement do?")


def ask(served: ServedModel, content: str) -> dict[str, Any]:
    """Counts and times of one answer."""
    client = openai.OpenAI(base_url=f"{served.root}/v1", api_key="none", timeout=3600)
    began, first = time.perf_counter(), None
    for chunk in client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": content}], max_tokens=20,
        stream=True, stream_options={"include_usage": True},
    ):  # fmt: skip
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - began
        usage = chunk.usage or None
    assert usage is not None and first is not None
    cached = usage.prompt_tokens_details.cached_tokens
    return {"prompt_tokens": usage.prompt_tokens, "cached_tokens": cached, "first_text_s": first}


def seconds_to_notice(served: ServedModel, body: dict[str, Any], leave: Callable[[dict[str, Any]], bool]) -> float:
    """Ask, leave as soon as `leave` says so of /health, and return how long the server still worked on it then."""
    connection = http.client.HTTPConnection(served.root.removeprefix("http://"), timeout=3600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    _wait_for(lambda: leave(served.health()))
    left = time.perf_counter()
    connection.close()
    _wait_for(lambda: served.health()["running"] == 0)
    return time.perf_counter() - left


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 600
    while not condition():
        if time.monotonic() > until:
            raise InputError("the server did not come so far within 600 seconds: see above")
        time.sleep(0.02)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    Parser(prog="python scripts/bench/bench_server.py", description=__doc__).parse_args(argv)
    text = write_text(cache_dir() / "demo").read_text(encoding="utf-8").strip()
    with server() as served:
        asked = [ask(served, f"{text}\n\n{question}") for question in QUESTIONS]
        for one in asked:
            one["share_of_first"] = one["first_text_s"] / asked[0]["first_text_s"]
        writing = seconds_to_notice(
            served, {"prompt": "Once upon a time", "max_tokens": 2000},
            lambda health: health["running"] == 1 and 30 < health["session_tokens"] < 2000,
        )  # fmt: skip
        reading = [
            seconds_to_notice(
                served, {"prompt": f"{number} {text} {text}", "max_tokens": 1},
                lambda health, tokens=tokens: health["running"] == 1 and tokens < health["session_tokens"] < 12_000,
            )
            for number, tokens in ((1, 500), (2, 6000))
        ]  # fmt: skip
    result = {"questions": asked, "left_writing_s": writing, "left_reading_s": reading, "environment": environment()}
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
