"""The chat a person types into: messages, commands, Ctrl-C."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

from longrun.allocation import allocation_sentence, is_failed_allocation
from longrun.arguments import check_text
from longrun.chat.answer import CONTEXT_FULL, INTERRUPTED, MAX_NEW_TOKENS
from longrun.chat.changed_files import ChangedFiles
from longrun.chat.runner import ChatRunner
from longrun.chat.turns import Reading
from longrun.documents.document import Document
from longrun.documents.find import read_documents
from longrun.errors import InputError, LongrunError, quoted, shortened
from longrun.paths import user_path

HELP = """\
/file PATH   read a text file, a folder or a pattern (src/*.py) into the message; the next line you type ends the
             message and asks
/continue    read on after Ctrl-C stopped the reading, answer a question that has no answer yet, or resume an answer
             that Ctrl-C or --max-new-tokens cut
/save DIR    save the conversation with its cache
/load DIR    resume a saved conversation
/sources     passages of the texts that the last answer looked at
/stats       tokens, documents, and what the last answer cost
/reset       start over
/help        this list
/exit        leave (also Ctrl-D)
Enter sends a message; Alt-Enter, or Enter behind a backslash, begins a new line in it. A text that is pasted is one
message, and no command. Tab completes commands and paths.
Ctrl-C stops an answer or the reading of a text, never the chat; twice at the prompt it leaves."""


COMMANDS = {
    "/file": True, "/continue": False, "/save": True, "/load": True, "/sources": False, "/stats": False,
    "/reset": False, "/help": False, "/exit": False,
}  # fmt: skip
"""Names of the commands, and whether each takes a path."""


class Pasted(str):
    """A message that was pasted: it is no command, whatever it begins with."""


class ChatLoop:
    """Takes lines until there are no more.

    Args:
        runner: the conversation.
        read_line: returns the next message (`Pasted`, or a command) or None at the end of the input; may raise
            KeyboardInterrupt.
        out: where answers go.
        interactive: a person is there: Ctrl-C stops only what is running. Otherwise it goes through to the caller.
    """

    def __init__(self, runner: ChatRunner, read_line: Callable[[], str | None], out: TextIO, interactive: bool) -> None:
        self._runner, self._read_line, self._out, self._interactive = runner, read_line, out, interactive
        self._tell, self._changed = runner.tell, ChangedFiles()
        self.turns = self.errors = self.defects = 0
        self._actions: dict[str, Callable[[str], None]] = {
            "/file": self._file,
            "/continue": lambda _: self._continue(),
            "/save": lambda path: runner.save(user_path(path)),
            "/load": lambda path: runner.load(user_path(path)),
            "/sources": lambda _: self._sources(),
            "/stats": lambda _: self._stats(),
            "/reset": lambda _: runner.reset(),
            "/help": lambda _: self._tell(HELP),
        }

    def run(self, documents: Sequence[Document] = (), question: str | None = None) -> None:
        """Read `documents`, answer `question`, then take lines until /exit or the end of the input."""
        if documents or question is not None:
            self._guard(lambda: self._ask(self._read(documents, question)))
        if self._runner.conversation.awaits_answer:
            self._tell("the last question has no answer yet: /continue answers it")
        interrupts = 0
        self._tell_of_changes()
        while True:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                interrupts += 1
                if not self._interactive or interrupts > 1:
                    raise
                self._tell("\npress Ctrl-C again, or Ctrl-D, to leave")
                continue
            interrupts = 0
            if line is None:
                return
            is_command = line.strip().startswith("/") and not isinstance(line, Pasted)
            line = line.strip()
            if is_command and line.split(maxsplit=1)[:1] == ["/exit"]:
                return
            if line:
                self.turns += 1
                self._guard(lambda line=line, is_command=is_command: self._take(line, is_command))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except LongrunError as error:
            self.errors += 1
            self._tell(f"error: {error}")
        except Exception as error:
            if is_failed_allocation(error):
                self.errors += 1
                self._tell(f"error: {allocation_sentence(error, 'on the way')}")
                return
            self.defects += 1
            self._tell(
                f"{traceback.format_exc()}error: this is a defect of longrun ({type(error).__name__}): please report "
                f"what stands above; the conversation is still here, and /save DIR keeps it"
            )
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._tell("\nstopped")

    def _take(self, line: str, is_command: bool) -> None:
        check_text(line, "the message")
        if not is_command:
            self._tell_of_changes()
            if line.startswith("/"):
                self._tell("note: what is pasted is a message, never a command")
            self._ask(self._read([], line))
            return
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
            raise InputError(f"there is no command {shortened(name)}: did you mean {near}? /help lists all")
        if COMMANDS[name] and not argument:
            raise InputError(f"{name} needs a path after it")
        if argument and not COMMANDS[name]:
            raise InputError(f"{name} takes nothing after it, but {quoted(argument)} was given")
        self._actions[name](argument)

    def _tell_of_changes(self) -> None:
        for name in self._changed.look(self._runner.conversation.latest):
            self._tell(f"note: {name} has changed since it was read: /file {name} reads what is new")

    def _file(self, path: str) -> None:
        found = read_documents([path])
        for notice in found.notices:
            self._tell(f"note: {notice}")
        self._read(found.texts, None)
        self._tell(self._runner.status())

    def _read(self, documents: Sequence[Document], question: str | None) -> Reading:
        return self._reading(lambda: self._runner.talk.read(documents, question, strict=False))

    def _reading(self, read: Callable[[], Reading]) -> Reading:
        try:
            return read()
        except KeyboardInterrupt:
            unread = self._runner.conversation.unread
            if unread and self._interactive:
                self._tell(
                    f"\nreading stopped, {unread:,} tokens are unread: /continue reads on; a message you type now "
                    f"leaves them out"
                )
                return Reading([], False)
            raise

    def _continue(self) -> None:
        reading = self._runner.conversation.rest()
        if reading is None:
            raise InputError("there is nothing to continue here: type a message, or /file PATH for a text cut earlier")
        rest = reading

        def read() -> Reading:
            self._runner.talk.prefill(rest)
            return rest

        self._ask(self._reading(read))

    def _ask(self, reading: Reading) -> None:
        if not reading.asks:
            return
        report = self._runner.answer(self._emit, keep_unfinished=True)
        self._emit("\n")
        if report.answer.stop_reason == CONTEXT_FULL:
            self._tell(
                f"the context is full ({self._runner.session.capacity:,} tokens): /save, then start again with "
                f"--session and a larger --ctx, or /reset"
            )
        more = ": /continue resumes it" if report.answer.stop_reason in (MAX_NEW_TOKENS, INTERRUPTED) else ""
        self._tell(f"[{report.line()}; ended by {report.answer.stop_reason}{more}]")
        if report.answer.stop_reason == INTERRUPTED and not self._interactive:
            raise KeyboardInterrupt

    def _sources(self) -> None:
        found = self._runner.talk.sources.looked_at()
        if not found:
            raise InputError("nothing stands far enough before the question to be looked at: read a longer text first")
        self._tell("\n".join(["looked at:", *(one.line() for one in found)]))

    def _stats(self) -> None:
        self._tell(self._runner.status())
        if self._runner.last_report is not None:
            self._tell(self._runner.last_report.line())
        caught = self._runner.session.caught_mass()
        if caught is not None:
            self._tell(f"pages that the next step chooses: {caught.line()}")

    def _emit(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
