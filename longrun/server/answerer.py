"""One answer after the other over one session: reads what is new of a prompt, then writes. Runs on one thread."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from longrun.engine.sampling import TokenScore, score_tokens
from longrun.errors import ContextFullError
from longrun.server.jobs import (
    LENGTH,
    STOP,
    Ask,
    Cancelled,
    Finished,
    GaveWay,
    Job,
    Loaded,
    LookedAt,
    PassageNames,
    Piece,
    Progress,
    PromptScores,
    ReadSparsely,
)
from longrun.server.prefix import PrefixMarks
from longrun.server.reading import StepSizes, read_steps, reads_whole, scored_at_once
from longrun.text.stream import AnswerText

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.session.marks import SessionMark
    from longrun.session.session import Session
    from longrun.specs.hot_counts import HotCounts

TURN_SECONDS = 10.0
"""How long a document is read at least before others that wait have their turn."""

_TURN_LOADS = 10  # a turn is at least so many times as long as loading what was read took


class Answerer:
    """Answers jobs. What an answer is does not depend on the jobs before it, but for rounding.

    Args:
        runtime: a model with a tokenizer.
        others_wait: whether somebody waits for an answer, to whom the reading of a document gives way.

    Raises:
        PlanError: there is no memory for the session.
    """

    def __init__(self, runtime: Runtime, others_wait: Callable[[], bool]) -> None:
        self._runtime, self._others_wait = runtime, others_wait
        self._begin()

    @property
    def num_tokens(self) -> int:
        """Tokens that the session holds."""
        return self._session.num_tokens

    @property
    def sparse_tokens(self) -> int:
        """Those of them that were read sparsely."""
        return self._session.sparse_tokens

    @property
    def hot_counts(self) -> HotCounts | None:
        """See `Session.hot_counts`."""
        return self._session.hot_counts

    def answer(self, job: Job) -> None:
        """Emit everything but a failure.

        Raises:
            Cancelled, StoppedError: see `Job.check`; the session keeps what was read.
            GaveWay: a job that saves has read for its turn, and somebody waits.
            LongrunError: see `Session.prefill` and `Session.generate`.
        """
        cached = self._score_prompt(job) if job.ask.scores_prompt else self._read(job)
        finished = Finished(LENGTH, len(job.ask.token_ids), cached, 0)
        if job.ask.sources is not None:
            mark = self._marks.take()
            finished = self._write(job, cached)
            self._look_back(job, mark, job.ask.sources)
        elif job.ask.max_new_tokens:
            finished = self._write(job, cached)
        job.emit(finished)

    def forget(self) -> None:
        """Begin with an empty session again, whatever happened to this one."""
        try:
            self._marks.forget()
        except Exception:
            traceback.print_exc()
            del self._session, self._marks  # its memory is needed for the next one
            self._begin()

    def _begin(self) -> None:
        self._session: Session = self._runtime.new_session()
        self._marks = PrefixMarks(self._session, self._runtime.eos_token_ids)
        self._sizes = StepSizes(self._session.plan.page_size, self._session.plan.chunk_size)
        self._whole = reads_whole(self._runtime)

    def _read(self, job: Job) -> int:
        """Read what the session does not hold of the prompt; returns the number of tokens that it held."""
        ids, session, began = job.ask.token_ids, self._session, time.perf_counter()
        if self._whole or (job.ask.exact and session.sparse_tokens):
            self._marks.forget()
        turn = max(TURN_SECONDS, _TURN_LOADS * self._load(job))
        start, places = self._marks.resume(ids)
        cached, reads = session.seq_len, time.perf_counter()

        def tell(done: int) -> None:
            job.check()
            job.emit(Progress(len(ids), cached, done, time.perf_counter() - began))

        def save() -> None:
            if job.ask.saves and job.ask.kept is not None and not job.ask.kept.save(session):
                raise Cancelled

        def read(first: int, stop: int) -> None:
            before = session.prefill_counts if job.ask.saves else None
            session.prefill(ids[first:stop], sparse=job.ask.sparse, more=len(ids) - stop)
            if stop in places:
                self._marks.take()
            save()
            if before is not None and (counts := session.prefill_counts) is not None:
                job.emit(ReadSparsely(session.sparse_tokens, counts.since(before)))
            tell(stop)
            if job.ask.saves and stop < len(ids) and time.perf_counter() - reads > turn and self._others_wait():
                raise GaveWay

        tell(cached)
        if self._whole:
            session.prefill(ids, lambda done, _: tell(done), sparse=job.ask.sparse)
        elif start == len(ids):
            save()
        else:
            read_steps(start, len(ids), places, self._sizes, read)
        return cached

    def _load(self, job: Job) -> float:
        """Put the saved session that the prompt begins with in the place of this one, where that one holds more, or was
        read in another way; returns the seconds that it took, 0 where nothing was loaded."""
        kept, began = job.ask.kept, time.perf_counter()
        if kept is None:
            return 0.0
        with kept.lock:
            saved = kept.open(self._runtime.identity)
            if saved is None:
                return 0.0
            same = saved.manifest.sparse_tokens == self._session.sparse_tokens
            if same and self._marks.reach(job.ask.token_ids) >= saved.manifest.num_tokens:
                return 0.0
            self._marks.forget()
            kept.restore(saved, self._session)
            self._marks.take()
        seconds = time.perf_counter() - began
        job.emit(Loaded(self._session.num_tokens, seconds))
        return seconds

    def _score_prompt(self, job: Job) -> int:
        """Read the whole prompt a few tokens at a time and emit how likely each of them was; returns 0."""
        ids, session, began = job.ask.token_ids, self._session, time.perf_counter()
        self._marks.forget()
        session.prefill(ids[:1])
        step = scored_at_once(session.plan, self._runtime.config.vocab_size)
        for start in range(1, len(ids), step):
            job.check()
            some = ids[start : start + step]
            job.emit(PromptScores(tuple(score_tokens(session.score(some), some, job.ask.logprobs or 0))))
            job.emit(Progress(len(ids), 0, session.seq_len, time.perf_counter() - began))
        self._marks.take()
        return 0

    def _look_back(self, job: Job, mark: SessionMark, sources: PassageNames) -> None:
        """Emit what the tokens after the mark, the prompt's end, looked at."""
        job.check()
        passages = self._session.looked_at(mark, before=sources.before, check=job.check)
        job.emit(LookedAt(sources.told(passages)))

    def _write(self, job: Job, cached: int) -> Finished:
        """Emit the answer's text."""
        ask, count, reason = job.ask, 0, LENGTH
        text = AnswerText(self._runtime.tokenizer, ask.stop)
        scores: list[TokenScore] = []  # of tokens whose text is not sure yet
        try:
            for token_id, score in self._tokens(ask):
                count += 1
                ends = token_id in self._runtime.eos_token_ids
                scores += [] if score is None or (ends and not ask.scores_end) else [score]
                if ends:
                    reason = STOP
                    break
                if piece := text.step(token_id):
                    job.emit(Piece(piece, tuple(scores)))
                    scores = []
                if text.found is not None:
                    reason, scores = STOP, []
                    break
                if ask.rule is not None and ask.rule.is_complete:
                    reason = STOP
                job.check()
        except ContextFullError:
            reason = LENGTH
        piece = text.flush()
        if piece or scores:
            job.emit(Piece(piece, tuple(scores)))
        return Finished(reason, len(ask.token_ids), cached, count)

    def _tokens(self, ask: Ask) -> Iterator[tuple[int, TokenScore | None]]:
        """The answer's tokens, scored where that was asked for."""
        sampling = ask.sampling
        seed = secrets.randbits(63) if ask.seed is None and sampling.temperature > 0 else ask.seed
        if ask.logprobs is not None:
            for score in self._session.generate_scored(
                ask.max_new_tokens, sampling, seed, top=ask.logprobs, rule=ask.rule
            ):
                yield score.token_id, score
            return
        for token_id in self._session.generate(
            ask.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, seed,
            min_p=sampling.min_p, rule=ask.rule,
        ):  # fmt: skip
            yield token_id, None
