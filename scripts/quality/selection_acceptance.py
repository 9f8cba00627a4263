"""How often a token that reads selected pages is the one that all pages give, by length and pages, with the product's
own decode steps.

    python scripts/quality/selection_acceptance.py --model FOLDER_OR_FILE --lengths 8K --budgets 26%,6% --json out.json

A document of real code is read once and its session saved; every number of pages goes on from there, token by token:

* `written`: the tokens that decoding all pages writes after the document, given to the selected steps one by one.
  *Same* is how often the likeliest token is the given one, *run* how many in a row are, of the next eight: what a draft
  of eight tokens would bring;
* `text` and `answers`: the document's own last tokens, and right answers to questions about it
  (`longrun/lab/quality/answered.py`); `kept` counts the answers that are still the likeliest in each token, of those
  that decoding all pages has right. Questions are read in chunks, so exactly; with --select-question token by token.

`ms` is the time of a token of text, its logits copied.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.lab.quality.answered import AnsweredText, answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.quality.judged import Judged, Known
from longrun.lab.selection_rules import PAGE, pages_of
from longrun.paths import path_option
from longrun.plan.pages_read import selection_facts
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.selection_spec import DEFAULT_NEWEST
from scripts.quality.memory import release_memory
from scripts.quality.selection_runs import (
    add_model_options,
    decoded_rows,
    load_unselected,
    run_facts,
    with_last_rows,
)

DRAFT = 8


@dataclass(frozen=True)
class Found:
    """What one way of decoding predicts: int64 [tokens] of those written, float32 [rows, vocab_size] of the text's
    rows, and milliseconds a token of text."""

    written: Tensor
    log_probs: Tensor
    ms: float


def write(session: Session, count: int) -> list[int]:
    """What the session writes next; it is as before."""
    before = session.mark()
    written = list(session.generate(count, eos=False))
    session.rewind(before)
    return written


def predictions(session: Session, text: AnsweredText, written: Sequence[int], select_question: bool) -> Found:
    """Predict what was written and the text's rows one by one.

    Args:
        session: stands at the first of the text's rows, that token included.
    """
    before = session.mark()
    likeliest = session.score(written, one_by_one=True).argmax(-1).cpu()
    session.rewind(before)
    session.release(before)
    return Found(likeliest, *decoded_rows(session, text, select_question))


def mean_run(same: Tensor) -> float:
    """Of the next DRAFT tokens at every place, how many agree before the first that does not; bool [tokens]."""
    return same.unfold(0, DRAFT, 1).long().cumprod(-1).sum(-1).double().mean().item()


def measure(
    base: Runtime, texts: Sequence[AnsweredText], budgets: Sequence[str], args: Any
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for all pages, and one for every budget."""
    pages, known = len(texts[0].ids) // PAGE, Counter[str]()
    counts = {budget: max(DEFAULT_NEWEST + 1, pages_of(budget, pages)) for budget in budgets}
    rows: list[dict[str, Any]] = [{"budget": "all", "pages": pages, "ms": []}]
    rows += [{"budget": name, "pages": count, "ms": [], "same": []} for name, count in counts.items() if count < pages]
    judged = [Judged() for _ in rows]
    capacity = max(len(text.ids) for text in texts) + args.tokens + 1
    for text in texts:
        text = with_last_rows(text, args.tokens)
        with TemporaryDirectory() as folder:
            runtime = base.derive(ctx=capacity)
            session = runtime.new_session()
            session.prefill(text.ids[: int(text.text_rows[0]) + 1])
            session.save(folder)
            written = write(session, args.tokens)
            dense = predictions(session, text, written, args.select_question)
            full = Known.of(text, dense.log_probs)
            known.update(full.tasks())
            rows[0]["ms"].append(dense.ms)
            for row, own in zip(rows[1:], judged[1:], strict=True):
                del session, runtime
                release_memory()
                runtime = base.derive(ctx=capacity, select=row["pages"], select_from=0)
                session = runtime.load_session(folder)
                row["selection"] = selection_facts(session.plan)
                found = predictions(session, text, written, args.select_question)
                row["ms"].append(found.ms)
                row["same"].append(found.written == torch.tensor(written))
                own.add(full, found.log_probs)
            del session, runtime
            release_memory()
    for row, own in zip(rows[1:], judged[1:], strict=True):
        same = row.pop("same")
        row |= {
            "same_written": torch.cat(same).double().mean().item(),
            "run_written": sum(map(mean_run, same)) / len(same), **own.row(known),
        }  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_model_options(parser)
    parser.add_argument("--tokens", type=COUNT, default=128, help="written, and of the document's end")
    parser.add_argument("--budgets", default="50%,26%,13%,6%", help="pages of a head, or shares of all")
    parser.add_argument("--select-question", action="store_true", help="questions read selected pages, too")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args(argv)
    lengths, base = load_unselected(args)
    result: dict[str, Any] = {
        "benchmark": "selection acceptance", **run_facts(args, base), "draft": DRAFT,
        "select_question": args.select_question, "lengths": [],
    }  # fmt: skip
    for length in lengths:
        began = time.perf_counter()
        texts = list(answered_texts(base.tokenizer, standard_library()[1::2], length, args.texts, seed=0))
        rows = measure(base, texts, args.budgets.split(","), args)
        part = {"length": length, "rows": rows, "seconds": time.perf_counter() - began}
        result["lengths"].append(part)
        print(f"\n{length:,} tokens, {rows[0]['pages']:,} pages, {part['seconds']:.0f} s", flush=True)
        for row in rows:
            line = f"{row['budget']:>5} {row['pages']:6} pages, {min(row['ms']):8.2f} ms a token"
            if "kept" in row:
                line += f", kept {row['kept']} of {row['known']}"
                names = ("same_written", "run_written", "same_text", "same_answers", "kl_text", "kl_answers")
                line += "".join(f", {name} {row[name]:.3f}" for name in names)
            print(line, flush=True)
        if args.json:
            args.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
