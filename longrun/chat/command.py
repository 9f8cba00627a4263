"""`python -m longrun.chat`: talk with a model about long texts, or ask one question with --prompt.

Answers go to stdout, everything else to stderr; with --json stdout gets one object and the answer's text goes to stderr
as it comes. Exit status as `longrun.cli` says, 1 also where a message of a chat met a defect of ours, and 143 after
SIGTERM; with --session the state is saved first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from longrun.arguments import COUNT, SEED, SHARE, check_text, real, whole
from longrun.chat.piped import stdin_bytes
from longrun.cli import EXIT_STATUS, INTERRUPTED, PLAN_OPTIONS, Parser, StdoutLost, run
from longrun.documents.document import Document
from longrun.documents.find import STDIN, Documents, read_documents
from longrun.errors import InputError
from longrun.interrupts import leaving_at_once
from longrun.paths import user_path
from longrun.runtime.model_options import add_model_options, load_model
from longrun.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from longrun.chat.answer import AnswerOptions
    from longrun.chat.runner import ChatRunner
    from longrun.plan.plan import Plan

_TERMINATED = 143


def chat_command(argv: Sequence[str] | None = None) -> int:
    """Run the chat; returns the exit status.

    Raises:
        LongrunError: bad arguments, files or folders, or a plan that does not fit.
    """
    args = _parser().parse_args(argv)
    interactive = args.interactive or (args.prompt is None and sys.stdin.isatty())
    if args.interactive and not sys.stdin.isatty():
        raise InputError("--interactive needs a terminal: leave it out for one answer to --prompt")
    if args.json and (args.prompt is None or interactive):
        raise InputError("--json needs --prompt without --interactive: it prints one answer and one JSON object")
    if args.prompt is not None and not check_text(args.prompt, "--prompt").strip():
        raise InputError("--prompt is empty: give a question")
    check_text(args.system or "", "--system")
    documents = _read_documents(args)
    capacity = None if args.ctx is None else parse_tokens(args.ctx, "--ctx")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad line becomes an error of that line
    with leaving_at_once():
        _import_libraries()
    from rich.console import Console

    from longrun.chat.runner import Terminated

    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120

    def on_sigterm(number: int, frame: Any) -> NoReturn:
        for heard in (signal.SIGTERM, signal.SIGINT):  # what is saved now is not interrupted again
            signal.signal(heard, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    for notice in documents.notices:
        console.print(f"note: {notice}", highlight=False, markup=False, soft_wrap=True)
    runner: ChatRunner | None = None
    try:
        runner = _make_runner(args, capacity, console)
        if args.prompt is not None and not interactive:
            return _answer_once(runner, documents.texts, args.prompt.strip(), args.json)
        return _chat(runner, documents.texts, args.prompt, interactive)
    except Terminated:
        if runner is not None:
            runner.save_if_kept()
        print("terminated", file=sys.stderr)
        return _TERMINATED
    except StdoutLost:
        if runner is not None:
            runner.save_if_kept()
        raise


def _read_documents(args: argparse.Namespace) -> Documents:
    """What --file names, and what is piped in beside --prompt: stdin then holds no messages."""
    if STDIN in args.file and args.prompt is None:
        raise InputError(f"--file {STDIN} reads stdin, which without --prompt holds the messages: give --prompt TEXT")
    if STDIN in args.file and sys.stdin.isatty():
        raise InputError(f"--file {STDIN} reads stdin, which is a terminal: pipe a text in, or name a file")
    if args.prompt is None or STDIN in args.file or sys.stdin.isatty():
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
    from longrun.chat.format import system_size
    from longrun.chat.progress import HeadMapProgress, PinProgress
    from longrun.chat.runner import ChatRunner, check_model
    from longrun.machine.measure import first_speeds
    from longrun.model.choice import choose_model
    from longrun.plan.report import print_plan
    from longrun.session.store import SessionStore

    def on_plan(plan: Plan) -> None:
        speeds = first_speeds(plan.device_type, lambda text: console.print(text, highlight=False, markup=False))
        print_plan(plan, console, speeds)

    def before_loading(plan: Plan) -> None:
        on_plan(plan)
        size = next(item.bytes for item in plan.items if item.name == "weights")
        console.print(f"loading {format_bytes(size)} of weights", highlight=False)

    options = _answer_options(args)
    folder = None if args.session is None else user_path(args.session, "--session")
    claimed = None
    if folder is not None:  # a folder that is no session, or another's, is refused before minutes of loading
        claimed = SessionStore(folder)
        claimed.claim()
    started = time.perf_counter()
    choice = choose_model(args.model, args.adapter, args.download)
    if choice.notice is not None:
        console.print(f"note: {choice.notice}", highlight=False, markup=False, soft_wrap=True)
    runtime = load_model(
        args,
        choice,
        capacity,
        session=folder,
        on_plan=before_loading,
        on_pin=PinProgress(console),
        on_head_map=HeadMapProgress(console),
        on_tokenizer=lambda tokenizer: check_model(tokenizer, choice.model_dir, args.system),
        system_size=lambda tokenizer: system_size(tokenizer, args.system),
    )
    promised = runtime.plan
    if claimed is not None:
        claimed.release()  # to the session
    runner = ChatRunner(runtime, options, console, args.system, folder, capacity)
    runner.load_seconds = time.perf_counter() - started
    plan = runner.session.plan
    if plan != promised:  # the session was saved with another capacity
        on_plan(plan)
    for notice in runtime.notices:
        if notice not in (*plan.notes, *plan.warnings):
            runner.tell(f"note: {notice}")
    return runner


def _answer_options(args: argparse.Namespace) -> AnswerOptions:
    from longrun.chat.answer import AnswerOptions
    from longrun.engine.sampling import SamplingParams
    from longrun.text.stream import StopStrings

    StopStrings(args.stop)
    sampling = SamplingParams(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.min_p)
    return AnswerOptions(args.max_new_tokens, sampling, tuple(args.stop), args.seed)


def _answer_once(runner: ChatRunner, documents: Sequence[Document], prompt: str, as_json: bool) -> int:
    from longrun.chat import answer

    try:
        runner.read(documents, prompt)
    except KeyboardInterrupt:
        unread = runner.conversation.unread
        runner.save_if_kept()
        runner.tell(f"reading stopped with {unread:,} tokens unread" + _how_to_go_on(runner))
        return INTERRUPTED
    emit = _emit_to_stderr if as_json else _emit
    report = runner.answer(emit, keep_unfinished=False)
    emit("\n")
    stop_reason = report.answer.stop_reason
    if stop_reason == answer.CONTEXT_FULL:
        runner.tell(
            f"the context is full ({runner.session.capacity:,} tokens) and ends the answer: give a larger --ctx"
        )
    elif stop_reason == answer.INTERRUPTED:
        runner.tell("the answer was stopped" + _how_to_go_on(runner))
    runner.tell(report.line())
    if as_json:
        _emit(json.dumps(report.to_dict()) + "\n")
    return INTERRUPTED if stop_reason == answer.INTERRUPTED else 0


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
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    def read_line() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    return read_line


def _emit(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _emit_to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m longrun.chat",
        description="Talk with a model about long texts. With --prompt: one answer on stdout, everything else on "
        "stderr. Without it: an interactive chat on a terminal; otherwise every line of stdin is a message or a "
        "command, and the exit status is 2 if one of them failed.",
        epilog=f"{EXIT_STATUS} After SIGTERM it is 143.",
    )
    add_model_options(parser)
    talk = parser.add_argument_group("what to talk about")
    talk.add_argument(
        "--file",
        action="extend",
        nargs="+",
        default=[],
        metavar="F",
        help="text to read first: files, folders, patterns like 'src/**/*.py', or - for stdin; repeatable",
    )
    talk.add_argument("--prompt", metavar="TEXT", help="answer this one question and leave")
    talk.add_argument("--interactive", action="store_true", help="stay in the chat after --prompt (on a terminal)")
    talk.add_argument("--system", metavar="TEXT", help="system prompt (default: the chat template's own)")
    talk.add_argument(
        "--session", metavar="DIR", help="keep the session in this folder, and resume the one that is in it"
    )
    answer = parser.add_argument_group("answers")
    answer.add_argument("--max-new-tokens", type=COUNT, default=512, metavar="N", help="default: 512")
    answer.add_argument("--temperature", type=real(0), default=0.0, metavar="T", help="default: 0, the likeliest token")
    answer.add_argument("--top-k", type=whole(), default=0, metavar="K", help="default: 0, all tokens")
    answer.add_argument("--top-p", type=real(0, 1, above=True), default=1.0, metavar="P", help="default: 1, all tokens")
    answer.add_argument(
        "--min-p",
        type=SHARE,
        default=0.0,
        metavar="P",
        help="leave out tokens less than P times as probable as the likeliest one (default: 0, none)",
    )
    penalty = real(0, above=True)
    answer.add_argument("--repetition-penalty", type=penalty, default=1.0, metavar="X", help="default: 1, none")
    answer.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STR",
        help="end before this text or control token; repeatable",
    )
    answer.add_argument(
        "--seed",
        type=SEED,
        metavar="N",
        help="of random draws (default: new for every answer, and printed)",
    )
    answer.add_argument(
        "--json",
        action="store_true",
        help="stdout gets one line of JSON alone: answer, counts, what was resumed, plan; the text streams to stderr "
        "(with --prompt)",
    )
    return parser


def main() -> None:
    """Entry point of `longrun-chat`."""
    run(chat_command, PLAN_OPTIONS)
