"""Whether the passage that an answer of the server looked at most is the one where the answer stands.

    python scripts/quality/looked_at_served.py --json out.json

Facts are planted in Python's documentation, which a server over the demo model reads as a document. Each is asked for
over HTTP. A passage is right where its bytes of the document's text hold the value that was planted.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.long_tasks import Corpus, TaskWriter
from longrun.lab.report_env import environment
from longrun.model.demo import demo_model
from longrun.model.tokenizer import load_tokenizer
from longrun.paths import path_option
from longrun.units import parse_tokens
from scripts.server_process import server

_ANSWER_TOKENS = 24


def facts(length: int, count: int) -> tuple[str, list[tuple[str, str]]]:
    """A text of at most so many tokens, and question and value of each fact in it."""
    writer = TaskWriter(load_tokenizer(demo_model()))
    corpus = Corpus.of_texts(writer.tokenizer, [text for _, text in sorted(pydoc_data.topics.topics.items())], "docs")
    document = writer.test_document(corpus, 7, length, [(number + 0.5) / count for number in range(count)])
    asked = [(writer.tokenizer.decode(one.token_ids).partition(writer.ask)[0], one.value) for one in document.questions]
    return writer.tokenizer.decode(document.token_ids).removeprefix(writer.head), asked


def ask_all(client: httpx.Client, text: str, asked: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """What the answer to each question looked at.

    Raises:
        InputError: the server does not read the text.
    """
    client.put("/documents/facts", content=text.encode(), headers={"Content-Type": "text/plain"})
    while (state := client.get("/documents/facts").json()).get("state") in ("queued", "reading"):
        time.sleep(1)
    if state.get("state") != "ready":
        raise InputError(f"the server did not read the text: {state}")
    read, model = client.get("/documents/facts/text").text, client.get("/v1/models").json()["data"][1]["id"]
    for question, value in asked:
        messages, began = [{"role": "user", "content": question}], time.perf_counter()
        body = {"model": model, "messages": messages, "max_tokens": _ANSWER_TOKENS, "looked_at": True}
        told = client.post("/v1/chat/completions", json=body).json()
        answer, found = told["choices"][0]["message"]["content"], told["looked_at"]
        held = [value in read.encode()[slice(*each["bytes"])].decode(errors="replace") for each in found]
        yield {
            "question": question,
            "value": value,
            "answer": answer,
            "answer_right": value in answer,
            "rank": held.index(True) + 1 if True in held else None,
            "passages": [{name: each[name] for name in ("lines", "bytes", "share", "text")} for each in found],
            "prompt_tokens": told["usage"]["prompt_tokens"],
            "seconds": round(time.perf_counter() - began, 2),
        }


def main() -> int:
    parser = Parser(description="Whether the passage that an answer of the server looked at most holds the answer.")
    parser.add_argument("--length", default="5K", metavar="5K", help="tokens of the text and a question")
    parser.add_argument("--facts", type=COUNT, default=10, metavar="N", help="facts in it, each asked for")
    parser.add_argument("--json", required=True, type=path_option, metavar="FILE")
    arguments = parser.parse_args()
    length = parse_tokens(arguments.length, "--length")
    text, asked = facts(length, arguments.facts)
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="longrun-kept-") as folder,
        server("--ctx", str(length + 256), "--documents", folder) as served,
        httpx.Client(base_url=served.root, timeout=3600) as client,
    ):
        for row in ask_all(client, text, asked):
            rows.append(row)
            print(json.dumps(row), flush=True)
    summary = {
        "questions": len(rows),
        "answered": sum(row["answer_right"] for row in rows),
        "first_passage_holds_the_value": sum(row["rank"] == 1 for row in rows),
    }
    print(json.dumps(summary))
    found = {"environment": environment(), "model": demo_model().name, "summary": summary, "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
