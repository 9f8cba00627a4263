"""The options of `python -m longrun.chat`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from longrun.arguments import COUNT, SEED, SHARE, check_text, real, whole
from longrun.cli import EXIT_STATUS, Parser
from longrun.documents.find import STDIN
from longrun.errors import InputError, quoted
from longrun.plan.selection import SELECT_QUESTION_HELP
from longrun.runtime.model_options import add_model_options


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, those that exclude each other refused.

    Raises:
        InputError: an option or a combination that cannot be used.
    """
    args = _parser().parse_args(argv)
    _check(args)
    return args


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
    talk.add_argument(
        "--ask",
        metavar="FILE",
        help="answer each question of this file (one a line, or JSON lines; - for stdin) as if it were the only one: "
        "the texts are read once",
    )
    talk.add_argument("--interactive", action="store_true", help="stay in the chat after --prompt (on a terminal)")
    talk.add_argument("--system", metavar="TEXT", help="system prompt (default: the chat template's own)")
    talk.add_argument(
        "--template-option",
        action="append",
        default=[],
        type=template_option,
        metavar="NAME=VALUE",
        help="an option of the model's chat template, like enable_thinking=false; repeatable",
    )
    talk.add_argument(
        "--session", metavar="DIR", help="keep the session in this folder, and resume the one that is in it"
    )
    talk.add_argument("--select-question", action="store_true", help=SELECT_QUESTION_HELP)
    answer = parser.add_argument_group("answers")
    answer.add_argument("--max-new-tokens", type=COUNT, default=512, metavar="N", help="default: 512")
    answer.add_argument(
        "--sampling",
        choices=("likeliest", "model"),
        default="likeliest",
        help="what the options below begin from: always the likeliest token (the default), or what the model's own "
        "files say",
    )
    answer.add_argument("--temperature", type=real(0), metavar="T", help="default: 0, the likeliest token")
    answer.add_argument("--top-k", type=whole(), metavar="K", help="default: 0, all tokens")
    answer.add_argument("--top-p", type=real(0, 1, above=True), metavar="P", help="default: 1, all tokens")
    answer.add_argument(
        "--min-p",
        type=SHARE,
        metavar="P",
        help="leave out tokens less than P times as probable as the likeliest one (default: 0, none)",
    )
    penalty = real(0, above=True)
    answer.add_argument("--repetition-penalty", type=penalty, metavar="X", help="default: 1, none")
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
        help="stdout gets one line of JSON alone: answer, counts, what was resumed, plan; with --ask one for each "
        "question; the text streams to stderr",
    )
    return parser


def template_option(text: str) -> tuple[str, Any]:
    """The `type` of --template-option: a name, and its value as JSON or else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no option: write NAME=VALUE, like enable_thinking=false")
    lowered = value.lower()
    try:
        return name, json.loads(lowered if lowered in ("true", "false", "null") else value)
    except (ValueError, RecursionError):
        return name, value


def _check(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.ask is not None:
        raise InputError("--ask and --prompt exclude each other: put the question into the file, or leave one out")
    if args.interactive and args.ask is not None:
        raise InputError("--ask answers and leaves: leave --interactive out")
    if args.interactive and not sys.stdin.isatty():
        raise InputError("--interactive needs a terminal: leave it out for one answer to --prompt")
    args.interactive |= args.prompt is None and args.ask is None and sys.stdin.isatty()
    if args.json and ((args.prompt is None and args.ask is None) or args.interactive):
        raise InputError("--json needs --prompt without --interactive, or --ask: a JSON object for each answer")
    if args.prompt is not None and not check_text(args.prompt, "--prompt").strip():
        raise InputError("--prompt is empty: give a question")
    check_text(args.system or "", "--system")
    for name, value in args.template_option:
        check_text(f"{name}={value}", "--template-option")
    if STDIN in args.file and args.ask == STDIN:
        raise InputError(f"--file {STDIN} and --ask {STDIN} both read stdin: put one of them into a file")
    if STDIN in args.file and args.prompt is None and args.ask is None:
        raise InputError(f"--file {STDIN} reads stdin, which without --prompt holds the messages: give --prompt TEXT")
    if STDIN in args.file and sys.stdin.isatty():
        raise InputError(f"--file {STDIN} reads stdin, which is a terminal: pipe a text in, or name a file")
