"""Questions in the words of the chat template: answers written by the model, and how likely the right ones are.

The right answer is read first, in one chunk (teacher forcing): its mean loss, and how many of its tokens are the greedy
choice. Where all are, and the answer ends after them, that is what the model writes (rounding aside). Otherwise the
model writes an answer, greedily, until its first line ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from longrun.lab.quality.answers import is_finished
from longrun.lab.quality.asked import MOST_ANSWER_TOKENS, AskedDocument, AskedQuestion
from longrun.lab.quality.eviction import end_prompt
from longrun.lab.quality.measures import Clock, Opened, cache_bytes, read_facts, read_prompt
from longrun.lab.quality.row import Row
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session


def measure_asked(
    runtime: Runtime,
    row: Row,
    opened: Opened,
    documents: Iterable[AskedDocument],
    on_document: Callable[[str], None],
    alone: bool = False,
) -> dict[str, Any]:
    """Read every document, put its questions; `on_document` is called with its name when it is done.

    Args:
        alone: ask without the document as well, which tells what the model knows by heart.

    Returns:
        `items`: one a question (task, kind, document, question, depth, exact, token_accuracy, answer_nll: nats a token
        of the expected answer, the answer expected and what was chosen; with `alone` also `known`: right without the
        document), `kv`: bytes at the end of a prompt, and speeds; of a row that reads sparsely `read_sparsely`.
    """
    session, clock, items, kv = opened.session, Clock(), [], {}
    before = session.prefill_counts
    for document in documents:
        known = [alone and _is_known(runtime, opened, one, clock) for one in document.questions]
        session.rewind(opened.empty)
        read_prompt(session, document.token_ids, clock)
        if row.evicts is not None and row.evicts.at_document:
            end_prompt(session)
        document_end = session.mark()
        for question, by_heart in zip(document.questions, known, strict=True):

            def ask(token_ids: Sequence[int] = question.token_ids) -> None:
                session.rewind(document_end)  # noqa: B023 - called within this turn of the loop
                session.prefill(token_ids, one_by_one=row.select_question, sparse=False)
                end_prompt(session)

            ask()
            kv = kv or cache_bytes(session.cache, row.simulates)
            found = _answer(runtime, session, question, ask, clock, row.select is not None)
            items.append(
                {
                    "task": question.task, **({"kind": question.kind} if question.kind else {}),
                    "document": document.name, "question": question.text, "depth": question.depth, **found,
                    **({"known": by_heart} if alone else {}),
                }
            )  # fmt: skip
        session.release(document_end)
        on_document(document.name)
    return {"items": items, "kv": kv, **read_facts(session, before), **clock.speeds()}


def _is_known(runtime: Runtime, opened: Opened, question: AskedQuestion, clock: Clock) -> bool:
    """Whether the model answers without the document."""
    if not question.alone_ids:
        return False

    def ask() -> None:
        opened.session.rewind(opened.empty)
        opened.session.prefill(question.alone_ids, sparse=False)

    ask()
    return _answer(runtime, opened.session, question, ask, clock)["exact"]


def _answer(
    runtime: Runtime, session: Session, question: AskedQuestion, ask: Callable[[], None], clock: Clock,
    one_by_one: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The session has read the question; `ask` brings it back there."""
    start = time.perf_counter()
    rows = session.score(question.expected_ids, one_by_one=one_by_one)
    assert session.logits is not None
    chosen = torch.cat((rows, session.logits[None])).argmax(dim=-1).tolist()
    targets = torch.tensor(question.expected_ids, device=rows.device)
    nll = -torch.log_softmax(rows, dim=-1).gather(1, targets[:, None]).mean().item()
    clock.note("score", len(chosen), time.perf_counter() - start)
    right = [one == other for one, other in zip(chosen[:-1], question.expected_ids, strict=True)]
    written = question.expected
    ends = chosen[-1] in runtime.eos_token_ids or "\n" in runtime.tokenizer.decode([chosen[-1]])
    if not (all(right) and ends and question.is_right(written)):
        ask()
        written = write_answer(runtime, session, clock)
    return {
        "exact": question.is_right(written), "token_accuracy": sum(right) / len(right), "answer_nll": nll,
        "expected": question.expected, "chosen": written,
    }  # fmt: skip


def write_answer(runtime: Runtime, session: Session, clock: Clock) -> str:
    """What the model writes, greedily, up to the end of its first line, without control tokens."""
    start, ids, text = time.perf_counter(), [], ""
    for token in session.generate(MOST_ANSWER_TOKENS):
        if token in runtime.eos_token_ids:
            break
        ids.append(token)
        text = runtime.tokenizer.decode(ids, skip_special_tokens=True)
        if is_finished(text):
            break
    clock.note("decode", len(ids), time.perf_counter() - start)
    return text.strip()
