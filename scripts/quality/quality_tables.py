#!/usr/bin/env python
"""Render the quality tables from comparisons that scripts/compare.py or compare_merge.py wrote.

    python scripts/quality/quality_tables.py                      rewrite docs/quality.md and the pages of all tables
    python scripts/quality/quality_tables.py --check              status 1 where one of them is not what the files give
    python scripts/quality/quality_tables.py --publish DIR NAME   copy DIR's results and pictures as NAME, then rewrite

Every docs/results/quality-NAME.json has a page next to it, quality-NAME.md, with all its tables: never written by
hand. In the document a table stands between two comments; the first names its kind and its file, relative to the
document, and the rows to show where not all are wanted. Where the file is not there yet, the table says so.

    <!-- table: exact results/quality-split.json; reference; full int4 -->
    <!-- /table -->

Kinds: provenance, verdicts (a line a row), pages (rows minus their twins with INT4 pages, `quality_pages.py`);
and tables of a row by length: exact (all tasks), passkey, needle, several, keyvalue, difference (exact match minus the
reference's, all tasks), beside_int4 (minus that of full attention with INT4 pages), kl, top1, perplexity, bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun import cli
from longrun.errors import InputError
from longrun.lab.quality.report import BYTES_PICTURE, RATIO_PICTURE, asked
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE, Row
from longrun.lab.quality.statistics import Estimate
from longrun.lab.quality.summary import ALL_TASKS, beside, percent, points, sentences
from longrun.lab.quality.tasks import RETRIEVAL_TASKS
from longrun.lab.quality.window_picture import WINDOW_PICTURE
from longrun.paths import path_option
from longrun.units import format_bytes, format_tokens
from scripts.bench.bench_tables import rendered
from scripts.quality.compare_merge import missing
from scripts.quality.quality_pages import page_table

ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "quality-"
_PICTURES = {
    BYTES_PICTURE: "quality by KV bytes",
    RATIO_PICTURE: "quality by share of heads",
    WINDOW_PICTURE: "windows",
}
Found = dict[str, Any]


def _of_task(task: str, key: str, show: Callable[[Estimate], str]) -> Callable[[Found, Found | None], str]:
    def cell(row: Found, _: Found | None) -> str:
        found = row["tasks"].get(task, {}).get(key)
        return "" if found is None else show(Estimate(**found))

    return cell


def _of_text(key: str, show: Callable[[Estimate], str]) -> Callable[[Found, Found | None], str]:
    def cell(row: Found, _: Found | None) -> str:
        found = (row["text"] or {}).get(key)
        return "" if found is None or row["name"] == REFERENCE else show(Estimate(**found))

    return cell


def _beside_int4(row: Found, _: Found | None) -> str:
    return "" if row["beside_int4"] is None else points(Estimate(**row["beside_int4"]))


def _bytes(row: Found, reference: Found | None) -> str:
    """What the cache has in use, of a simulated format what that would have, and its share of the reference's."""
    used = row["kv_used"] if row["kv_computed"] is None else row["kv_computed"]
    share = "" if reference is None else f" ({used / reference['kv_used']:.0%})"
    return f"{format_bytes(round(used))}{share}" + ("" if row["kv_computed"] is None else ", computed")


def _number(digits: int) -> Callable[[Estimate], str]:
    return lambda found: f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _top1(found: Estimate) -> str:
    return f"{found.value:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


CELLS: dict[str, Callable[[Found, Found | None], str]] = {
    "exact": _of_task(ALL_TASKS, "exact", percent),
    **{task: _of_task(task, "exact", percent) for task in RETRIEVAL_TASKS},
    "difference": _of_task(ALL_TASKS, "exact_minus_reference", points),
    "beside_int4": _beside_int4,
    "kl": _of_text("kl", _number(4)),
    "top1": _of_text("top1", _top1),
    "perplexity": _of_text("perplexity_ratio", _number(3)),
    "bytes": _bytes,
}


# The sections of a result file's page, in order; one without a row is left out.
TITLES = {
    "exact": "Exact match, all tasks",
    "passkey": "Exact match, pass keys",
    "needle": "Exact match, needles",
    "several": "Exact match, several needles",
    "keyvalue": "Exact match, key-value",
    "difference": "Exact match minus the reference's on the same questions, in points",
    "beside_int4": "Exact match minus that of full attention with INT4 pages, in points",
    "kl": "KL(reference || row), in nats",
    "top1": "Top-1 agreement with the reference",
    "perplexity": "Perplexity, as a ratio to the reference's",
    "bytes": "KV bytes in use, and their share of the reference's",
    "pages": "Other pages instead of INT4 pages, all else equal",
    "verdicts": "All lengths together",
    "pictures": "Pictures",
}
_PAGES_NOTE = "The KL minus INT4's on the same tokens (negative is better), and answers that only one gets right."


