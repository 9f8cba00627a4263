"""One row of a comparison at one length: documents read, questions answered, texts predicted, bytes counted.

A document is read once; every question starts from a rewind to its end. Then the right answer is read in one chunk
(token by token in a row that selects pages) and every token of it compared with the greedy choice before it (teacher
forcing): as long as every choice is right, that is what greedy generation gives, so one reading tells both exact match
(all choices right, and no digit after them) and the share of tokens that are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrun.cache.dual import DualCache
from longrun.files.whole_file import write_whole
from longrun.lab.evicting_cache import EvictingCache
from longrun.lab.quality import simulation
from longrun.lab.quality.eviction import end_prompt, make_session
from longrun.lab.quality.formats import SimulatedFormat
from longrun.lab.quality.row import Row
from longrun.lab.quality.tasks import TEXT_TASK, TaskDocument
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session, SessionMark
from longrun.specs.prefill_counts import PrefillCounts

PIECE = 32  # tokens scored at a time: with INT4 pages a piece sees its own keys exact, with TOVA it is evicted whole
BLOCK = 32  # predicted tokens that make one item of the text task
SPARE_TOKENS = 64


@dataclass(frozen=True)
class Opened:
    """A session of a row, used by one group of tasks after another, and the mark at its beginning."""

    session: Session
    empty: SessionMark

    @classmethod
    def of(cls, runtime: Runtime, row: Row, length: int) -> Opened:
        """See `open_session`."""
        session = open_session(runtime, row, length)
        return cls(session, session.mark())


def open_session(runtime: Runtime, row: Row, length: int) -> Session:
    """An empty session of the row for prompts of `length` tokens and their answers.

    Raises:
        InputError: a simulated format that this model or runtime cannot serve.
        PlanError: it does not fit in the budget.
    """
    capacity = length + SPARE_TOKENS
    evicts = row.evicts
    if row.simulates is not None:
        return simulation.make_session(runtime, row.simulates, capacity)
    if evicts is None:
        return runtime.new_session(capacity)
    return make_session(runtime, evicts.method, evicts.keep_tokens(length), capacity)


def cache_bytes(cache: DualCache | EvictingCache, simulates: SimulatedFormat | None = None) -> dict[str, int]:
    """Bytes measured from the cache's tensors: of what is in use, of what is allocated, and the most there ever were.

    In use are, of a dual cache, the pages stored with their index and table entries, tails and sink pages whole, and
    ring slots that hold a token; of an evicting one the tokens kept. Where the pages simulate a format, `computed` is
    what it would have in use, by its spec. `tokens` are those kept, summed over all KV heads, without the rest of a
    page that a reach ends in; `full_tokens` those that full attention keeps; `planned` is a dual cache's
    `CacheSpec.kv_bytes`.
    """
    if isinstance(cache, EvictingCache):
        heads = cache.spec.num_kv_heads * cache.spec.num_layers
        found = {"used": cache.used_bytes, "allocated": cache.total_bytes, "peak": cache.peak_bytes}
        found["tokens"] = sum(sum(layer.counts) for layer in cache.layers)
        return found | {"full_tokens": cache.seq_len * heads}
    used = 0
    for pages, ring in cache.layers:
        if pages is not None:
            index = 0 if pages.index is None else pages.index[0, :1].nbytes
            entry = pages.fmt.payload_bytes + index + pages.places.table.itemsize
            held = pages.nbytes()
            used += pages.num_pages() * entry + held["tails"] + held["sink pages"]
        if ring is not None and ring.num_slots:
            used += ring.nbytes // ring.num_slots * min(ring.num_slots, cache.seq_len)
    spec = cache.spec
    found = {
        "used": used, "allocated": cache.total_bytes, "peak": cache.total_bytes, "planned": spec.kv_bytes,
        "tokens": round(spec.paged_tokens(cache.seq_len) + spec.ring_tokens(cache.seq_len)),
        "full_tokens": cache.seq_len * spec.num_layers * spec.num_kv_heads,
    }  # fmt: skip
    return found if simulates is None else found | {"computed": simulation.computed_bytes(cache, simulates)}


def measure_retrieval(
    runtime: Runtime, row: Row, opened: Opened, documents: Iterable[TaskDocument], on_document: Callable[[str], None]
) -> dict[str, Any]:
    """Read every document, put its questions; `on_document` is called with its name when it is done.

    Returns:
        `items`: one a question (task, document, depth, exact, token_accuracy, answer expected and the greedy choices
        along it), `kv`: bytes at the end of a prompt, and speeds; of a row
        that reads sparsely `read_sparsely`: what that read of the past.
    """
    session, clock, items, kv = opened.session, Clock(), [], {}
    before = session.prefill_counts
    for document in documents:
        session.rewind(opened.empty)
        read_prompt(session, document.prompt.document_ids, clock)
        if row.evicts is not None and row.evicts.at_document:
            end_prompt(session)
        document_end = session.mark()
        for question, task in zip(document.prompt.questions, document.tasks, strict=True):
            session.rewind(document_end)
            session.prefill(question.token_ids, one_by_one=row.select_question, sparse=False)
            end_prompt(session)
            kv = kv or cache_bytes(session.cache, row.simulates)
            chosen, after = greedy_choices(session, question.expected_ids, row.select is not None)
            right = [one == other for one, other in zip(chosen, question.expected_ids, strict=True)]
            decoded = runtime.tokenizer.decode([after], skip_special_tokens=True)
            items.append(
                {
                    "task": task,
                    "document": document.name,
                    "depth": question.depth,
                    "exact": all(right) and not decoded.strip()[:1].isdigit(),
                    "token_accuracy": sum(right) / len(right),
                    "expected": question.needle.key,
                    "chosen": runtime.tokenizer.decode(chosen, skip_special_tokens=True),
                }
            )
        session.release(document_end)
        on_document(document.name)
    return {"items": items, "kv": kv, **read_facts(session, before), **clock.speeds()}


def measure_text(
    row: Row,
    opened: Opened,
    length: int,
    documents: Sequence[Sequence[int]],
    score_tokens: int,
    reference: ReferenceLogits,
    is_reference: bool,
    on_document: Callable[[str], None],
    kind: str = TEXT_TASK,
) -> dict[str, Any]:
    """Predict the last `score_tokens` tokens of each document after reading the rest (teacher forcing).

    Args:
        reference: where the reference row's distributions are kept; the row that `is_reference` writes them.
        kind: of text, which names the documents.

    Returns:
        `items`: one for each 32 predicted tokens (document, block, tokens; means of nll in nats, of KL(reference ||
        row) in nats, and of top-1 agreement), `kv` bytes where scoring began, and speeds; of a row
        that reads sparsely `read_sparsely`: what that read of the past.
    """
    session, clock, items, kv = opened.session, Clock(), [], {}
    before = session.prefill_counts
    for number, token_ids in enumerate(documents):
        session.rewind(opened.empty)
        split = len(token_ids) - score_tokens
        read_prompt(session, token_ids[:split], clock)
        end_prompt(session)
        kv = kv or cache_bytes(session.cache, row.simulates)
        rows, start = [], time.perf_counter()
        for first in range(split, len(token_ids), PIECE):
            logits = session.score(token_ids[first : first + PIECE], one_by_one=row.select is not None)
            rows.append(torch.log_softmax(logits, dim=-1))
        own = torch.cat(rows)
        float(own[-1, 0])  # waits for a GPU
        clock.note("score", score_tokens, time.perf_counter() - start)
        if is_reference:
            reference.save(length, number, own)
        items += [
            {"document": f"{kind}/{number}", **block}
            for block in compare_blocks(own, reference.load(length, number, own.device), token_ids[split:])
        ]
        on_document(f"{kind}/{number}")
    return {"items": items, "kv": kv, **read_facts(session, before), **clock.speeds()}


def compare_blocks(own: Tensor, reference: Tensor, token_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Means over blocks of 32 positions.

    Args:
        own, reference: float32 [n, vocab_size] on one device, log-probabilities that predict token_ids[i].
    """
    blocks = []
    for first in range(0, len(token_ids), BLOCK):
        part = slice(first, first + BLOCK)
        q, p = own[part].double(), reference[part].double()
        targets = torch.tensor(token_ids[part], device=q.device)
        divergence = (p.exp() * (p - q)).sum(dim=-1)
        blocks.append(
            {
                "block": first // BLOCK,
                "tokens": len(targets),
                "nll": float(-q.gather(1, targets[:, None]).mean()),
                "kl": max(0.0, float(divergence.mean())),
                "top1": float((q.argmax(-1) == p.argmax(-1)).double().mean()),
            }
        )
    return blocks


