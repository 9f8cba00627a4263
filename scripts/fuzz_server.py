"""Damages the bodies of requests to a server: each must be answered or refused in OpenAI's shape, and soon.

The last line of stdout is one JSON object. Exit status 1 where a body met a defect (status 500), or no answer in time.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx

from longrun.arguments import COUNT, SEED
from longrun.cli import Parser, run
from scripts.fuzz_mutations import damage_bytes, damage_json
from scripts.server_process import planted_folder, server

CONTEXT = 600
SECONDS = 60.0
_USER: dict[str, Any] = {"role": "user", "content": "Where is the red house?"}
_CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"what": "house"}'}}
_FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": {"type": "object", "required": ["where"]}}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": [_USER], "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {
            "model": "planted", "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
            "return_progress": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "seed": 1,
            "logprobs": True, "top_logprobs": 2, "stop": ["."], "repetition_penalty": 1.1,
            "messages": [{"role": "system", "content": "Be brief."}, _USER, {"role": "assistant", "content": "Here."},
                         {"role": "user", "content": [{"type": "text", "text": "And who"}]}],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [_USER, {"role": "assistant", "tool_calls": [_CALL]},
                         {"role": "tool", "tool_call_id": "1", "content": "It burned."}],
            "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
            "tool_choice": "auto", "max_tokens": 3, "looked_at": True,
        },
    ),
    ("/v1/chat/completions", {"messages": [_USER], "max_tokens": 3, "looked_at": True, "response_format": _FORM}),
    ("/v1/completions", {"prompt": "The old man", "max_tokens": 3, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "stop": "x", "n": 1, "user": "me"}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1, "echo": True, "logprobs": 1, "seed": 1}),
    ("/tokenize", {"content": "The old man", "add_special": True}),
    ("/tokenize", {"prompt": "The old man</s>", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/tokenize", {"messages": [_USER]}),
)  # fmt: skip


def fuzz(root: str, cases: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Send damaged bodies to the server at `root`; returns what went wrong, and how many got each status."""
    faults, seen = [], Counter[str]()
    with httpx.Client(base_url=root, timeout=SECONDS) as client:
        for number in range(cases):
            rng = random.Random(f"{seed} {number}")
            path, body = rng.choice(BODIES)
            content, what = json.dumps(body).encode(), "nothing"
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                content, what = damage(rng, content)
            try:
                answer = client.post(path, content=content, headers={"content-type": "application/json"})
            except httpx.HTTPError as error:
                faults.append(f"case {number} ({path}, {what}): {type(error).__name__}: {error}")
                continue
            seen[str(answer.status_code)] += 1
            if (wrong := wrong_with(answer)) is not None:
                faults.append(f"case {number} ({path}, {what}): {wrong}")
    return faults, seen


def damage(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """One fault of a body: mostly another value somewhere in it, as long as it is JSON."""
    if rng.random() < 0.75:
        try:
            data = json.loads(content)
            if data and isinstance(data, dict | list):
                return damage_json(rng, content)
        except (ValueError, RecursionError):
            pass  # damaged before
    return damage_bytes(rng, content)


def wrong_with(answer: httpx.Response) -> str | None:
    """What is wrong with a response, or None."""
    if answer.status_code >= 500:
        return f"status {answer.status_code}: {answer.text[:200]}"
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        errors = [found["error"] for line in lines[:-1] if "error" in (found := json.loads(line))]
        if lines[-1:] != ["[DONE]"]:
            return "a stream without an end"
        return f"a stream with the error {errors[0]}" if errors and errors[0]["type"] == "server_error" else None
    told = answer.json()
    if answer.status_code == 200:
        return None if "error" not in told else "an error with status 200"
    error = told["error"]
    shaped = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    return None if shaped and error["message"] else f"a refusal of another shape: {answer.text[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run against a server of its own; returns the exit status."""
    parser = Parser(prog="python scripts/fuzz_server.py", description=__doc__)
    parser.add_argument("--cases", type=COUNT, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="default: 0")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    with planted_folder() as model, server("--model", str(model), "--ctx", str(CONTEXT)) as served:
        faults, seen = fuzz(served.root, args.cases, args.seed)
        if served.health()["status"] != "ok":
            faults.append("the server is not well afterwards")
    for fault in faults:
        print(fault)
    result = {"cases": args.cases, "faults": faults, "statuses": dict(sorted(seen.items()))}
    print(json.dumps(result | {"seconds": time.perf_counter() - started}))
    return 1 if faults else 0


if __name__ == "__main__":
    run(main)
