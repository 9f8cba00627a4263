"""One conversation as it goes on: documents and questions are read into its session, and answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from longrun.chat.answer import INTERRUPTED, AnswerOptions, stream_answer
from longrun.chat.conversation import Conversation
from longrun.chat.progress import PrefillProgress
from longrun.chat.report import TurnReport
from longrun.chat.sources import AnswerSources
from longrun.chat.turns import AnswerCut, Reading
from longrun.documents.document import Document
from longrun.errors import short_path
from longrun.interrupts import deferred_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_SHOWN = 5


def tell(console: Console, message: str) -> None:
    """Print a message to the console (never to where answers go)."""
    console.print(escape(message), highlight=False, soft_wrap=True)


def _already_read(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} was read before: not read again"
    shown = ", ".join(map(short_path, names[:_NAMES_SHOWN])) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{len(names):,} texts were read before: not read again ({shown})"


class Talk:
    """Reads into a conversation and answers in it.

    Args:
        conversation: a new one, or one that was loaded.
        tokenizer, eos_token_ids: of its model.
        console: messages and progress go there.
        select_question: questions, too, read the pages that are selected for each token.
    """

    def __init__(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int],
        console: Console, select_question: bool,
    ) -> None:  # fmt: skip
        self.conversation, self._session, self._tokenizer = conversation, conversation.session, tokenizer
        self._eos, self._console, self._select_question = eos_token_ids, console, select_question
        self.sources = AnswerSources(conversation, tokenizer)  # of the last answer
        self._saved_tokens = self._session.num_tokens
        self._prefilled: tuple[int, float, int] = (0, 0.0, 0)
        self._already_read: tuple[str, ...] = ()

    def read(self, documents: Sequence[Document], question: str | None, strict: bool = True) -> Reading:
        """Prefill documents and question, as `Conversation.prepare` decides.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was read until then stays.
            LongrunError: see `Conversation.prepare` and `Session.prefill`.
        """
        reading = self.conversation.prepare(documents, question, strict)
        self.sources.know(documents)
        self._already_read = (*self._already_read, *reading.already_read)
        if reading.already_read:
            tell(self._console, _already_read(reading.already_read))
        for sentence in reading.changed:
            tell(self._console, f"note: {sentence}")
        if reading.resumed_of:
            tell(self._console, f"resuming at token {reading.resumed_at:,} of {reading.resumed_of:,}")
        self.prefill(reading)
        return reading

    @property
    def prefilled(self) -> tuple[int, float]:
        """Tokens that were read last, and the seconds that took."""
        return self._prefilled[:2]

    def prefill(self, reading: Reading) -> None:
        """Read the tokens of `reading`, with progress, and remember how long it took."""
        before, started = self._session.num_tokens, time.perf_counter()
        self._prefilled = (0, 0.0, reading.resumed_at)
        if not reading.token_ids:
            return
        self.sources.drop()
        try:
            with PrefillProgress(self._console, reading.resumed_at) as progress:
                progress.start(len(reading.token_ids))
                self._read_tokens(reading, progress)
        finally:
            self._prefilled = (self._session.num_tokens - before, time.perf_counter() - started, reading.resumed_at)

    def _read_tokens(self, reading: Reading, progress: Callable[[int, int], None]) -> None:
        """Read documents in chunks, as the plan says; the question in full, in chunks or token by token."""
        ids = reading.token_ids
        apart = self._select_question or self._session.plan.attention.prefill is not None
        asked = self.conversation.question_at(reading) if apart else len(ids)
        if asked:
            self._session.prefill(ids[:asked], lambda done, total: progress(done, total + len(ids) - asked))
        if asked < len(ids):
            self._session.prefill(
                ids[asked:], lambda done, total: progress(asked + done, asked + total), self._select_question,
                sparse=False,
            )  # fmt: skip

    def answer(
        self, options: AnswerOptions, emit: Callable[[str], None], keep_unfinished: bool, is_kept: bool,
        load_seconds: float,
    ) -> TurnReport:  # fmt: skip
        """Answer the question that was read; see `ChatRunner.answer`.

        Args:
            is_kept: in a folder: only then the session goes back to the end of the question.
            load_seconds: for the report.

        Raises:
            InputError: options that cannot be used.
        """
        cut = self.conversation.cut_answer
        begun = None if cut is None else self._session.token_ids[cut.start :]
        prompt_tokens = self._session.num_tokens
        began = AnswerCut(prompt_tokens, None) if cut is None else cut
        mark = self.sources.begin(None if cut is None else cut.start)
        finished = whole = False
        hot_before = self._session.hot_counts
        try:
            answer = stream_answer(self._session, self._tokenizer, self._eos, options, emit, begun, began.seed)
            finished, whole = answer.stop_reason != INTERRUPTED, not answer.is_cut
            began = replace(began, seed=answer.seed)
        finally:
            with deferred_signals():
                if finished or keep_unfinished:
                    self.conversation.answered(None if whole else began)
                elif is_kept and cut is None:
                    self._session.rewind(mark)
        count, seconds, resumed_at = self._prefilled
        hot = self._session.hot_counts
        hot = None if hot is None or hot_before is None else hot.since(hot_before)
        report = TurnReport(
            answer, self._session, prompt_tokens, count, seconds, load_seconds, resumed_at, self._saved_tokens,
            self._already_read, hot,
        )  # fmt: skip
        self._prefilled, self._already_read = (0, 0.0, 0), ()
        return report