def by_length(found: Found, cell: Callable[[Found, Found | None], str]) -> list[str]:
    """A markdown table: a line a row, a column a length; rows and lengths that say nothing are left out."""
    rows: dict[str, dict[int, Found]] = {row["name"]: {} for row in found["rows"]}
    for row in found["summary"]:
        rows[row["name"]][row["length"]] = row
    lengths = found["settings"]["lengths"]
    lines = []
    for name, there in rows.items():
        cells = [
            cell(there[length], rows[REFERENCE].get(length)) if length in there else "" for length in lengths
        ]  # fmt: skip
        if any(cells):
            ratio = next(iter(there.values()))["retrieval_ratio"]
            lines.append([_escaped(name), "" if ratio is None else f"{ratio:.0%}", *cells])
    used = [i for i in range(len(lengths)) if any(line[2 + i] for line in lines)]
    table = [["row", "heads", *(format_tokens(length) for length in lengths)], *lines]
    kept = [[line[0], line[1], *(line[2 + i] for i in used)] for line in table]
    kept.insert(1, ["---"] * len(kept[0]))
    return [f"| {' | '.join(line)} |" for line in kept]


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def provenance(found: Found, name: str) -> list[str]:
    """Where a file's rows come from: model, adapter, devices, versions, commits, what was asked and what is missing."""
    results = QualityResults(Path(), found, found["records"])
    parts = found.get("merged") or results.environments
    commits = sorted({record["commit"] for record in found["records"]})
    settings = found["settings"]
    adapter = "no adapter" if settings.get("adapter") is None else f"adapter {settings['adapter'][:12]}"
    devices = ", ".join(sorted({part["device"] for part in parts}))
    torch = ", ".join(sorted({part["torch"] for part in parts}))
    said = [f"{found['model']} with {adapter}", devices, f"torch {torch}", f"commit {', '.join(commits)}"]
    said += [f"seed {settings['seed']}", *found["notes"]]
    told = [f"From [{Path(name).name}]({name}): {'; '.join(said)}.", *asked(results)]
    return [" ".join((*told, *(f"{line}." for line in missing(results))))]


def pictures(name: str, folder: Path) -> list[str]:
    """Links to the pictures that were published with the file, from its page in `folder`."""
    lines = []
    for picture, title in _PICTURES.items():
        path = _picture(Path(name).stem, picture)
        if (folder / path).is_file():
            lines += [f"![{title}]({path})", ""]
    return lines[:-1]


def _picture(stem: str, picture: str) -> str:
    """quality-split and quality_bytes.png give ../pictures/quality-split-bytes.png, as seen from the results."""
    return f"../pictures/{stem}-{picture.removeprefix('quality_')}"


