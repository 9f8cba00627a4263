"""Cells of a needle sweep: a document is read, its questions are put, and answers are scored by exact match."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longrun.needles.needles import Haystack, NeedlePrompt, NeedleQuestion, build_prompt, make_needles
from scripts.quality.memory import release_memory

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.session.marks import SessionMark
    from longrun.session.session import Progress, Session

SPARE_TOKENS = 4  # generated beyond the key, to see that the number ends where it should


def ask(
    session: Session, prompt: NeedlePrompt, decode: Callable[[list[int]], str], progress: Progress
) -> list[dict[str, Any]]:
    """Prefill the document once, then put every question to it: greedy answer, and each token right if forced."""
    session.prefill(prompt.document_ids, progress=progress)
    return put_questions(session, prompt.questions, decode, session.mark())


def put_questions(
    session: Session, questions: Sequence[NeedleQuestion], decode: Callable[[list[int]], str],
    document_end: SessionMark, answers_one_by_one: bool = False, questions_one_by_one: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Put every question to the document that ends at the mark `document_end`; see `one_by_one`."""
    answers = []
    for question in questions:
        session.rewind(document_end)
        session.prefill(question.token_ids, one_by_one=questions_one_by_one, sparse=False)
        asked = session.mark()
        generated = list(session.generate(max_new_tokens=len(question.expected_ids) + SPARE_TOKENS))
        session.rewind(asked)
        forced = session.score(question.expected_ids, one_by_one=answers_one_by_one).argmax(dim=-1).tolist()
        right = sum(one == other for one, other in zip(forced, question.expected_ids, strict=True))
        text = decode(generated)
        answers.append(
            {
                "name": question.needle.name,
                "depth": question.depth,
                "at": round(question.at, 4),
                "expected": question.needle.key,
                "generated": text,
                "exact": question.needle.matches(text),
                "token_accuracy": right / len(question.expected_ids),
            }
        )
    return answers


def run_cell(
    runtime: Runtime,
    haystack: Haystack,
    settings: dict[str, Any],
    setting: str,
    length: int,
    depth: float,
    progress: Progress,
) -> dict[str, Any]:
    """One cell in a session of its own: the record for results.json."""
    needles = make_needles(settings["needles"], seed=f"{settings['seed']}/{length}/{depth}")
    prompt = build_prompt(runtime.tokenizer, haystack, needles, length, depth)
    session = make_session(runtime, prompt)
    start = time.perf_counter()
    document_end, read = read_document(session, prompt, progress)
    ways = one_by_one(session, settings)
    answers = put_questions(session, prompt.questions, decoder(runtime), document_end, *ways)
    return record(setting, length, depth, prompt, session, answers, time.perf_counter() - start, read)


def run_document(
    runtime: Runtime,
    haystack: Haystack,
    settings: dict[str, Any],
    setting: str,
    length: int,
    depths: Sequence[float],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """The cells `depths` of one length, all from one document with the needles of all depths, read once.

    The document is the same whatever cells are still wanted. `seconds` of a cell are its questions' alone.
    """
    every = [depth for depth in settings["depths"] for _ in range(settings["needles"])]
    needles = make_needles(len(every), seed=f"{settings['seed']}/{length}/one document")
    prompt = build_prompt(runtime.tokenizer, haystack, needles, length, every)
    session = make_session(runtime, prompt)
    document_end, read = read_document(session, prompt, progress)
    for depth in depths:
        start = time.perf_counter()
        questions = [question for question in prompt.questions if question.depth == depth]
        answers = put_questions(session, questions, decoder(runtime), document_end, *one_by_one(session, settings))
        cell = record(setting, length, depth, prompt, session, answers, time.perf_counter() - start, read)
        yield cell | {"shared_document": {"needles": len(every), "depths": len(settings["depths"])}}


def one_by_one(session: Session, settings: dict[str, Any]) -> tuple[bool, bool]:
    """Whether right answers, and questions, are read token by token, which is how selected pages are read."""
    selects = session.plan.attention.selection is not None
    return selects, selects and bool(settings["select_question"])


def make_session(runtime: Runtime, prompt: NeedlePrompt) -> Session:
    """A session for the prompt, once nothing is left of those before it (pools, pinned memory)."""
    release_memory()
    return runtime.new_session(capacity=capacity_for(prompt.num_tokens))


def decoder(runtime: Runtime) -> Callable[[list[int]], str]:
    return lambda ids: runtime.tokenizer.decode(ids, skip_special_tokens=True)


def read_document(session: Session, prompt: NeedlePrompt, progress: Progress) -> tuple[SessionMark, dict[str, Any]]:
    """The mark at the document's end, how long reading took (the mark waits for the GPU), and where it is read sparsely
    how much of it and what that read."""
    start = time.perf_counter()
    session.prefill(prompt.document_ids, progress=progress)
    document_end = session.mark()
    seconds = time.perf_counter() - start
    speed = len(prompt.document_ids) / seconds
    read = {"prefill_seconds": round(seconds, 3), "prefill_tokens_per_s": round(speed, 1)}
    counts = session.prefill_counts
    if counts is not None:
        read["read_sparsely"] = {"sparse_tokens": session.sparse_tokens, **counts.to_dict()}
    return document_end, read


def record(
    setting: str, length: int, depth: float, prompt: NeedlePrompt, session: Session, answers: list[dict[str, Any]],
    seconds: float, read: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A finished cell as results.json holds it."""
    return {
        "setting": setting,
        "length": length,
        "depth": depth,
        "score": sum(answer["exact"] for answer in answers) / len(answers),
        "token_accuracy": sum(answer["token_accuracy"] for answer in answers) / len(answers),
        "prompt_tokens": prompt.num_tokens,
        "seconds": round(seconds, 3),
        **read,
        "cache_bytes": session.cache_bytes,
        "needles": answers,
    }


def capacity_for(prompt_tokens: int) -> int:
    """Tokens a session needs for a prompt and its answer (a digit is at most two tokens)."""
    return prompt_tokens + 32
