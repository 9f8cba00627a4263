"""What a person types: messages of one line or several, pasted text, completion of commands and paths."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from longrun.chat.loop import Pasted

PROMPT = "> "


class Terminal:
    """Reads what is typed, with editing and history.

    Enter sends. A new line within a message comes by Alt-Enter, or by Enter behind a backslash. A text that is pasted,
    of any number of lines, is part of one message; where it begins the message, or a line ends in it, it is never a
    command.

    Args:
        commands: names of the commands, with their slash.
        with_path: those of them that take a path.
        input, output: for tests; default: the process's terminal.
    """

    def __init__(
        self,
        commands: Iterable[str],
        with_path: Iterable[str],
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        output = create_output(always_prefer_tty=True) if output is None else output
        if isinstance(output, Vt100_Output):
            output.enable_cpr = False  # it waits for an answer that some terminals never give
        self._pasted = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT, multiline=True, prompt_continuation=" " * len(PROMPT), key_bindings=self._bindings(),
            completer=_CommandCompleter(commands, with_path), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, reserve_space_for_menu=0, input=input, output=output,
        )  # fmt: skip

    def read(self) -> str | None:
        """The next message or command; `Pasted` where it is no command, whatever it begins with. None at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        self._pasted = False
        try:
            with self._leaving_at_sigterm() as leave:
                text = self._session.prompt(pre_run=leave)
        except EOFError:
            return None
        return Pasted(text) if self._pasted else text

    @contextlib.contextmanager
    def _leaving_at_sigterm(self) -> Iterator[Callable[[], None]]:
        """SIGTERM ends the prompt, and takes effect when that has left the terminal as it was.

        Its handler raises as a rule, which within a callback of the prompt would only be reported. Gives what is to be
        called when the prompt begins.
        """
        app, heard = self._session.app, False

        def leave() -> None:
            if heard and app.is_running and not app.is_done:
                app.exit(exception=EOFError)

        def hear(number: int, frame: FrameType | None) -> None:
            nonlocal heard
            heard = True
            if app.loop is not None:
                app.loop.call_soon_threadsafe(leave)

        before = signal.signal(signal.SIGTERM, hear)
        try:
            yield leave
        finally:
            signal.signal(signal.SIGTERM, before)
            if heard:
                signal.raise_signal(signal.SIGTERM)

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add("enter")
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add(Keys.BracketedPaste)
        def paste(event: KeyPressEvent) -> None:
            buffer, text = event.current_buffer, event.data.replace("\r\n", "\n").replace("\r", "\n")
            if "\n" in text or not buffer.document.text_before_cursor.strip():
                self._pasted = True
            buffer.insert_text(text)

        return bindings


class _CommandCompleter(Completer):
    """The name of a command at the beginning of a message, and the path behind one that takes it."""

    def __init__(self, commands: Iterable[str], with_path: Iterable[str]) -> None:
        self._commands, self._with_path = sorted(commands), frozenset(with_path)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        name, space, path = before.partition(" ")
        if not space:
            for command in self._commands if before.startswith("/") else ():
                if command.startswith(before):
                    yield Completion(command, -len(before))
        elif name in self._with_path and "\n" not in path:
            for found in self._paths.get_completions(Document(path.lstrip()), complete_event):
                folder = os.path.isdir(os.path.expanduser(path.lstrip() + found.text))
                yield Completion(found.text + "/" * folder, found.start_position, found.display)


def can_edit() -> bool:
    """Whether the terminal can move its cursor."""
    return os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


def typed_lines() -> Callable[[], str | None]:
    """Reads plain lines, on a terminal that can do no more (TERM=dumb)."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    def read_line() -> str | None:
        try:
            return input(PROMPT)
        except EOFError:
            return None

    return read_line