def page(path: Path) -> str:
    """The page of a published comparison: where it comes from, then every table that has a row."""
    found = read(path)
    parts = [f"# Quality: {path.stem.removeprefix(_PREFIX)}"]
    parts += ["Written by `python scripts/quality/quality_tables.py`; [quality](../quality.md) says what it shows."]
    parts += provenance(found, path.name)
    for kind, title in TITLES.items():
        lines = _lines(kind, found, path.name, path.parent)
        if lines:
            parts += [f"## {title}", *([_PAGES_NOTE] if kind == "pages" else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _lines(kind: str, found: Found, name: str, folder: Path) -> list[str]:
    """A table's lines; none where it would have no row."""
    if kind == "provenance":
        return provenance(found, name)
    if kind == "verdicts":
        return [f"- {line}" for line in found["verdicts"]]
    if kind == "pictures":
        return pictures(name, folder)
    lines = page_table(found) if kind == "pages" else by_length(found, CELLS[kind])
    return lines if len(lines) > 2 else []


def render(kind: str, words: Sequence[str], folder: Path) -> str:
    """The lines between the markers.

    Args:
        words: the marker's words after the kind: a file, and the rows to show behind semicolons.

    Raises:
        InputError: an unknown kind, not one file, a row that the file lacks, or no published comparison.
    """
    name, *rows = (part.strip() for part in " ".join(words).split(";"))
    known = ("provenance", "verdicts", "pages", *CELLS)
    if kind not in known or len(name.split()) != 1:
        raise InputError(f"table {kind!r} cannot be made: name one of {', '.join(known)} and one result file")
    path = folder / name
    if not path.exists():
        return f"\n*Not measured yet: {name} is not there.*\n\n"
    found = read(path)
    strange = sorted(set(rows) - {row["name"] for row in found["rows"]})
    if strange:
        raise InputError(f"{name} has no row {strange[0]!r}: name its rows as they stand there")
    lines = _lines(kind, found, name, path.parent)
    if rows:
        if kind not in (*CELLS, "pages"):
            raise InputError(f"table {kind!r} has no rows to choose from: name its file alone")
        shown = tuple(f"| {_escaped(row)} | " for row in rows)
        lines = [*lines[:2], *(line for line in lines[2:] if line.startswith(shown))]
    return "\n".join(["", *lines, "", ""])


def read(path: Path) -> Found:
    """A published comparison. Raises InputError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {row["name"] for row in found["rows"]}
        sound = bool(found["summary"]) and {row["name"] for row in found["summary"]} <= known and "verdicts" in found
        differences = {(one["row"], one["length"]): one["exact"] for one in found.get("beside_int4", ())}
        for row in found["summary"]:
            row["beside_int4"] = differences.get((row["name"], row["length"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a published comparison ({error}): use --publish") from error
    if not sound:
        raise InputError(f"{path} holds no summary of its rows: take it over with --publish")
    return found


def publish(source: Path, name: str, folder: Path) -> list[Path]:
    """Copy a finished comparison: results (a record a line), with a sentence about every row, and pictures.

    Args:
        source: --out of a comparison; name: letters, digits and dashes; folder: where the document stands.

    Returns:
        The files written.

    Raises:
        InputError: an impossible name, or a folder without a finished comparison.
    """
    if not name.replace("-", "").isalnum():
        raise InputError(f"name {name!r} must be of letters, digits and dashes")
    results = QualityResults.read(source)
    if not results.head.get("summary"):
        raise InputError(f"{source} has no report yet: let the comparison finish, or merge it with compare_merge.py")
    head = {**results.head, "verdicts": sentences(results), "beside_int4": _differences_to_int4(results)}
    records = ",\n".join(json.dumps(record) for record in results.records)
    written = [folder / "results" / f"{_PREFIX}{name}.json"]
    for path in (written[0].parent, folder / "pictures"):
        path.mkdir(parents=True, exist_ok=True)
    written[0].write_text(f'{json.dumps(head)[:-1]}, "records": [\n{records}\n]}}\n', encoding="utf-8")
    for picture in _PICTURES:
        if (source / picture).is_file():
            written.append(folder / "pictures" / Path(_picture(f"{_PREFIX}{name}", picture)).name)
            shutil.copyfile(source / picture, written[-1])
    return written


def _differences_to_int4(results: QualityResults) -> list[Found]:
    """Of all rows to full attention with INT4 pages, where that is a row."""
    described = results.head["described"]
    full = Row("full int4", kv="int4").method
    base = next((name for name, found in described.items() if found["method"] == full), None)
    return [] if base is None else beside(results, base)


def wanted_texts(document: Path) -> dict[Path, str]:
    """What the document, and the page next to every published comparison, must hold.

    Raises:
        InputError: as `render`; a document that is not there.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{document} cannot be read ({error.strerror}): name a document") from error
    wanted = {document: rendered(text, document.parent, render)}
    for path in sorted((document.parent / "results").glob(f"{_PREFIX}*.json")):
        if is_published(path):
            wanted[path.with_suffix(".md")] = page(path)
    return wanted


def is_published(path: Path) -> bool:
    """Whether a result file was written by `publish`: others may have the same prefix."""
    try:
        return "verdicts" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): restore it, or remove it") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Publish, rewrite or check. Status 1 where --check finds something not current."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--publish", nargs=2, metavar=("DIR", "NAME"), help="--out of a comparison, and its name here")
    parser.add_argument("--document", type=path_option, default=ROOT / "docs" / "quality.md")
    args = parser.parse_args(argv)
    if args.publish and args.check:
        raise InputError("--check changes nothing: leave --publish out")
    if args.publish:
        for path in publish(Path(args.publish[0]), args.publish[1], args.document.parent):
            print(f"wrote {path}")
    for path, text in wanted_texts(args.document).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            print(f"{path.name} is not what its result files give: run python scripts/quality/quality_tables.py")
            return 1
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run(main)
