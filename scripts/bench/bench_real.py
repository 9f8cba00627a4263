"""A real model over real code, on a GPU or a CPU: loading, reading, answering, decoding, and transformers beside it."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from rich.console import Console
from rich.table import Table

from longrun.arguments import COUNT
from longrun.errors import InputError
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.paths import path_option
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.units import format_bytes
from scripts.bench.bench_common import (
    add_model_options,
    check_device,
    figure,
    finish_timed,
    memory_text,
    parse_lengths,
    percent,
    save,
    tokens_text,
)
from scripts.bench.real_parts import ceilings_part, in_child, longrun_part, transformers_part
from scripts.bench.real_text import as_questions, read_code


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of the command `real`."""
    add_model_options(sub)
    add_yarn_option(sub)
    sub.add_argument(
        "--weight-formats", default="int4,bf16", help="longrun's, one after the other; --weight-format is not used"
    )
    sub.add_argument("--lengths", default="8K,30K", help="tokens read")
    sub.add_argument(
        "--text", type=path_option, metavar="FILE|DIR",
        help="text file, or folder whose .py files are read (default: modules of Python's standard library)",
    )  # fmt: skip
    sub.add_argument("--question", action="append", help="asked after the text; needs --expect, may be repeated")
    sub.add_argument("--expect", action="append", metavar="STRING", help="what a right answer to it holds")
    sub.add_argument("--new-tokens", type=COUNT, default=64, help="tokens timed in one repeat")
    sub.add_argument("--repeats", type=COUNT, default=1, help="repeats, one after the other in the same session")
    sub.add_argument("--skip-transformers", action="store_true", help="longrun only")


def run(args: argparse.Namespace) -> int:
    """The command `real`."""
    check_device(args.device)
    formats = [name.strip() for name in args.weight_formats.split(",") if name.strip()]
    if not parse_lengths(args.lengths) or not formats:
        raise InputError("real needs a length and a weight format: give --lengths 8K --weight-formats int4")
    if unknown := [name for name in formats if name not in WEIGHT_FORMATS]:
        raise InputError(f"--weight-formats {unknown[0]} is no weight format: give {', '.join(WEIGHT_FORMATS)}")
    code, name = read_code(args.text)
    as_questions(args.question, args.expect)
    result: dict[str, Any] = {
        "benchmark": "real", "model": model_name(args.model), "new_tokens": args.new_tokens, "repeats": args.repeats,
        "yarn": args.yarn,
        "text": {"name": name, "sha256": hashlib.sha256(code.encode()).hexdigest()},
        "ceilings": {}, "settings": {}, "loads": [], "rows": [], "answers": [],
    }  # fmt: skip
    save(result, args)
    given = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "run"})
    for kind, found in in_child(ceilings_part, given):
        if kind == "failed":
            raise InputError(f"the ceilings, of which every figure is a share, could not be measured: {found}")
        result["ceilings"] = found
    parts = [(f"longrun {name} weights", longrun_part, name) for name in formats]
    if not args.skip_transformers:
        parts.append(("transformers", transformers_part, None))
    for runner, part, weight_format in parts:
        given.weight_format = weight_format
        for kind, found in in_child(part, given, result["ceilings"]):
            note(result, runner, kind, found)
            save(result, args)
    for table in (load_table(result["loads"]), row_table(result["rows"]), answer_table(result["answers"])):
        Console(width=160).print(table)
    return finish_timed(result, args)


def note(result: dict[str, Any], runner: str, kind: str, found: Any) -> None:
    """Put what a part found where it belongs, and say what it is."""
    if kind == "settings":
        result["settings"][runner] = found
        return
    found = {"runner": runner, "error": found} if kind == "failed" else found
    result["rows" if kind == "failed" else f"{kind}s"].append(found)
    if "error" in found:
        told = found["error"]
    elif kind == "load":
        told = f"loaded in {found['seconds']:.1f} s"
    elif kind == "answer":
        told = f"{found['question']} {found['answer']!r}, {'right' if found['right'] else 'wrong'}"
    else:
        speeds = f"{found['tokens_per_s']:.0f} tokens/s, {found['ms']['median']:.2f} ms a token"
        told = f"{tokens_text(found['length'])}: {speeds}"
    print(f"{runner}: {told}", flush=True)


def load_table(loads: list[dict[str, Any]]) -> Table:
    table = Table("runner", "loaded in, s", "phases, s", "device memory", "peak of host memory")
    for row in loads:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.get("phases", {}).items())
        resident = row["peak_resident_bytes"]
        table.add_row(
            row["runner"], row.get("error") or figure(row["seconds"], 1), phases,
            memory_text(row["memory"]) if "memory" in row else "-", "-" if resident is None else format_bytes(resident),
        )  # fmt: skip
    return table


def row_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "runner", "tokens", "prefill s", "tokens/s", "of product+attention", "ms/token", "mean", "floor ms", "floor/ms",
        "memory",
    )  # fmt: skip
    for row in rows:
        start = (row["runner"], tokens_text(row["length"]) if "length" in row else "-")
        if "error" in row:
            table.add_row(*start, row["error"])
            continue
        table.add_row(
            *start, figure(row["seconds"]), figure(row["tokens_per_s"], 0), percent(row["of_matmul_and_attention"]),
            figure(row["ms"]["median"]), figure(row["ms"]["mean"]), figure(row["floor_ms"]),
            percent(row["floor_over_measured"]), memory_text(row["memory"]) if "memory" in row else "-",
        )  # fmt: skip
    return table


def answer_table(answers: list[dict[str, Any]]) -> Table:
    table = Table("runner", "tokens", "question", "expected", "answer", "right")
    for row in answers:
        table.add_row(
            row["runner"], tokens_text(row["length"]), row["question"], row["expected"], row["answer"],
            "yes" if row["right"] else "no",
        )  # fmt: skip
    return table
