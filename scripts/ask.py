"""Asks a running server (`python -m longrun.server`) through OpenAI's client: texts and questions, one after another.

Answers go to stdout as they come; what was read, and how soon the first token came, goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openai

from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.documents.find import read_documents
from longrun.errors import InputError


def ask(client: openai.OpenAI, model: str, texts: Sequence[str], question: str, max_tokens: int) -> None:
    """Print the answer to a question after the texts.

    Raises:
        InputError: the server refuses it, or leaves.
    """
    message = {"role": "user", "content": "\n\n".join([*texts, question])}
    began, first = time.perf_counter(), None
    try:
        chunks = client.chat.completions.create(
            model=model, messages=[message], max_tokens=max_tokens, stream=True, stream_options={"include_usage": True},
            stop=["\n\n"],
        )  # fmt: skip
        for chunk in chunks:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first = first or time.perf_counter() - began
                print(text, end="", flush=True)
            if chunk.usage is not None:
                cached = chunk.usage.prompt_tokens_details.cached_tokens
                told = f"{chunk.usage.prompt_tokens:,} prompt tokens, {cached:,} of them read before"
                print()
                print(f"{told}; first text after {first or 0:.2f} s", file=sys.stderr)
    except openai.APIError as error:
        raise InputError(f"the server refused: {error.message}") from error


def main() -> None:
    """Ask every question."""
    parser = Parser(prog="python scripts/ask.py", description=__doc__)
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--file", action="append", default=[], metavar="F", help="text to read before it")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=COUNT, default=120, metavar="N", help="of an answer (default: 120)")
    args = parser.parse_args()
    texts = [document.shown for document in read_documents(args.file).texts] if args.file else []
    client = openai.OpenAI(base_url=args.url, api_key=os.environ.get("LONGRUN_API_KEY", "none"), timeout=24 * 3600)
    try:
        model = client.models.list().data[0].id
    except openai.APIError as error:
        raise InputError(
            f"no server answers at {args.url} ({error.message}): start one, or name it by --url"
        ) from error
    for question in args.questions:
        ask(client, model, texts, question, args.max_tokens)


if __name__ == "__main__":
    run(main)
