"""Reads documents and questions into a session, answers, and reports: what every way to chat shares."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from longrun.chat.answer import INTERRUPTED, AnswerOptions, stream_answer
from longrun.chat.conversation import Conversation
from longrun.chat.progress import PrefillProgress
from longrun.chat.report import TurnReport, sparse_line
from longrun.chat.sources import AnswerSources
from longrun.chat.turns import AnswerCut, Reading
from longrun.documents.document import Document
from longrun.errors import InputError, LongrunError, PlanError, SessionError, short_path
from longrun.interrupts import deferred_signals
from longrun.session.store import is_session
from longrun.text.chat_format import ChatFormat
from longrun.text.chat_template import has_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.runtime.runtime import Runtime
    from longrun.session.session import Session


_NAMES_SHOWN = 5


def check_model(
    tokenizer: PreTrainedTokenizerBase | None,
    model_dir: Path,
    system: str | None,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, if a chat with this system prompt and these options of the template can begin; to be asked before
    weights are read.

    Raises:
        InputError: there is no tokenizer, or its template does not take the system prompt or an option.
        CheckpointError: the chat template cannot be used.
    """
    if tokenizer is None:
        raise InputError(f"{short_path(model_dir)} has no tokenizer: chat needs one, add the model's tokenizer files")
    ChatFormat(tokenizer, system, options=options)
    return tokenizer


def _already_read(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} was read before: not read again"
    shown = ", ".join(map(short_path, names[:_NAMES_SHOWN])) + (", ..." if len(names) > _NAMES_SHOWN else "")
    return f"{len(names):,} texts were read before: not read again ({shown})"


class Terminated(BaseException):
    """SIGTERM was received: save what can be saved and leave."""