class ReferenceLogits:
    """The reference's log-probabilities, float32 [score_tokens, vocab_size] a document, as .npy files in a folder.

    A document of 256 scored tokens is 50 MB at a vocabulary of 49K, 131 MB at 128K.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, kind: str) -> ReferenceLogits:
        """Those of a kind of text: the first kind's stand in the folder itself."""
        return self if kind == TEXT_TASK else ReferenceLogits(self.folder / kind)

    def _path(self, length: int, number: int) -> Path:
        return self.folder / f"{length}-{number}.npy"

    def has(self, length: int, count: int) -> bool:
        """Whether all `count` documents of this length are there."""
        return all(self._path(length, number).is_file() for number in range(count))

    def save(self, length: int, number: int, values: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(length, number), lambda file: np.save(file, values.cpu().numpy()))

    def load(self, length: int, number: int, device: torch.device) -> Tensor:
        return torch.from_numpy(np.load(self._path(length, number))).to(device)


class Clock:
    """Tokens and seconds by kind of work, for information."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def note(self, kind: str, tokens: int, seconds: float) -> None:
        self._tokens[kind] = self._tokens.get(kind, 0) + tokens
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def speeds(self) -> dict[str, float]:
        return {
            f"{kind}_tokens_per_s": round(tokens / max(self._seconds[kind], 1e-9), 2)
            for kind, tokens in self._tokens.items()
        }


def read_prompt(session: Session, token_ids: Sequence[int], clock: Clock) -> None:
    """Prefill, and note how long it took."""
    start = time.perf_counter()
    logits = session.prefill(token_ids)
    float(logits[0])  # waits for a GPU
    clock.note("prefill", len(token_ids), time.perf_counter() - start)


def read_facts(session: Session, before: PrefillCounts | None) -> dict[str, Any]:
    """What came after `before`, as a result records it; empty where nothing is read sparsely."""
    counts = session.prefill_counts
    return {} if counts is None or before is None else {"read_sparsely": counts.since(before).to_dict()}


def greedy_choices(session: Session, expected: Sequence[int], one_by_one: bool = False) -> tuple[list[int], int]:
    """Read the right answer, in a chunk or one token at a time; the greedy choices along it, and the one after it.

    Raises:
        As `Session.score`.
    """
    rows = session.score(expected, one_by_one=one_by_one)
    assert session.logits is not None
    chosen = torch.cat((rows, session.logits[None])).argmax(dim=-1).tolist()
    return chosen[:-1], chosen[-1]
