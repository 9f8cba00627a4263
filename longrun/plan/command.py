"""`python -m longrun.plan`: the memory plan of a model, from its config.json or GGUF header alone."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, ConsoleDimensions

from longrun.arguments import SHARE
from longrun.cli import EXIT_STATUS, PLAN_OPTIONS, Parser, run
from longrun.hub.find import add_yarn_option
from longrun.machine.speeds import known_speeds
from longrun.plan.budget import Budget, shipped_budgets
from longrun.plan.hot_pool import HOT_POOL_HELP, parse_hot_pool
from longrun.plan.kernels import check_kernel_shapes
from longrun.plan.plan import NoFitError, make_plan
from longrun.plan.prefill import add_prefill_options, budget_with_prefill
from longrun.plan.report import print_plan
from longrun.plan.selection import SELECT_FROM_HELP, SELECT_HELP, parse_select, parse_select_from
from longrun.plan.shapes import SHAPES, config_of
from longrun.plan.split import KEEP_HELP, KV_BYTES_HELP, budget_by_hand, choose_split, parse_keep
from longrun.plan.times import predict
from longrun.quant.kv_format import KV_FORMATS, KV_HELP
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import parse_dense_tokens
from longrun.units import TOKENS, parse_tokens


def plan_command(argv: Sequence[str] | None = None) -> int:
    """Print a plan as a table, or as one JSON object with --json; the exit status is 0.

    Raises:
        LongrunError: bad arguments or files, or a plan that does not fit (with --json an object that says so is
            printed first).
    """
    options = _parser().parse_args(argv)
    config, key_biases, note = config_of(options.model)
    config = config.stretched(options.yarn)
    budget = Budget.load(options.budget).override(
        kv_format=options.kv, weight_format=options.weights, chunk_size=options.chunk_size
    )
    budget = budget_by_hand(budget, options.retrieval_ratio, options.kv_bytes)
    budget = budget.override(
        keep=None if options.keep is None else parse_keep(options.keep, "--keep"),
        pages_per_head=None if options.select is None else parse_select(options.select, "--select"),
        select_from=None if options.select_from is None else parse_select_from(options.select_from, "--select-from"),
        hot_pool=None if options.hot_pool is None else parse_hot_pool(options.hot_pool, "--hot-pool"),
    )
    dense = options.prefill_dense
    dense = None if dense is None else parse_dense_tokens(dense, "--prefill-dense")
    budget = budget_with_prefill(budget, options.prefill, options.prefill_share, options.prefill_mass, dense)
    capacity = None if options.ctx is None else parse_tokens(options.ctx, "--ctx")
    device_type = options.device or ("cpu" if options.budget == "cpu" else "cuda")
    if device_type == "cuda":
        check_kernel_shapes(config, budget)
    split = choose_split(config, budget, options.head_map, options.retrieval_ratio, assume=True, capacity=capacity)
    try:
        plan = make_plan(config, budget, capacity, split=split, device_type=device_type, key_biases=key_biases)
        plan = replace(plan, notes=(*plan.notes, *([] if note is None else [note])))
    except NoFitError as error:
        if options.json:
            print(json.dumps(error.to_dict(PLAN_OPTIONS)))
        raise
    speeds = known_speeds(device_type, budget.source)
    if options.json:
        times = predict(plan, speeds)
        print(json.dumps({**plan.to_dict(), "times": None if times is None else times.to_dict()}))
    else:
        print_plan(plan, _console(), speeds)
    return 0


def _console() -> Console:
    """stdout; where it is no terminal and COLUMNS says nothing, wide enough for the whole table."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    elif console.is_dumb_terminal:  # rich takes 80 columns then
        console.size = ConsoleDimensions(*shutil.get_terminal_size((80, 25)))
    return console


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m longrun.plan",
        description="Memory plan of a model at a context length, byte by byte: config.json or a GGUF header is enough.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_NAME",
        help=f"checkpoint folder, GGUF file or name on the Hugging Face hub (user/repo), of which only config.json or "
        f"the GGUF header is read or fetched, or a shape: {', '.join(SHAPES)}",
    )
    add_yarn_option(parser)
    parser.add_argument("--ctx", metavar="TOKENS", help="context, like 128K or 3.3M (default: the trained window)")
    parser.add_argument(
        "--budget",
        default="cpu",
        metavar="NAME_OR_FILE",
        help=f"a TOML file or one of {', '.join(shipped_budgets())} (default: cpu)",
    )
    parser.add_argument("--head-map", metavar="DIR|full", help="head map folder (default: full attention)")
    parser.add_argument(
        "--retrieval-ratio",
        type=SHARE,
        metavar="R",
        help="share of the KV heads that keep all tokens; without a head map it is assumed to be reached",
    )
    parser.add_argument("--kv-bytes", metavar="SIZE", help=KV_BYTES_HELP)
    parser.add_argument("--keep", metavar="N", help=f"{KEEP_HELP} (default: the budget's, else the head map's sinks)")
    parser.add_argument("--select", metavar="N|P%|off", help=f"{SELECT_HELP} (default: the budget's, else off)")
    parser.add_argument("--select-from", metavar="N", help=SELECT_FROM_HELP)
    parser.add_argument("--hot-pool", metavar="SIZE|off", help=f"{HOT_POOL_HELP} (default: the budget's, else off)")
    add_prefill_options(parser)
    parser.add_argument("--kv", choices=KV_FORMATS, help=f"{KV_HELP} (default: the budget's)")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="format of weights (default: the budget's)")
    parser.add_argument(
        "--chunk-size", type=TOKENS, metavar="N", help="tokens of a prefill step, like 32K (default: the budget's)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu for the budget cpu, else cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main() -> None:
    """Entry point of `longrun-plan`."""
    run(plan_command, PLAN_OPTIONS)