class ChatRunner:
    """One conversation at a time over one runtime.

    Args:
        runtime: model and tokenizer.
        options: how to answer.
        console: messages, progress and statistics go there, never the answer.
        system: system prompt of new conversations.
        folder: session folder that is kept up to date (after every chunk read, and after every answer); an existing
            session in it is resumed.
        capacity: tokens a session must have room for; None takes the plan's, or a saved session's own.
        template_options: of the chat template in new conversations, such as `enable_thinking`.
        select_question: questions, too, read the pages that are selected for each token.

    Raises:
        InputError: the model has no tokenizer, or the system prompt cannot be used.
        SessionError, PlanError: the folder's session cannot be loaded, or does not fit.
    """

    def __init__(
        self,
        runtime: Runtime,
        options: AnswerOptions,
        console: Console,
        system: str | None = None,
        folder: Path | None = None,
        capacity: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        select_question: bool = False,
    ) -> None:
        self._select_question = select_question
        self._tokenizer = check_model(runtime.tokenizer, runtime.model_dir, system, template_options)
        self._template_options = template_options
        self.runtime, self.options, self._console = runtime, options, console
        self._system, self._capacity, self._folder = system, capacity, folder
        self.load_seconds = 0.0
        self.last_report: TurnReport | None = None
        self._conversation: Conversation | None = None
        self._saved_tokens = 0
        if not has_template(self._tokenizer):
            self.tell(
                "note: this model has no chat template, so messages are given to it as plain text: it continues them "
                "as a text, and may not end its answers"
            )
        if folder is not None and is_session(folder):
            self._conversation = self._converse(runtime.load_session(folder, capacity), system, template_options)
            self._saved_tokens = self.session.num_tokens
            self.tell(self._describe(folder))
        else:
            self._begin()
        if folder is not None:
            self.session.attach(folder)

    @property
    def conversation(self) -> Conversation:
        if self._conversation is None:
            raise SessionError("there is no conversation in memory: /reset begins one, /load DIR takes a saved one")
        return self._conversation

    @property
    def session(self) -> Session:
        return self.conversation.session

    @property
    def sources(self) -> AnswerSources:
        """What the last answer looked at."""
        if self._sources is None:
            self._sources = AnswerSources(self.conversation, self._tokenizer)
        return self._sources

    @property
    def is_kept(self) -> bool:
        """A folder is kept up to date with this conversation."""
        return self._folder is not None

    def tell(self, message: str) -> None:
        """Print a message to the console (never to where answers go)."""
        self._console.print(escape(message), highlight=False, soft_wrap=True)

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
            self.tell(_already_read(reading.already_read))
        for sentence in reading.changed:
            self.tell(f"note: {sentence}")
        if reading.resumed_of:
            self.tell(f"resuming at token {reading.resumed_at:,} of {reading.resumed_of:,}")
        self.prefill(reading)
        return reading

    def prefill(self, reading: Reading) -> None:
        """Read the tokens of `reading`, with progress, and remember how long it took."""
        before, started = self.session.num_tokens, time.perf_counter()
        self._prefilled = (0, 0.0, reading.resumed_at)
        if not reading.token_ids:
            return
        self.sources.drop()
        try:
            with PrefillProgress(self._console, reading.resumed_at) as progress:
                progress.start(len(reading.token_ids))
                self._read_tokens(reading, progress)
        finally:
            self._prefilled = (self.session.num_tokens - before, time.perf_counter() - started, reading.resumed_at)

    def _read_tokens(self, reading: Reading, progress: Callable[[int, int], None]) -> None:
        """Read documents in chunks, as the plan says; the question in full, in chunks or token by token."""
        ids = reading.token_ids
        apart = self._select_question or self.session.plan.attention.prefill is not None
        asked = self.conversation.question_at(reading) if apart else len(ids)
        if asked:
            self.session.prefill(ids[:asked], lambda done, total: progress(done, total + len(ids) - asked))
        if asked < len(ids):
            self.session.prefill(
                ids[asked:], lambda done, total: progress(asked + done, asked + total), self._select_question,
                sparse=False,
            )  # fmt: skip

    def answer(self, emit: Callable[[str], None], keep_unfinished: bool) -> TurnReport:
        """Answer the question that was read, and save where a folder is kept up to date.

        Args:
            emit: gets the text piece by piece.
            keep_unfinished: an answer stopped by Ctrl-C or SIGTERM stays in the conversation; otherwise the session
                goes back to the end of the question, so that the same command answers it again.
        """
        cut = self.conversation.cut_answer
        begun = None if cut is None else self.session.token_ids[cut.start :]
        prompt_tokens = self.session.num_tokens
        began = AnswerCut(prompt_tokens, None) if cut is None else cut
        mark = self.sources.begin(None if cut is None else cut.start)
        rewinds = self._folder is not None and cut is None
        finished = whole = False
        hot_before = self.session.hot_counts
        try:
            answer = stream_answer(
                self.session, self._tokenizer, self.runtime.eos_token_ids, self.options, emit, begun, began.seed
            )
            finished, whole = answer.stop_reason != INTERRUPTED, not answer.is_cut
            began = replace(began, seed=answer.seed)
        finally:
            with deferred_signals():
                if finished or keep_unfinished:
                    self.conversation.answered(None if whole else began)
                elif rewinds:
                    self.session.rewind(mark)
        count, seconds, resumed_at = self._prefilled
        hot = self.session.hot_counts
        hot = None if hot is None or hot_before is None else hot.since(hot_before)
        self.last_report = TurnReport(
            answer, self.session, prompt_tokens, count, seconds, self.load_seconds, resumed_at, self._saved_tokens,
            self._already_read, hot,
        )  # fmt: skip
        self._prefilled, self._already_read = (0, 0.0, 0), ()
        self.save_if_kept()
        return self.last_report

    def looked_at(self) -> list[dict[str, Any]] | None:
        """What the last answer looked at, as JSON types; None where it was interrupted or cannot be looked back from,
        which is told."""
        if self.last_report is None or self.last_report.answer.stop_reason == INTERRUPTED:
            return None
        try:
            return [one.to_dict() for one in self.sources.looked_at()]
        except LongrunError as error:
            self.tell(f"note: what the answer looked at is not known: {error}")
            return None

    def save_if_kept(self) -> None:
        """Save into the folder that is kept up to date, if there is one and the session holds anything."""
        if self._folder is not None and self._conversation is not None and self.session.num_tokens:
            self.session.save(self._folder)

    def keep_as_it_is(self) -> None:
        """From now on the folder that is kept up to date, if there is one, stays as it is now."""
        self.save_if_kept()
        if self._folder is not None:
            self.session.detach()
            self._folder = None

    def save(self, folder: Path) -> None:
        """Save a copy into `folder`; the folder that is kept up to date stays so."""
        if not self.session.num_tokens:
            raise InputError("there is nothing to save yet: ask or read something first")
        self.session.save(folder)
        self.tell(f"saved {self.session.num_tokens:,} tokens in {folder}")

    def load(self, folder: Path) -> None:
        """Continue with another saved session; where that fails, the conversation is as it was.

        Raises:
            SessionError: it cannot be loaded.
            InputError: there is no room for it while the conversation stays in memory.
        """
        try:
            conversation = self._open(folder)
        except PlanError as error:
            if self._conversation is not None and self.session.num_tokens:
                raise InputError(
                    f"session {folder} does not fit in memory together with this conversation: /save this one if it is "
                    f"needed, then /reset and /load again"
                ) from error
            self._drop()
            try:
                conversation = self._open(folder)
            except BaseException as failure:
                traceback.clear_frames(failure.__traceback__)  # they hold the half-filled session and its memory
                self._begin()
                raise
        self._stop_keeping()
        if self._conversation is not None:
            self.session.detach()
        self._conversation, self._saved_tokens = conversation, conversation.session.num_tokens
        self.tell(self._describe(folder))

    def reset(self) -> None:
        """Start a new conversation."""
        self._stop_keeping()
        self._drop()
        self._begin()
        self._saved_tokens = 0
        self.tell("a new conversation begins")

    def status(self) -> str:
        """Tokens, documents, memory: one line."""
        session, documents = self.session, self.conversation.documents
        read = f"; documents: {', '.join(documents)}" if documents else ""
        unread = f"; {self.conversation.unread:,} tokens are still unread" if self.conversation.unread else ""
        sparsely = sparse_line(session)
        how = "" if sparsely is None else f", {sparsely}"
        return f"{session.num_tokens:,} of {session.capacity:,} tokens used{how}{read}{unread}"

    def _describe(self, folder: Path) -> str:
        cut = "; the last answer was cut: /continue resumes it" if self.conversation.cut_answer else ""
        return f"going on with the session in {folder}: {self.status()}{cut}"

    def _converse(
        self, session: Session, system: str | None, template_options: Mapping[str, Any] | None
    ) -> Conversation:
        self._prefilled: tuple[int, float, int] = (0, 0.0, 0)
        self._already_read: tuple[str, ...] = ()
        conversation = Conversation(session, self._tokenizer, self.runtime.eos_token_ids, system, template_options)
        self._sources: AnswerSources | None = None  # of the conversation before
        return conversation

    def _open(self, folder: Path) -> Conversation:
        return self._converse(self.runtime.load_session(folder), None, None)

    def _begin(self) -> None:
        self._conversation = self._converse(
            self.runtime.new_session(self._capacity), self._system, self._template_options
        )

    def _drop(self) -> None:
        if self._conversation is not None:
            self.session.detach()
        self._conversation = self.last_report = self._sources = None
        gc.collect()

    def _stop_keeping(self) -> None:
        if self._folder is not None:
            self.tell(f"{self._folder} stays as it was last saved and is no longer kept up to date: use /save")
            self._folder = None
