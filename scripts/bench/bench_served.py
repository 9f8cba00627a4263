"""What HTTP adds to a token, and how soon a second question over a long text is answered, beside the Python API.

    python scripts/bench/bench_served.py --model FILE --yarn 4 --ctx 110K --tokens 100K --json out.json

The text is code of the standard library. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import openai
from transformers import PreTrainedTokenizerBase

import longrun
from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.code_source import source_facts, standard_library
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.text.encoder import TextEncoder
from longrun.units import parse_tokens
from scripts.server_process import ServedModel, server


def code_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Modules of the standard library one after the other, of about so many tokens."""
    ids: list[int] = []
    encoder = TextEncoder(tokenizer)
    for file in standard_library():
        ids += encoder.ids(f"# file: {file.name}\n{file.text}\n\n")
        if len(ids) >= tokens:
            break
    return tokenizer.decode(ids[:tokens])


def over_http(served: ServedModel, prompt: str, new_tokens: int) -> dict[str, Any]:
    """Counts and times of one streamed completion."""
    client = openai.OpenAI(base_url=f"{served.root}/v1", api_key="none", timeout=3600)
    model = client.models.list().data[0].id
    began, times, usage = time.perf_counter(), [], None
    for chunk in client.completions.create(
        model=model, prompt=prompt, max_tokens=new_tokens, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices and chunk.choices[0].text:
            times.append(time.perf_counter())
        usage = chunk.usage or usage
    assert usage is not None
    return {
        "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "first_text_s": times[0] - began, "new_tokens": usage.completion_tokens,
        "ms_per_token": 1e3 * (times[-1] - times[0]) / (usage.completion_tokens - 1),
    }  # fmt: skip


def by_python(runtime: longrun.Runtime, prompts: Sequence[str], new_tokens: int) -> list[dict[str, Any]]:
    """The same by `Runtime.stream`, each prompt in a session of its own."""
    found, encoder = [], TextEncoder(runtime.tokenizer)
    for prompt in prompts:
        session = runtime.new_session()
        ids = encoder.ids(prompt)
        began = time.perf_counter()
        session.prefill(ids)
        times = [time.perf_counter() for _ in runtime.stream(session, max_new_tokens=new_tokens)]
        written = session.seq_len - len(ids) + 1  # the last one is in no page yet
        found.append({
            "prompt_tokens": len(ids), "first_text_s": times[0] - began, "new_tokens": written,
            "ms_per_token": 1e3 * (times[-1] - times[0]) / (written - 1),
        })  # fmt: skip
        del session  # its memory, before the next one's
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Server first, then the Python API, with the same settings."""
    settings = {"ctx": args.ctx, "weights": args.weights, "yarn": args.yarn}
    options = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    runtime = longrun.load(args.model, ctx=args.ctx, weight_format=args.weights, yarn=args.yarn)
    text = code_text(runtime.tokenizer, parse_tokens(args.tokens, "--tokens"))
    prompts = [f"{text}\n\n# file: part_{number}.py\nimport" for number in range(args.repeats + 1)]
    api = by_python(runtime, prompts[:2], args.new_tokens)
    plan = runtime.plan
    del runtime
    with server("--model", str(args.model), *options) as served:
        http = [over_http(served, prompt, args.new_tokens) for prompt in prompts]
    return {"benchmark": "served", "model": model_name(Path(args.model)), "settings": settings,
            "weights": plan.weight_format, "kv": plan.kv_format,
            "python": api, "http": http, "code": source_facts(), "environment": environment()}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = Parser(prog="python scripts/bench/bench_served.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=path_option)
    add_yarn_option(parser)
    parser.add_argument("--ctx", default="110K")
    parser.add_argument("--tokens", default="100K", help="of the text")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--new-tokens", type=COUNT, default=256)
    parser.add_argument("--repeats", type=COUNT, default=3, help="questions after the first")
    parser.add_argument("--json", type=path_option, help="write the result here as well")
    args = parser.parse_args(argv)
    result = measure(args)
    for kind in ("python", "http"):
        for row in result[kind]:
            print(kind, {key: round(value, 3) for key, value in row.items()})
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line)
    print(line)


if __name__ == "__main__":
    run(main)
