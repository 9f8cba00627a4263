"""What the measurements over the product's own selecting decode steps share: options, the model, facts of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import longrun
from longrun.arguments import COUNT
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.code_source import source_facts
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.runtime.runtime import Runtime
from longrun.units import parse_tokens


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, how it is loaded, and which texts."""
    parser.add_argument("--model", required=True, type=path_option)
    add_yarn_option(parser)
    parser.add_argument("--adapter", type=path_option)
    parser.add_argument("--head-map", default="full", help="default: every head reads all")
    parser.add_argument("--kv", help="page format")
    parser.add_argument("--weights")
    parser.add_argument("--device")
    parser.add_argument("--budget", help="memory budget")
    parser.add_argument("--lengths", default="8K", metavar="4K,8K,...")
    parser.add_argument("--texts", type=COUNT, default=1, help="of every length")


def load_unselected(args: argparse.Namespace) -> tuple[list[int], Runtime]:
    """The lengths that are asked for, in tokens, and a runtime for the longest, which reads all pages."""
    lengths = [parse_tokens(one, "--lengths") for one in args.lengths.split(",")]
    runtime = longrun.load(
        args.model, args.budget, args.head_map, args.kv, args.weights, args.device, ctx=max(lengths),
        yarn=args.yarn, adapter=args.adapter, select="off",
    )  # fmt: skip
    return lengths, runtime


def run_facts(args: argparse.Namespace, base: Runtime) -> dict[str, Any]:
    """JSON-able: what was run, on what."""
    return {
        "model": model_name(Path(args.model)), "yarn": args.yarn,
        "adapter": None if args.adapter is None else args.adapter.name, "head_map": args.head_map,
        "kv_format": base.plan.kv_format, "texts": args.texts, "tokens": args.tokens, "code": source_facts(),
        "environment": environment(),
    }  # fmt: skip
