#!/usr/bin/env python
"""Render the tables of docs/benchmarks.md from the result files that `python scripts/bench.py ... --json FILE` wrote.

    python scripts/bench/bench_tables.py            rewrite what stands between markers
    python scripts/bench/bench_tables.py --check    status 1 where the document is not what the files give

A table stands between two comments; the first names its kind (decode, prefill, offload, formats, kernels, shares) and
its files, relative to the document:

    <!-- table: decode results/h100-decode.json -->
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun import cli
from longrun.errors import InputError
from longrun.paths import path_option
from longrun.specs.selection_spec import pages_text
from longrun.units import format_bytes, format_tokens

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
_CEILINGS = (
    ("memory_tb_s", 2, "TB/s copied"),
    ("matmul_tflops", 0, "TFLOP/s in a matrix product"),
    ("attention_tflops", 0, "TFLOP/s in attention"),
    ("host_to_device_gb_s", 1, "GB/s from the host"),
)
_FORMATS = {"weight_format": "weights", "kv_format": "pages"}
_BLOCK = re.compile(r"^<!-- table: (\w+) ([^>]*?) -->\n(.*?)^<!-- /table -->$", re.MULTILINE | re.DOTALL)
_OPENING = re.compile(r"^<!-- table:.*$", re.MULTILINE)


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"  # never -0.0


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def memory(row: Row) -> list[str]:
    """Used memory, and its ratio to the plan."""
    found = row.get("memory") or {}
    if found.get("used_bytes") is None:
        return ["", ""]
    return [format_bytes(found["used_bytes"]), f"{found['ratio_to_plan']:.0%}"]


def unlike(results: Sequence[Row]) -> list[str]:
    """How longrun's rows of several files differ: formats of weights and pages and the pages that a head reads, where
    they are not the same."""
    said = [""] * len(results)
    for key, name in _FORMATS.items():
        formats = [result["settings"][key] for result in results]
        if len(set(formats)) > 1:
            said = [f"{so_far}, {one} {name}" for so_far, one in zip(said, formats, strict=True)]
    chosen = [pages_text(result["settings"].get("selection")) for result in results]
    if len(set(chosen)) > 1:
        said = [f"{so_far}, {one}" for so_far, one in zip(said, chosen, strict=True)]
    return said


def context(row: Row) -> str:
    return format_tokens(row["length"]) + (", synthetic" if row.get("synthetic") else "")


def timed_tokens(row: Row) -> list[float]:
    """Milliseconds of a row's tokens, empty where the file holds none. Files from before `clock_runs_through` are read
    without the first of every repeat: the clock started when its step, launched ahead, had already run."""
    tokens, repeats = row.get("ms_tokens") or [], len(row.get("ms_repeats") or ())
    if row.get("clock_runs_through"):
        return tokens
    each = len(tokens) // repeats if repeats else 0
    return [ms for i, ms in enumerate(tokens) if i % each] if each > 1 else tokens


def decode(results: Sequence[Row]) -> list[list[str]]:
    rows = [(row, of_file) for result, of_file in zip(results, unlike(results), strict=True) for row in result["rows"]]
    peers = {row["length"]: row["ms"]["median"] for row, _ in rows if row["runner"] != "longrun" and "ms" in row}
    table = [["runner", "tokens", "ms/token, median (range)", "mean", "fewest bytes", "their time, ms", "of median",
              "of mean", "host ms", "transformers / longrun", "memory", "of plan"]]  # fmt: skip
    for row, of_file in rows:
        own = row["runner"] == "longrun"
        runner = f"{row['runner']}{of_file}" if own else row["runner"]
        if "error" in row:
            table.append([runner, context(row), row["error"], *[""] * 9])
            continue
        median, tokens = row["ms"]["median"], timed_tokens(row)
        mean = statistics.fmean(tokens) if tokens else None
        least, most = (min(tokens), max(tokens)) if tokens else (row["ms"]["min"], row["ms"]["max"])
        table.append([
            runner, context(row), f"{median:.2f} ({least:.2f} to {most:.2f})", number(mean, 2),
            format_bytes(row["bytes_total"]) if own else "", number(row.get("floor_ms"), 2),
            share(row.get("floor_over_measured")), share(row["floor_ms"] / mean if own and mean else None),
            number(row.get("host_overhead_ms"), 2),
            number(peers[row["length"]] / median if own and row["length"] in peers else None, 2), *memory(row),
        ])  # fmt: skip
    return table


def prefill(results: Sequence[Row]) -> list[list[str]]:
    table = [["runner", "tokens", "seconds", "tokens/s", "TFLOP/s", "of a matrix product", "of product and attention",
              "needles right", "memory", "of plan"]]  # fmt: skip
    rows = [(row, of_file) for result, of_file in zip(results, unlike(results), strict=True) for row in result["rows"]]
    for row, of_file in rows:
        if "error" in row:
            table.append([row["runner"], context(row), row["error"], *[""] * 7])
            continue
        runner = f"{row['runner']}{of_file}" if row["runner"] == "longrun" else row["runner"]
        needles = f"{row['exact']} of {len(row['needles'])}" if "needles" in row else ""
        table.append([
            runner, context(row), number(row["seconds"]), number(row["tokens_per_s"], 0),
            number(row.get("tflops"), 0), share(row.get("of_matmul")), share(row.get("of_matmul_and_attention")),
            needles, *memory(row),
        ])  # fmt: skip
    return table


def offload(results: Sequence[Row]) -> list[list[str]]:
    table = [["session", "tokens", "ms/token", "host bytes a token", "their time on the link, ms", "of measured",
              "memory", "of plan", "tokens equal"]]  # fmt: skip
    for result in results:
        agreement = result.get("agreement") or {}
        for row in result["rows"]:
            equal = ""
            if row is not result["rows"][0] and "tokens" in agreement:
                equal = f"{agreement['equal_tokens']} of {agreement['tokens']}"
            table.append([
                row["runner"], context(row), number(row["ms"]["median"], 2), format_bytes(row["host_bytes_per_token"]),
                number(row["link_ms"], 2), share(row["link_over_measured"]), *memory(row), equal,
            ])  # fmt: skip
    return table


def formats(results: Sequence[Row]) -> list[list[str]]:
    """Formats of weights or of pages that took turns: which of the two, the rows say, and so compared with which."""
    rows = [row for result in results for row in result["rows"]]
    beside = {key for row in rows for key in row if key.startswith("over_")}
    kinds = {key for row in rows for key in _FORMATS if key in row}
    if len(beside) != 1 or len(kinds) != 1:
        raise InputError("formats of weights and of pages, or beside unlike ones, are two tables: name files of one")
    (over,), (kind,) = beside, kinds
    table = [[_FORMATS[kind], "tokens", "seconds, median of turns", f"time against {over.removeprefix('over_')}",
              "of product and attention"]]  # fmt: skip
    for result in results:
        for row in result["rows"]:
            table.append([
                row[kind], format_tokens(result["length"]), number(row["median_seconds"], 3), share(row[over]),
                share(row.get("of_matmul_and_attention")),
            ])  # fmt: skip
    return table


def kernels(results: Sequence[Row]) -> list[list[str]]:
    table = [["kernel", "shape", "us", "moves", "of ceiling", "ceiling"]]
    for row in (row for result in results for row in result["rows"]):
        moves = "" if row.get("bytes") is None else format_bytes(row["bytes"])
        if not moves and row.get("flops") is not None:
            moves = f"{row['flops'] / 1e9:,.1f} GFLOP"
        settings = row.get("details", {}).get("settings")
        programs = settings.get("num_programs") if isinstance(settings, dict) else None
        shape = row["shape"] if programs is None else f"{row['shape']}, {programs} programs"
        fraction = share(row["fraction_of_ceiling"]) if row.get("bytes") or row.get("flops") else ""
        ceiling = (row.get("ceiling") or "").replace("_", " ")
        table.append([row["kernel"], shape, number(row["microseconds"]), moves, fraction, ceiling])
    return table


def shares(results: Sequence[Row]) -> list[list[str]]:
    table = [["what", "reached", "ceiling", "unit", "the ceiling is", "share", "floor"]]
    for row in (row for result in results for row in result["rows"]):
        table.append([
            row["name"], number(row["reached"], 2), number(row["ceiling"], 2), row["unit"], row["ceiling_is"],
            share(row["share"]), f"{row['floor']:.0%}",
        ])  # fmt: skip
    return table


KINDS: dict[str, Callable[[Sequence[Row]], list[list[str]]]] = {
    "decode": decode, "prefill": prefill, "offload": offload, "formats": formats, "kernels": kernels,
    "shares": shares,
}  # fmt: skip


def provenance(name: str, result: Row) -> str:
    """Where one file's rows come from: device, versions, commit, and the settings of the model."""
    found = result["environment"]
    commit = f"commit {found['commit']}{' (as given)' if found.get('commit_given') else ''}"
    parts = [found["device"], f"torch {found['torch']}", commit]
    if not result.get("complete", True):
        parts.insert(0, "a run that broke off")
    settings = result.get("settings")
    if settings:
        heads = f"{settings['retrieval_heads']} of {settings['kv_heads']} KV heads keep all tokens"
        parts += [f"{settings['weight_format']} weights, {settings['kv_format']} pages", heads, settings["split_note"]]
        parts += [settings["note"]] if settings.get("note") else []
    ceilings = result.get("ceilings") or {}
    parts += [f"{ceilings[key]:,.{digits}f} {unit}" for key, digits, unit in _CEILINGS if key in ceilings]
    return f"From [{Path(name).name}]({name}): {'; '.join(parts)}."


