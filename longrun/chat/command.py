"""`python -m longrun.chat`: talk with a model about long texts, or ask one question with --prompt.

Answers go to stdout, everything else to stderr; with --json stdout gets one object and the answer's text goes to stderr
as it comes. Exit status as `longrun.cli` says, 1 also where a message of a chat met a defect of ours, and 143 after
SIGTERM; with --session the state is saved first.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from longrun.chat.options import read_options
from longrun.chat.piped import stdin_bytes
from longrun.chat.questions import Question, read_questions, stdin_questions
from longrun.cli import BAD_INPUT, INTERRUPTED, PLAN_OPTIONS, StdoutLost, run
from longrun.documents.document import Document
from longrun.documents.find import STDIN, Documents, read_documents
from longrun.errors import InputError, short_path
from longrun.interrupts import leaving_at_once
from longrun.paths import user_path
from longrun.runtime.model_options import load_model
from longrun.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from longrun.chat.runner import ChatRunner
    from longrun.engine.sampling import SamplingParams
    from longrun.plan.plan import Plan

_TERMINATED = 143
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Terminated(BaseException):
    """SIGTERM was received: save what can be saved and leave."""


def chat_command(argv: Sequence[str] | None = None) -> int:
    """Run the chat; returns the exit status.

    Raises:
        LongrunError: bad arguments, files or folders, or a plan that does not fit.
    """
    args = read_options(argv)
    questions = None if args.ask in (None, STDIN) else read_questions(args.ask)
    documents = _read_documents(args)
    capacity = None if args.ctx is None else parse_tokens(args.ctx, "--ctx")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad line becomes an error of that line
    with leaving_at_once():
        _import_libraries()
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120

    for notice in documents.notices:
        console.print(f"note: {notice}", highlight=False, markup=False, soft_wrap=True)
    with _raising_on_sigterm():
        return _run(args, capacity, console, documents, questions)


def _run(
    args: argparse.Namespace,
    capacity: int | None,
    console: Console,
    documents: Documents,
    questions: list[Question] | None,
) -> int:
    runner: ChatRunner | None = None
    try:
        runner = _make_runner(args, capacity, console)
        if args.ask is not None:
            return _answer_all(runner, documents.texts, questions or stdin_questions(), args.json)
        if args.prompt is not None and not args.interactive:
            return _answer_once(runner, documents.texts, args.prompt.strip(), args.json)
        return _chat(runner, documents.texts, args.prompt, args.interactive)
    except Terminated:
        if runner is not None:
            runner.save_if_kept()
        print("terminated", file=sys.stderr)
        return _TERMINATED
    except StdoutLost:
        if runner is not None:
            runner.save_if_kept()
        raise


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` until the block ends; once it has come, it and SIGINT are ignored for good."""

    def on_sigterm(number: int, frame: Any) -> NoReturn:
        for heard in (signal.SIGTERM, signal.SIGINT):  # what is saved now is not interrupted again
            signal.signal(heard, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is on_sigterm:
            signal.signal(signal.SIGTERM, before)


def _read_documents(args: argparse.Namespace) -> Documents:
    """What --file names, and what is piped in beside --prompt or --ask FILE: stdin then holds no messages."""
    takes_no_messages = args.prompt is not None or args.ask not in (None, STDIN)
    if not takes_no_messages or STDIN in args.file or sys.stdin.isatty():
        return read_documents(args.file, stdin_bytes)
    raw = stdin_bytes()
    return read_documents([*args.file, STDIN], lambda: raw) if raw.strip() else read_documents(args.file)


def _import_libraries() -> None:
    """All that takes long to import, here rather than where it is needed first."""
    import rich.console  # noqa: F401
    import transformers

    import longrun.chat.runner
    import longrun.runtime.load  # noqa: F401

    transformers.AutoTokenizer, transformers.GenerationConfig, transformers.PreTrainedTokenizerFast  # noqa: B018


def _make_runner(args: argparse.Namespace, capacity: int | None, console: Console) -> ChatRunner:
    """Print the plan, load the model, then the session; say what else a person should know."""
    from longrun.chat.answer import AnswerOptions
    from longrun.chat.progress import HeadMapProgress, PinProgress
    from longrun.chat.runner import ChatRunner, check_model
    from longrun.machine.measure import first_speeds
    from longrun.model.choice import choose_model
    from longrun.plan.report import print_plan
    from longrun.session.store import SessionStore
    from longrun.text.chat_format import system_size
    from longrun.text.stream import StopStrings

    def on_plan(plan: Plan) -> None:
        speeds = first_speeds(plan.device_type, lambda text: console.print(text, highlight=False, markup=False))
        print_plan(plan, console, speeds)

    def before_loading(plan: Plan) -> None:
        if args.select_question and plan.attention.selection is None:
            raise InputError("--select-question needs pages to select: give --select N, or leave it out")
        on_plan(plan)
        size = next(item.bytes for item in plan.items if item.name == "weights")
        console.print(f"loading {format_bytes(size)} of weights", highlight=False)

    StopStrings(args.stop)
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    template_options = dict(args.template_option)
    folder = None if args.session is None else user_path(args.session, "--session")
    claimed = None
    if folder is not None:  # a folder that is no session, or another's, is refused before minutes of loading
        claimed = SessionStore(folder)
        claimed.claim()
    started = time.perf_counter()
    choice = choose_model(args.model, args.adapter, args.download)
    if choice.notice is not None:
        console.print(f"note: {choice.notice}", highlight=False, markup=False, soft_wrap=True)
    sampling = _sampling(args.sampling, given, choice.model_dir, console)
    options = AnswerOptions(args.max_new_tokens, sampling, tuple(args.stop), args.seed)
    runtime = load_model(
        args,
        choice,
        capacity,
        session=folder,
        on_plan=before_loading,
        on_pin=PinProgress(console),
        on_head_map=HeadMapProgress(console),
        on_tokenizer=lambda tokenizer: check_model(tokenizer, choice.model_dir, args.system, template_options),
        system_size=lambda tokenizer: system_size(tokenizer, args.system, template_options),
    )
    promised = runtime.plan
    if claimed is not None:
        claimed.release()  # to the session
    runner = ChatRunner(
        runtime, options, console, args.system, folder, capacity, template_options, args.select_question
    )
    runner.load_seconds = time.perf_counter() - started
    plan = runner.session.plan
    if plan != promised:  # the session was saved with another capacity
        on_plan(plan)
    for notice in runtime.notices:
        if notice not in (*plan.notes, *plan.warnings):
            runner.tell(f"note: {notice}")
    return runner


def _sampling(base: str, given: dict[str, Any], model_dir: Path, console: Console) -> SamplingParams:
    """The options that were given, over what the model's own files say where `base` is "model"."""
    from longrun.engine.sampling import SamplingParams
    from longrun.model.sampling_defaults import read_sampling_defaults

    sampling = SamplingParams(**given)
    if base != "model":
        return sampling
    defaults = read_sampling_defaults(model_dir)
    try:
        sampling = SamplingParams(**{**defaults.settings, **given})
    except InputError as error:
        raise InputError(f"{short_path(defaults.source)}: {error}") from None
    over = f"; given here: {', '.join(given)}" if given else ""
    console.print(
        f"note: sampling as {short_path(defaults.source)} says: {defaults.told()}{over}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return sampling


def _answer_once(runner: ChatRunner, documents: Sequence[Document], prompt: str, as_json: bool) -> int:
    from longrun.chat import answer

    try:
        runner.talk.read(documents, prompt)
    except KeyboardInterrupt:
        return _reading_stopped(runner)
    emit = _emit_to_stderr if as_json else _emit
    report = runner.answer(emit, keep_unfinished=False)
    emit("\n")
    stop_reason = report.answer.stop_reason
    if stop_reason == answer.CONTEXT_FULL:
        runner.tell(
            f"the context is full ({runner.session.capacity:,} tokens) and ends the answer: give a larger --ctx"
        )
    elif stop_reason == answer.MAX_NEW_TOKENS:
        kept = ", or go on in the chat with --interactive and /continue" if runner.is_kept else ""
        runner.tell(f"the answer was cut after {report.answer.num_tokens:,} tokens: give more --max-new-tokens{kept}")
    elif stop_reason == answer.INTERRUPTED:
        runner.tell("the answer was stopped" + _how_to_go_on(runner))
    runner.tell(report.line())
    if as_json:
        _emit(json.dumps(report.to_dict() | {"looked_at": runner.looked_at()}) + "\n")
    return INTERRUPTED if stop_reason == answer.INTERRUPTED else 0


def _answer_all(
    runner: ChatRunner, documents: Sequence[Document], questions: Iterable[Question | InputError], as_json: bool
) -> int:
    from longrun.chat.ask import Asker

    asker = Asker(runner, _emit, _emit_to_stderr, as_json)
    try:
        whole = asker.run(documents, questions)
    except KeyboardInterrupt:
        return _reading_stopped(runner)
    if not whole:
        return INTERRUPTED
    if not asker.answered + asker.errors:
        raise InputError("stdin holds no question: pipe in one a line, as text or as JSON")
    return BAD_INPUT if asker.errors else 0


def _reading_stopped(runner: ChatRunner) -> int:
    unread = runner.conversation.unread
    runner.save_if_kept()
    runner.tell(f"reading stopped with {unread:,} tokens unread" + _how_to_go_on(runner) if unread else "stopped")
    return INTERRUPTED


def _how_to_go_on(runner: ChatRunner) -> str:
    return ": the same command resumes there" if runner.is_kept else " (--session DIR would have kept them)"


def _chat(runner: ChatRunner, documents: Sequence[Document], prompt: str | None, interactive: bool) -> int:
    from longrun.chat.loop import ChatLoop

    if interactive:
        runner.tell("type a message, or /help; Ctrl-D leaves")
    loop = ChatLoop(runner, _line_reader(interactive), sys.stdout, interactive)
    try:
        loop.run(documents, prompt)
    except KeyboardInterrupt:
        runner.save_if_kept()
        return 0 if interactive else INTERRUPTED
    runner.save_if_kept()
    if interactive:
        print(file=sys.stderr)
        return 0
    if not loop.turns:
        raise InputError(
            "stdin holds no question and is no terminal: pass --prompt TEXT, or pipe in one message a line"
        )
    return 1 if loop.defects else 2 if loop.errors else 0


def _line_reader(interactive: bool) -> Callable[[], str | None]:
    if not interactive:
        return lambda: sys.stdin.readline() or None
    from longrun.chat.loop import COMMANDS
    from longrun.chat.terminal import Terminal, can_edit, typed_lines

    if not can_edit():
        return typed_lines()
    return Terminal(COMMANDS, (name for name, takes_path in COMMANDS.items() if takes_path)).read


def _emit(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _emit_to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def main() -> None:
    """Entry point of `longrun-chat`."""
    run(chat_command, PLAN_OPTIONS)
