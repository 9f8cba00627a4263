"""One answer after the other over one session: reads what is new of a prompt, then writes. Runs on one thread."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from longrun.errors import ContextFullError
from longrun.server.jobs import LENGTH, STOP, Finished, Job, Piece, Progress
from longrun.server.prefix import PrefixMarks
from longrun.server.reading import StepSizes, read_steps
from longrun.text.stream import AnswerText

if TYPE_CHECKING:
    from longrun.runtime.runtime import Runtime
    from longrun.session.session import Session


class Answerer:
    """Answers jobs. What an answer is does not depend on the jobs before it, but for rounding.

    Args:
        runtime: a model with a tokenizer.

    Raises:
        PlanError: there is no memory for the session.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._begin()

    @property
    def num_tokens(self) -> int:
        """Tokens that the session holds."""
        return self._session.num_tokens

    def answer(self, job: Job) -> None:
        """Emit everything but a failure.

        Raises:
            Cancelled, StoppedError: see `Job.check`; the session keeps what was read.
            LongrunError: see `Session.prefill` and `Session.generate`.
        """
        cached = self._read(job)
        self._write(job, cached)

    def forget(self) -> None:
        """Begin with an empty session again, whatever happened to this one."""
        try:
            self._marks.forget()
        except Exception:
            del self._session, self._marks  # its memory is needed for the next one
            self._begin()

    def _begin(self) -> None:
        self._session: Session = self._runtime.new_session()
        self._marks = PrefixMarks(self._session, self._runtime.eos_token_ids)
        self._sizes = StepSizes(self._session.plan.page_size, self._session.plan.chunk_size)
        rope = self._runtime.parts.rotary_host.params
        # The angles of this type change with the length of what is read at once, so that nothing can be read in parts.
        self._whole = rope.rope_type == "dynamic" and self._session.capacity > rope.max_position_embeddings

    def _read(self, job: Job) -> int:
        """Read what the session does not hold of the prompt; returns the number of tokens that it held."""
        ids, session, began = job.ask.token_ids, self._session, time.perf_counter()
        if self._whole:
            self._marks.forget()
        start, places = self._marks.resume(ids)
        cached = session.seq_len

        def tell(done: int) -> None:
            job.check()
            job.emit(Progress(len(ids), cached, done, time.perf_counter() - began))

        def read(first: int, stop: int) -> None:
            session.prefill(ids[first:stop])
            if stop in places:
                self._marks.take()
            tell(stop)

        tell(cached)
        if self._whole:
            session.prefill(ids, lambda done, _: tell(done))
        else:
            read_steps(start, len(ids), places, self._sizes, read)
        return cached

    def _write(self, job: Job, cached: int) -> None:
        ask, sampling = job.ask, job.ask.sampling
        seed = secrets.randbits(63) if ask.seed is None and sampling.temperature > 0 else ask.seed
        text = AnswerText(self._runtime.tokenizer, ask.stop)
        tokens = self._session.generate(
            ask.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, seed,
            min_p=sampling.min_p,
        )  # fmt: skip
        count, reason = 0, LENGTH
        try:
            for token_id in tokens:
                count += 1
                if token_id in self._runtime.eos_token_ids:
                    reason = STOP
                    break
                if piece := text.step(token_id):
                    job.emit(Piece(piece))
                if text.found is not None:
                    reason = STOP
                    break
                job.check()
        except ContextFullError:
            reason = LENGTH
        if piece := text.flush():
            job.emit(Piece(piece))
        job.emit(Finished(reason, len(ask.token_ids), cached, count))
