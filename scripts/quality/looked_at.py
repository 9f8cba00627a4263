"""Whether the passage that an answer looked at most is the one where the answer stands.

    python scripts/quality/looked_at.py --lengths 4K,8K --json out.json

Facts are planted in a text, half of the texts with generated sentences around needles of one kind, half with Python's
documentation around facts of several kinds. Each is asked for; then `Session.looked_at` names passages. A passage is
right where its tokens hold the value that was planted.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import longrun
from longrun.arguments import COUNT, SHARE
from longrun.cli import Parser, run
from longrun.hub.find import add_model_option
from longrun.hub.names import model_name
from longrun.lab.long_tasks import Corpus, TaskWriter
from longrun.lab.report_env import environment
from longrun.model.choice import choose_model
from longrun.needles.needles import Haystack, build_prompt, make_needles
from longrun.paths import path_option
from longrun.quant.kv_format import KV_FORMATS
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.units import parse_tokens

_ANSWER_TOKENS = 24


def texts(runtime: Runtime, length: int, facts: int) -> Iterator[tuple[str, list[int], list[tuple[Any, str]]]]:
    """Kind, document, and (question's token ids, value) of each fact."""
    depths = [(number + 0.5) / facts for number in range(facts)]
    prompt = build_prompt(
        runtime.tokenizer, Haystack.generated(7), make_needles(facts, f"looked at/{length}"), length, depths
    )
    yield "needles", prompt.document_ids, [(one.token_ids, one.needle.key) for one in prompt.questions]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    corpus = Corpus.of_texts(runtime.tokenizer, topics, "docs")
    document = TaskWriter(runtime.tokenizer).test_document(corpus, 7, length, depths)
    yield "facts", document.token_ids, [(one.token_ids, one.value) for one in document.questions]


def ask(runtime: Runtime, session: Session, before: int, question: Sequence[int], value: str) -> dict[str, Any]:
    """One question over a text of `before` tokens, and what its answer looked at."""
    assert runtime.tokenizer is not None
    session.prefill(question)
    mark, began = session.mark(), time.perf_counter()
    answer = runtime.tokenizer.decode(list(session.generate(_ANSWER_TOKENS)), skip_special_tokens=True)
    answered = time.perf_counter()
    found = session.looked_at(mark, before=before)
    seconds = time.perf_counter() - answered
    ids = session.token_ids
    held = [value in runtime.tokenizer.decode(ids[passage.first : passage.stop]) for passage in found]
    return {
        "value": value,
        "answer": answer,
        "answer_right": value in answer,
        "rank": held.index(True) + 1 if True in held else None,
        "passages": [[passage.first, passage.stop, round(passage.share, 4)] for passage in found],
        "answer_seconds": round(answered - began, 2),
        "look_seconds": round(seconds, 2),
    }


def main() -> int:
    parser = Parser(description="Whether the passage that an answer looked at most holds the answer.")
    add_model_option(parser)
    parser.add_argument("--lengths", default="4K,8K", metavar="4K,8K,...", help="tokens of a text and a question")
    parser.add_argument("--facts", type=COUNT, default=10, metavar="N", help="facts a text, each asked for")
    parser.add_argument("--kv", choices=KV_FORMATS, help="KV page format (default: the budget's)")
    parser.add_argument("--head-map", default="full", metavar="DIR|full|auto")
    parser.add_argument("--retrieval-ratio", type=SHARE, metavar="R", help="share of the map's KV heads to keep")
    parser.add_argument("--json", required=True, type=path_option, metavar="FILE")
    arguments = parser.parse_args()
    lengths = [parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")]
    choice = choose_model(arguments.model, None, arguments.download)
    runtime = longrun.load(
        choice.model_dir, head_map=arguments.head_map, kv_format=arguments.kv, adapter=choice.adapter,
        retrieval_ratio=arguments.retrieval_ratio, ctx=max(lengths) + 256,
    )  # fmt: skip
    rows = []
    for length in lengths:
        for kind, document, questions in texts(runtime, length, arguments.facts):
            session = runtime.new_session()
            session.prefill(document)
            read = session.mark()
            for question, value in questions:
                session.rewind(read)
                row = {"length": length, "kind": kind, **ask(runtime, session, len(document), question, value)}
                rows.append(row)
                print(json.dumps(row), flush=True)
            del session, read
    right = [row for row in rows if row["answer_right"]]
    summary = {
        "questions": len(rows),
        "answered": len(right),
        "first_passage_holds_the_value": sum(row["rank"] == 1 for row in rows),
        "of_those_answered": sum(row["rank"] == 1 for row in right),
    }
    print(json.dumps(summary))
    settings = {
        "model": model_name(choice.model_dir),
        "adapter": None if choice.adapter is None else choice.adapter.name,
        "kv_format": runtime.plan.kv_format,
        "retrieval_heads": runtime.plan.cache.total_retrieval_heads,
        "kv_heads": runtime.config.num_layers * runtime.config.num_kv_heads,
        "reaches": [list(row) for row in runtime.plan.cache.reaches] or None,
    }
    found = {"environment": environment(), "settings": settings, "summary": summary, "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
