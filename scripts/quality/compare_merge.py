"""Joins comparisons that differ in their lengths: one results.json, one report, one set of pictures.

`compare.py` runs one process a length (or a few), each with an --out of its own; here they come together. Model,
adapter, seed, chunk size and what a row is must be the same everywhere; how much was asked may differ by length.
Example: python scripts/quality/compare_merge.py out/4K-32K out/64K out/128K --out out/all
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.quality.report import write_report
from longrun.lab.quality.results import FORMAT, RESULTS_FILE, QualityResults
from longrun.lab.quality.summary import not_measured, sentences
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.units import format_tokens

# What may be another at every length; all else must be the same.
BY_LENGTH = ("items", "depths", "texts", "score_tokens", "tasks", "text", "code")
_OWN = ("lengths", "by_length")
# Of a row as it was run: a chunk is never longer than the context.
_FREE = ("chunk_size",)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=path_option, metavar="DIR", help="--out of a comparison")
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR", help="a folder of its own")
    return parser.parse_args(argv)


def merge(parts: Sequence[QualityResults], out: Path) -> QualityResults:
    """One comparison over all lengths of `parts`, in `out`; nothing is written yet.

    Raises:
        InputError: two parts hold one length, or differ in anything but lengths and how much was asked there.
    """
    first = parts[0]
    head: dict[str, Any] = {
        "format": FORMAT, "settings": _settings(parts), "rows": _rows(parts), "model": first.head["model"],
        "environment": first.head["environment"], "notes": first.head["notes"], "described": _described(parts),
        "merged": [origin for part in parts for origin in _origins(part)], "merged_by": environment(),
    }  # fmt: skip
    records = sorted((record for part in parts for record in part.records), key=lambda record: record["length"])
    return QualityResults(out, head, records)


def _settings(parts: Sequence[QualityResults]) -> dict[str, Any]:
    first, owner = parts[0], {}
    by_length: dict[int, dict[str, Any]] = {}
    for part in parts:
        keys = {*first.head["settings"], *part.head["settings"]} - {*BY_LENGTH, *_OWN}
        for key in sorted(keys):
            _same(f"{key} =", first, first.head["settings"].get(key), part, part.head["settings"].get(key))
        for length in part.head["settings"]["lengths"]:
            if length in owner:
                raise InputError(
                    f"{owner[length].folder} and {part.folder} both hold {format_tokens(length)} tokens: leave one out"
                )
            owner[length] = part
            by_length[length] = {key: part.settings_at(length).get(key) for key in BY_LENGTH}
    common = {key: value for key, value in first.head["settings"].items() if key not in (*BY_LENGTH, *_OWN)}
    lengths = sorted(by_length)
    return {**common, "lengths": lengths, "by_length": {str(length): by_length[length] for length in lengths}}


def _rows(parts: Sequence[QualityResults]) -> list[dict[str, Any]]:
    found: dict[str, tuple[QualityResults, dict[str, Any]]] = {}
    for part in parts:
        for row in part.head["rows"]:
            earlier, same = found.setdefault(row["name"], (part, row))
            _same(f"row {row['name']} =", earlier, same, part, row)
    return [row for _, row in found.values()]


def _described(parts: Sequence[QualityResults]) -> dict[str, Any]:
    found: dict[str, tuple[QualityResults, dict[str, Any]]] = {}
    for part in parts:
        for name, described in part.head["described"].items():
            earlier, same = found.setdefault(name, (part, described))
            for key in sorted({*same, *described} - {*_FREE}):
                _same(f"row {name} with {key} =", earlier, same.get(key), part, described.get(key))
            found[name] = earlier, {**same, **{key: max(same[key], described[key]) for key in _FREE}}
    return {name: described for name, (_, described) in found.items()}


def _origins(part: QualityResults) -> list[dict[str, Any]]:
    """Where the part comes from: an entry a run, more than one where it was stopped and resumed elsewhere."""
    lengths = part.head["settings"]["lengths"]
    return [{"folder": part.folder.name, "lengths": lengths, **one} for one in part.environments]


def _same(what: str, first: QualityResults, value: Any, other: QualityResults, found: Any) -> None:
    if value != found:
        raise InputError(
            f"{other.folder} was run with {what} {json.dumps(found)} and {first.folder} with {json.dumps(value)}: only "
            f"lengths and how much was asked at them may differ, so run one of them again or leave it out"
        )


def missing(results: QualityResults) -> list[str]:
    """A sentence for every row that lacks something at a length that others have."""
    gaps = {row["name"]: not_measured(results, row["name"]) for row in results.head["rows"]}
    return [f"{row} was not measured at {', '.join(found)}" for row, found in gaps.items() if found]


def main(argv: Sequence[str] | None = None) -> int:
    """Merge and report. Status 0; what does not fit together raises an InputError."""
    from rich.console import Console

    arguments = parse_arguments(argv)
    parts = [QualityResults.read(folder) for folder in arguments.folders]
    existing = arguments.out / RESULTS_FILE
    if existing.exists() and "merged" not in QualityResults.read(arguments.out).head:
        raise InputError(f"{existing} is a comparison of its own: give --out a folder of its own")
    results = merge(parts, arguments.out)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {arguments.out} cannot be made ({error.strerror}): choose another --out") from error
    files = write_report(results)
    console = Console(highlight=False, width=160)
    for line in (*sentences(results), *missing(results)):
        console.print(line)
    console.print("wrote " + ", ".join(str(file) for file in (existing, *files)))
    return 0


if __name__ == "__main__":
    run(main)
