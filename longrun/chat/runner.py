"""Which conversation is in memory, and the folder that is kept up to date with it: what every way to chat shares."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from longrun.chat.answer import INTERRUPTED, AnswerOptions
from longrun.chat.conversation import Conversation
from longrun.chat.report import TurnReport, sparse_line
from longrun.chat.talk import Talk, tell
from longrun.errors import InputError, LongrunError, PlanError, SessionError, short_path
from longrun.session.store import is_session
from longrun.text.chat_format import ChatFormat
from longrun.text.chat_template import has_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.runtime.runtime import Runtime
    from longrun.session.session import Session


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
        self._select_question, self._template_options = select_question, template_options
        self._tokenizer = check_model(runtime.tokenizer, runtime.model_dir, system, template_options)
        self.runtime, self.options, self._console = runtime, options, console
        self._system, self._capacity, self._folder = system, capacity, folder
        self.load_seconds = 0.0
        self.last_report: TurnReport | None = None
        self._talk: Talk | None = None
        if not has_template(self._tokenizer):
            self.tell(
                "note: this model has no chat template, so messages are given to it as plain text: it continues them "
                "as a text, and may not end its answers"
            )
        if folder is not None and is_session(folder):
            self._talk = self._talk_in(runtime.load_session(folder, capacity), system, template_options)
            self.tell(self._describe(folder))
        else:
            self._begin()
        if folder is not None:
            self.session.attach(folder)

    @property
    def talk(self) -> Talk:
        """Reads and answers in the conversation in memory. Raises SessionError where there is none."""
        if self._talk is None:
            raise SessionError("there is no conversation in memory: /reset begins one, /load DIR takes a saved one")
        return self._talk

    @property
    def conversation(self) -> Conversation:
        return self.talk.conversation

    @property
    def session(self) -> Session:
        return self.conversation.session

    @property
    def is_kept(self) -> bool:
        """A folder is kept up to date with this conversation."""
        return self._folder is not None

    def tell(self, message: str) -> None:
        """Print a message to the console (never to where answers go)."""
        tell(self._console, message)

    def answer(self, emit: Callable[[str], None], keep_unfinished: bool) -> TurnReport:
        """Answer the question that was read, and save where a folder is kept up to date.

        Args:
            emit: gets the text piece by piece.
            keep_unfinished: an answer stopped by Ctrl-C or SIGTERM stays in the conversation; otherwise the session
                goes back to the end of the question, so that the same command answers it again.
        """
        self.last_report = self.talk.answer(self.options, emit, keep_unfinished, self.is_kept, self.load_seconds)
        self.save_if_kept()
        return self.last_report

    def looked_at(self) -> list[dict[str, Any]] | None:
        """What the last answer looked at, as JSON types; None where it was interrupted or cannot be looked back from,
        which is told."""
        if self.last_report is None or self.last_report.answer.stop_reason == INTERRUPTED:
            return None
        try:
            return [one.to_dict() for one in self.talk.sources.looked_at()]
        except LongrunError as error:
            self.tell(f"note: what the answer looked at is not known: {error}")
            return None

    def save_if_kept(self) -> None:
        """Save into the folder that is kept up to date, if there is one and the session holds anything."""
        if self._folder is not None and self._talk is not None and self.session.num_tokens:
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
            talk = self._open(folder)
        except PlanError as error:
            if self._talk is not None and self.session.num_tokens:
                raise InputError(
                    f"session {folder} does not fit in memory together with this conversation: /save this one if it is "
                    f"needed, then /reset and /load again"
                ) from error
            self._drop()
            try:
                talk = self._open(folder)
            except BaseException as failure:
                traceback.clear_frames(failure.__traceback__)  # they hold the half-filled session and its memory
                self._begin()
                raise
        self._stop_keeping()
        if self._talk is not None:
            self.session.detach()
        self._talk, self.last_report = talk, None  # a report holds its session, and with that the memory
        self.tell(self._describe(folder))

    def reset(self) -> None:
        """Start a new conversation."""
        self._stop_keeping()
        self._drop()
        self._begin()
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

    def _talk_in(self, session: Session, system: str | None, template_options: Mapping[str, Any] | None) -> Talk:
        eos = self.runtime.eos_token_ids
        conversation = Conversation(session, self._tokenizer, eos, system, template_options)
        return Talk(conversation, self._tokenizer, eos, self._console, self._select_question)

    def _open(self, folder: Path) -> Talk:
        return self._talk_in(self.runtime.load_session(folder), None, None)

    def _begin(self) -> None:
        self._talk = self._talk_in(self.runtime.new_session(self._capacity), self._system, self._template_options)

    def _drop(self) -> None:
        if self._talk is not None:
            self.session.detach()
        self._talk = self.last_report = None
        gc.collect()

    def _stop_keeping(self) -> None:
        if self._folder is not None:
            self.tell(f"{self._folder} stays as it was last saved and is no longer kept up to date: use /save")
            self._folder = None
