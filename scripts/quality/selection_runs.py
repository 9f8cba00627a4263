"""What the measurements over the product's own steps share: options, the model, facts of a run, and how decode steps
predict a text's rows."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longrun
from longrun.arguments import COUNT
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.answered import AnsweredText
from longrun.lab.quality.code_source import source_facts
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
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
    """The lengths that are asked for, in tokens, and a runtime for the longest, which reads all pages, of texts too."""
    lengths = [parse_tokens(one, "--lengths") for one in args.lengths.split(",")]
    runtime = longrun.load(
        args.model, args.budget, args.head_map, args.kv, args.weights, args.device, ctx=max(lengths),
        yarn=args.yarn, adapter=args.adapter, select="off", prefill="exact",
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


def with_last_rows(text: AnsweredText, count: int) -> AnsweredText:
    """The text looked at where the last `count` tokens of its document are predicted."""
    return replace(text, text_rows=torch.arange(text.document_length - 1 - count, text.document_length - 1))


def decoded_rows(session: Session, text: AnsweredText, select_question: bool = False) -> tuple[Tensor, float]:
    """Predict the text's rows one by one with decode steps; questions are read in chunks.

    Args:
        session: stands at the first of the text's rows, that token included.
        select_question: questions are read one by one, too.

    Returns:
        float32 [rows, vocab_size] log-probabilities on the CPU, and milliseconds a token of text, logits copied.
    """
    parts, seconds = [], 0.0
    for rows in (text.text_rows, *(rows for _, rows in text.answers)):
        begin, end = int(rows[0]) + 1, int(rows[-1]) + 2
        if begin > session.num_tokens:
            session.prefill(text.ids[session.num_tokens : begin], one_by_one=select_question, sparse=False)
        began = time.perf_counter()
        scored = session.score(text.ids[begin:end], one_by_one=True)
        parts.append(scored.cpu().log_softmax(-1))
        if rows is text.text_rows:
            seconds = time.perf_counter() - began
    return torch.cat(parts), 1e3 * seconds / len(text.text_rows)