def render(kind: str, names: Sequence[str], folder: Path) -> str:
    """The lines between the markers.

    Raises:
        InputError: an unknown kind, no file, or a file that is missing, is not JSON or is of another benchmark.
    """
    if kind not in KINDS or not names:
        raise InputError(f"table {kind!r} cannot be made: name one of {', '.join(KINDS)} and its result files")
    results = []
    for name in names:
        try:
            result = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"result file {folder / name} cannot be read ({error}): run the benchmark first"
            ) from error
        if result.get("benchmark") != kind:
            raise InputError(
                f"result file {name} is of benchmark {result.get('benchmark')!r}, and the table of {kind!r}"
            )
        results.append(result)
    table = KINDS[kind](results)
    used = [i for i, title in enumerate(table[0]) if title in ("runner", "tokens") or any(row[i] for row in table[1:])]
    lines = [[row[i].replace("|", "\\|") for i in used] for row in table]
    lines.insert(1, ["---"] * len(used))
    said = [provenance(name, result) for name, result in zip(names, results, strict=True)]
    return "\n".join(["", *said, "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def rendered(text: str, folder: Path, make: Callable[[str, Sequence[str], Path], str] = render) -> str:
    """The document with all its tables made by `make`. Raises InputError as `make` does, and for an unclosed marker."""
    blocks = list(_blocks(text))
    if len(blocks) != len(_OPENING.findall(text)):
        raise InputError("a table marker is not closed: end each with <!-- /table --> on a line of its own")
    for block in reversed(blocks):
        made = make(block.group(1), block.group(2).split(), folder)
        text = text[: block.start(3)] + made + text[block.end(3) :]
    return text


def _blocks(text: str) -> Iterator[re.Match[str]]:
    for block in _BLOCK.finditer(text):
        if not _OPENING.search(block.group(3)):
            yield block


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the document. Status 1 where --check finds it not current."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--document", type=path_option, default=ROOT / "docs" / "benchmarks.md")
    args = parser.parse_args(argv)
    text = args.document.read_text(encoding="utf-8")
    wanted = rendered(text, args.document.parent)
    if args.check:
        if wanted != text:
            print(f"{args.document.name} is not what its result files give: run python scripts/bench/bench_tables.py")
        return int(wanted != text)
    if wanted != text:
        args.document.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)
