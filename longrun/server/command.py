"""`python -m longrun.server`: an OpenAI-compatible server over one model.

stdout gets one line, the address, when the server answers; everything else goes to stderr. Exit status as `longrun.cli`
says, and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrun.arguments import COUNT, real, whole
from longrun.cli import EXIT_STATUS, PLAN_OPTIONS, Parser, run
from longrun.errors import InputError, LongrunError
from longrun.interrupts import leaving_at_once
from longrun.paths import path_option
from longrun.runtime.model_options import add_model_options, load_model
from longrun.specs.cache_spec import MOST_MARKS
from longrun.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from longrun.plan.plan import Plan
    from longrun.runtime.runtime import Runtime

_TERMINATED = 143
_LOOPBACK = "127.0.0.1"
_DEFAULT_PORT, _MARKS = 8000, 16
_KEY_VARIABLE = "LONGRUN_API_KEY"
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 10**6, 32


def server_command(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Raises:
        LongrunError: bad arguments, a model that cannot be loaded, an address that cannot be used.
    """
    args = _parser().parse_args(argv)
    capacity = None if args.ctx is None else parse_tokens(args.ctx, "--ctx")
    with leaving_at_once():
        _import_libraries()
    from rich.console import Console

    from longrun.server.guard import check_exposure, checked_key
    from longrun.server.service import Limits
    from longrun.server.serving import Serving, Terminated, listening_socket, terminate_on_sigterm

    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120
    terminate_on_sigterm()
    key = checked_key(args.api_key, "--api-key") or checked_key(os.environ.get(_KEY_VARIABLE), _KEY_VARIABLE)
    try:
        with listening_socket(args.host, args.port) as bound:
            host, port = bound.getsockname()[:2]
            check_exposure(host, key, args.cors)
            runtime, name = _load(args, capacity, console)
            body_bytes = args.max_body or _BODY_BYTES + _BODY_BYTES_PER_TOKEN * runtime.plan.capacity
            limits = Limits(args.max_new_tokens, args.time_limit, body_bytes, unpacked_bytes=args.max_unpacked)
            serving = Serving(runtime, name, limits, args.queue, key, args.cors, args.documents)
            root = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            told = f"serving {name}: in a browser at {root}/, for programs at {root}/v1; Ctrl-C ends it"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
            bound.listen()  # who reads the address may ask at once
            print(f"{root}/v1", flush=True)
            serving.run(bound)
    except Terminated:
        console.print("terminated", highlight=False)
        return _TERMINATED
    return 0


def _import_libraries() -> None:
    """All that takes long to import, here rather than where it is needed first.

    Raises:
        LongrunError: the packages of the server are not installed.
    """
    import transformers

    import longrun.runtime.load

    try:
        import longrun.server.serving  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longrun"):
            raise
        raise LongrunError(
            f"the server needs the package {error.name}: install longrun with what it serves with, "
            f"pip install 'longrun[serve]'"
        ) from None
    transformers.AutoTokenizer, transformers.GenerationConfig, transformers.PreTrainedTokenizerFast  # noqa: B018


def _load(args: argparse.Namespace, capacity: int | None, console: Console) -> tuple[Runtime, str]:
    """The runtime, and the id under which it is served."""
    from longrun.model.choice import choose_model
    from longrun.plan.report import print_plan

    def on_plan(plan: Plan) -> None:
        print_plan(plan, console)
        size = next(item.bytes for item in plan.items if item.name == "weights")
        console.print(f"loading {format_bytes(size)} of weights", highlight=False)

    def note(text: str) -> None:
        console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)

    choice = choose_model(args.model, args.adapter, args.download)
    if choice.notice is not None:
        note(choice.notice)
    runtime = load_model(
        args, choice, capacity, marks=args.marks, serves=True, on_plan=on_plan, system_size=_no_system_prompt
    )
    if runtime.tokenizer is None:
        raise InputError(f"{choice.model_dir} has no tokenizer: a server needs one, add the model's tokenizer files")
    if (fewer := fewer_marks(args.marks, runtime.plan.cache.marks)) is not None:
        note(fewer)
    for notice in runtime.notices:
        if notice not in (*runtime.plan.notes, *runtime.plan.warnings):
            note(notice)
    return runtime, args.name or choice.model_dir.resolve().name.removesuffix(".gguf")


def fewer_marks(asked: int, planned: int) -> str | None:
    """What it means where memory is planned for fewer marks than were asked for, as with --kv-bytes; or None."""
    if planned >= asked:
        return None
    return (
        f"with --kv-bytes there is memory for {planned} marks, not for {asked}: a request goes on where the one before "
        f"ended, but another question over the same text reads it again, unless it is a document (--documents)"
    )


def _no_system_prompt(_: object) -> int:
    raise InputError("keep system is for one system prompt, and every request brings its own: give a number of tokens")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m longrun.server",
        description="Serve a model to OpenAI's clients, on this machine. One request is answered at a time; the others "
        "wait in the order in which they came. See docs/server.md.",
        epilog=f"{EXIT_STATUS} After SIGTERM it is 143.",
    )
    add_model_options(parser)
    serve = parser.add_argument_group("serving")
    serve.add_argument(
        "--port", type=whole(0, 65535), default=_DEFAULT_PORT, metavar="N",
        help=f"default: {_DEFAULT_PORT}; 0 takes a free one",
    )  # fmt: skip
    serve.add_argument(
        "--host", default=_LOOPBACK, metavar="ADDRESS", help=f"default: {_LOOPBACK}; any other needs a key"
    )
    serve.add_argument(
        "--api-key", metavar="KEY",
        help=f"what clients must send (default: {_KEY_VARIABLE} of the environment, which other users do not see)",
    )  # fmt: skip
    serve.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN",
        help="web page that may ask, like http://localhost:3000; repeatable (default: none)",
    )  # fmt: skip
    serve.add_argument("--name", metavar="ID", help="id of the model (default: the name of its folder or file)")
    serve.add_argument(
        "--documents", type=path_option, metavar="FOLDER",
        help="keep documents that clients put, and their sessions, in this folder (default: none are taken)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--marks", type=whole(1, MOST_MARKS), default=_MARKS, metavar="N",
        help=f"points from which a request can continue an earlier one (default: {_MARKS}, or 2 with --kv-bytes)",
    )  # fmt: skip
    limits.add_argument("--queue", type=COUNT, default=64, metavar="N", help="requests that may wait (default: 64)")
    limits.add_argument(
        "--max-new-tokens", type=COUNT, default=4096, metavar="N",
        help="tokens of an answer whose request does not say how many (default: 4096, or what the context leaves)",
    )  # fmt: skip
    limits.add_argument(
        "--time-limit", type=real(0, above=True), default=6 * 3600.0, metavar="SECONDS",
        help="for a request, its time in the queue included (default: 21600, 6 hours)",
    )  # fmt: skip
    limits.add_argument(
        "--max-body", type=COUNT, metavar="BYTES",
        help=f"of a request (default: {_BODY_BYTES_PER_TOKEN} for every token of the context, and a million)",
    )  # fmt: skip
    limits.add_argument(
        "--max-unpacked", type=COUNT, metavar="BYTES",
        help="of the files in an archive that is put as a document (default: 4 times --max-body)",
    )  # fmt: skip
    return parser


def main() -> None:
    """Entry point of `longrun-serve`."""
    run(server_command, PLAN_OPTIONS)
