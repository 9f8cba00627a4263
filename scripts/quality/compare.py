"""Quality of head maps, KV formats and evicting caches, each against full bf16 attention of the same model.

Every row reads the same documents and answers the same questions; the reference (full attention, bf16 pages) goes
first. Writes results.json after every row, length and task (a stopped run resumes), report.md and
pictures. Several processes may share the lengths, each with an --out of its own: compare_merge.py joins them.
Example: python scripts/compare.py --settings scripts/quality/compare_settings.toml --lengths 4K,8K --out DIR
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.arguments import COUNT, SEED, whole
from longrun.cli import Parser, redraws
from longrun.errors import InputError
from longrun.hub.find import add_model_option, add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.asked import AskedDocument, CodeDocuments
from longrun.lab.quality.code_source import source_facts, standard_library
from longrun.lab.quality.measure_answers import measure_asked
from longrun.lab.quality.measures import SPARE_TOKENS, Opened, ReferenceLogits, measure_retrieval, measure_text
from longrun.lab.quality.report import write_report
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.settings import REFERENCE, REFERENCE_ROW, Row, read_rows, with_maps
from longrun.lab.quality.summary import sentences
from longrun.lab.quality.tasks import TaskDocument, held_out_text, retrieval_documents, text_documents
from longrun.lab.quality.texts import CHAT_TEXT, CODE_TEXT, TEXT_TASKS, chat_texts, code_texts
from longrun.lab.report_env import environment
from longrun.model.choice import choose_model
from longrun.needles.needles import Haystack
from longrun.paths import path_option
from longrun.patterns.head_map import HeadSplit
from longrun.text.encoder import TextEncoder, leading_ids
from longrun.text.turn_end import template_ends
from longrun.units import ALL_TOKENS, format_tokens, parse_tokens
from scripts.quality.compare_runtimes import Runtimes, comparison_budget

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from longrun.plan.plan import Plan
    from longrun.runtime.runtime import Runtime

GROUPS = ("single", "several", "keyvalue", "code", "rules", *TEXT_TASKS)
ASKED = ("code", "rules")  # questions about the running Python's own modules, in the words of the chat template


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    add_yarn_option(parser)
    parser.add_argument("--adapter", type=path_option, metavar="DIR", help="LoRA adapter of every row, or none")
    parser.add_argument(
        "--settings", required=True, type=path_option, metavar="FILE", help="TOML file with [[row]] tables"
    )
    parser.add_argument(
        "--head-map", nargs="+", default=[], metavar="NAME=FOLDER", help="folders in place of the rows' @NAME; rows "
        "whose @NAME has none are left out",
    )  # fmt: skip
    parser.add_argument("--lengths", required=True, metavar="4K,8K,...", help="prompt lengths in the model's tokens")
    parser.add_argument("--depths", type=COUNT, default=5, metavar="N", help="evenly spaced depths from 0 to 1")
    parser.add_argument(
        "--items",
        type=whole(),
        default=8,
        metavar="N",
        help="questions of a task, depth and length (code, rules: documents a length)",
    )
    parser.add_argument("--texts", type=whole(), default=4, metavar="N", help="texts to be predicted, a length")
    parser.add_argument(
        "--score-tokens", type=whole(), default=256, metavar="N", help="last tokens of a text, predicted"
    )
    parser.add_argument("--tasks", default="single,several,keyvalue,text", help=f"some of {','.join(GROUPS)}")
    parser.add_argument(
        "--text", nargs="+", type=path_option, metavar="FILE", help="texts to predict (default: Python's docs)"
    )
    parser.add_argument(
        "--haystack", nargs="+", type=path_option, metavar="FILE", help="text files instead of generated text"
    )
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--chunk-size", metavar="N", help="tokens of a prefill step (default: the budget's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument(
        "--logits", type=path_option, metavar="DIR", help="reference's distributions, large (default: in --out)"
    )
    parser.add_argument("--force", action="store_true", help="start over where --out holds another comparison")
    return parser.parse_args(argv)


def collect_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the results besides the rows, JSON-able; a resumed run must have the same.

    Raises:
        InputError: an impossible number, an unknown task, or a file that cannot be read.
    """
    lengths = sorted({parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")})
    for name in ("depths", "items", "texts", "score_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    groups = [group.strip() for group in arguments.tasks.split(",")]
    for group in groups:
        if group not in GROUPS:
            raise InputError(f"--tasks {group!r} is unknown: choose among {', '.join(GROUPS)}")
    if set(TEXT_TASKS) & set(groups) and arguments.score_tokens >= lengths[0]:
        raise InputError(
            f"--score-tokens {arguments.score_tokens} leaves nothing to read of {lengths[0]:,} tokens: give less"
        )
    last = arguments.depths - 1
    return {
        "lengths": lengths,
        "depths": [round(i / last, 6) for i in range(arguments.depths)] if last else [0.5],
        "items": arguments.items,
        "texts": arguments.texts,
        "score_tokens": arguments.score_tokens,
        "tasks": [group for group in GROUPS if group in groups],
        "text": _checksums(arguments.text) or "Python's language reference (pydoc_data)",
        "code": source_facts() if {*ASKED, CODE_TEXT} & set(groups) else None,
        "haystack": _checksums(arguments.haystack) or "generated",
        "budget": arguments.budget,
        "chunk_size": None if arguments.chunk_size is None else parse_tokens(arguments.chunk_size, "--chunk-size"),
        "device": arguments.device,
        "yarn": arguments.yarn,
        "seed": arguments.seed,
    }


def named_folders(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER pairs; InputError for a text that is none, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or name in found:
            raise InputError(f"--head-map {pair!r} is no NAME=FOLDER of a name of its own: write reach=maps/my-model")
        found[name] = folder
    return found


def _checksums(paths: Sequence[Path] | None) -> list[dict[str, str]]:
    for path in paths or []:
        if not path.is_file():
            raise InputError(f"{path} is not a file: name text files")
    return [{"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths or []]


class Comparison:
    """One run: loads what a row needs, measures what is missing."""

    def __init__(
        self, arguments: argparse.Namespace, settings: dict[str, Any], results: QualityResults, console: Console
    ) -> None:
        self._arguments, self._settings, self._results, self._console = arguments, settings, results, console
        self._reference = ReferenceLogits(logits_folder(arguments, settings))
        self._haystack = (
            Haystack.from_files(arguments.haystack) if arguments.haystack else Haystack.generated(arguments.seed)
        )
        budget = comparison_budget(arguments.budget, arguments.device, settings["chunk_size"])
        self._runtimes = Runtimes(
            arguments.model, arguments.adapter, budget, arguments.device, max(settings["lengths"]) + SPARE_TOKENS,
            arguments.yarn,
        )  # fmt: skip
        self._loaded: tuple[Row, int | None, Runtime, Plan] | None = None
        self._told: set[str] = set()
        self._opened: tuple[Row, int, Opened] | None = None
        self._documents: dict[tuple[int, str], list[TaskDocument]] = {}
        self._asked: dict[tuple[int, str], list[AskedDocument]] = {}
        self._code: CodeDocuments | None = None
        self._texts: dict[tuple[int, str], list[list[int]]] = {}
        self._prose: list[int] | None = None

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise HeadMapError for a row whose map is missing or of another model."""
        self._runtimes.check(rows)

    def run_row(self, row: Row) -> None:
        """Measure the row at every length, in every group of tasks that is missing."""
        for length in self._settings["lengths"]:
            for group in self._settings["tasks"]:
                if self._missing(row, length, group):
                    self._measure(row, length, group)

    def _missing(self, row: Row, length: int, group: str) -> bool:
        of_texts = row.name == REFERENCE and group in TEXT_TASKS
        if of_texts and not self._reference.of(group).has(length, self._settings["texts"]):
            self._results.drop(row.name, length, group)  # its distributions are gone, and other rows need them
        return self._results.get(row.name, length, group) is None

    def _measure(self, row: Row, length: int, group: str) -> None:
        settings, runtime = self._settings, self._runtime(row, length)
        if runtime is None:
            self._say(f"{row.name}, {format_tokens(length)}: left out, as its share does not hold even the windows")
            return
        start = time.perf_counter()

        def on_document(name: str) -> None:
            if redraws(self._console):
                so_far = f"{name} ({time.perf_counter() - start:.0f} s)"
                self._console.print(f"  {row.name}, {format_tokens(length)}: {so_far}", end="\r")

        if group in TEXT_TASKS:
            found = measure_text(
                row, self._session(runtime, row, length), length, self._text_documents(runtime, length, group),
                settings["score_tokens"], self._reference.of(group), row.name == REFERENCE, on_document, group,
            )  # fmt: skip
        elif group in ASKED:
            asked, alone = self._asked_documents(runtime, length, group), group == "code" and row.name == REFERENCE
            found = measure_asked(runtime, row, self._session(runtime, row, length), asked, on_document, alone)
        else:
            documents = self._retrieval_documents(runtime, length, group)
            found = measure_retrieval(runtime, row, self._session(runtime, row, length), documents, on_document)
        seconds = round(time.perf_counter() - start, 2)
        record = {"row": row.name, "length": length, "group": group, "seconds": seconds}
        if row.by_length:
            record["split"] = split_facts(runtime.split)
        self._results.add(record | {"commit": self._results.head["environment"]["commit"]} | found)
        self._console.print(f"{row.name}, {format_tokens(length)}, {group}: {told(found['items'])} ({seconds:.0f} s)")

    def _session(self, runtime: Runtime, row: Row, length: int) -> Opened:
        """The row's session at a length, one for all groups of tasks: a GPU captures its decode step in each anew."""
        if self._opened is None or self._opened[:2] != (row, length):
            self._opened = None
            if runtime.plan.device_type == "cuda":
                release_memory()
            self._opened = (row, length, Opened.of(runtime, row, length))
        return self._opened[2]

    def _say(self, text: str) -> None:
        """Once."""
        if text not in self._told:
            self._told.add(text)
            self._console.print(text)

    def _runtime(self, row: Row, length: int) -> Runtime | None:
        """The row's model; kept while the next row needs the same weights in the same order. None where the row's share
        does not hold the windows at this length."""
        key = replace(row, name="", kv=row.stored_kv, eviction="none")  # what a runtime is made from
        where = length if row.by_length else None
        if self._loaded is None or self._loaded[:2] != (key, where):
            self._loaded = self._opened = None
            release_memory()
            runtime = self._runtimes.get(row, length)
            if runtime is None:
                return None
            if runtime.tokenizer is None:
                raise InputError(
                    f"model folder {self._arguments.model} has no tokenizer: questions are text, add its files"
                )
            for notice in runtime.notices:
                self._say(f"note: {notice}")
            self._loaded = (key, where, runtime, runtime.plan)  # a session of another length gives another plan
        _, _, runtime, plan = self._loaded
        self._results.describe(row.name, describe(row, runtime, plan))
        return runtime

    def _retrieval_documents(self, runtime: Runtime, length: int, group: str) -> list[TaskDocument]:
        """The same for every row, so they are made once: a tokenizer takes about a second for 128K tokens."""
        settings, key = self._settings, (length, group)
        if key not in self._documents:
            self._documents[key] = list(
                retrieval_documents(
                    runtime.tokenizer, self._haystack, group, length, settings["depths"], settings["items"],
                    settings["seed"],
                )
            )  # fmt: skip
        return self._documents[key]

    def _asked_documents(self, runtime: Runtime, length: int, group: str) -> list[AskedDocument]:
        """The same for every row, made once."""
        settings, key = self._settings, (length, group)
        if key not in self._asked:
            if self._code is None:
                self._code = CodeDocuments(runtime.tokenizer, standard_library())
            write = self._code.code if group == "code" else self._code.rules
            self._asked[key] = list(write(length, settings["items"], settings["seed"]))
        return self._asked[key]

    def _text_documents(self, runtime: Runtime, length: int, group: str) -> list[list[int]]:
        """The same for every row, made once."""
        settings, key, tokenizer = self._settings, (length, group), runtime.tokenizer
        if key not in self._texts:
            count, seed = settings["texts"], settings["seed"]
            if group == CODE_TEXT:
                self._texts[key] = code_texts(tokenizer, standard_library(), length, count, seed)
            elif group == CHAT_TEXT:
                end = next(iter(template_ends(tokenizer)), None)
                self._texts[key] = chat_texts(tokenizer, end, length, count, seed)
            else:
                self._texts[key] = text_documents(self._prose_ids(tokenizer), length, count, leading_ids(tokenizer))
        return self._texts[key]

    def _prose_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if self._prose is None:
            text = held_out_text([path.read_text(encoding="utf-8") for path in self._arguments.text or []])
            self._prose = TextEncoder(tokenizer).ids(text)
        return self._prose


def logits_folder(arguments: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Where the reference's distributions stand: in --out, or below --logits in a folder that no other comparison (of
    another model, other texts or lengths) has."""
    if arguments.logits is None:
        return arguments.out / REFERENCE
    key = json.dumps([settings, REFERENCE_ROW.to_dict()], sort_keys=True)
    return arguments.logits / hashlib.sha256(key.encode()).hexdigest()[:16]


def release_memory() -> None:
    """Give back what nothing refers to any more: sessions may stand in reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def describe(row: Row, runtime: Runtime, plan: Plan) -> dict[str, Any]:
    """How a row is run, as results.json records it; `plan` is that of the longest of the comparison's lengths."""
    split, cache = runtime.split, plan.cache
    page, simulates, varies = cache.page_format, row.simulates, row.by_length  # then each record has its own split
    return {
        "method": row.method,
        "retrieval_ratio": None if row.evicts is not None or varies else round(split.retrieval_ratio, 6),
        "split_hash": None if varies else split.hash,
        "retrieval_heads": None if varies else split.total_retrieval,
        "kv_heads": split.num_layers * split.num_kv_heads,
        "sink_size": split.sink_size,
        "recent_size": None if varies and row.head_map == "streaming" else split.recent_size,
        "kv_format": plan.kv_format,
        "kv_page_bytes": page.page_bytes,
        "kv_rotated": ("keys and values" if page.rotates_values else "keys") if page.rotates_keys else None,
        "simulated": None
        if simulates is None
        else simulates.described(page.page_size, page.head_dim, cache.total_retrieval_heads),
        "weight_format": plan.weight_format,
        "device": plan.device_type,
        "chunk_size": None if varies else plan.chunk_size,
    }


def split_facts(split: HeadSplit) -> dict[str, Any]:
    """How far the heads reach at one length, as a record keeps it: how many heads have each reach."""
    counts = Counter(reach for row in split.all_reaches for reach in row)
    return {
        "hash": split.hash,
        "sink_size": split.sink_size,
        "heads": {"all" if reach == ALL_TOKENS else str(reach): counts[reach] for reach in sorted(counts)},
    }


def told(items: list[dict[str, Any]]) -> str:
    """A finished record as it is printed during the run."""
    keys = ("exact", "token_accuracy") if "exact" in items[0] else ("nll", "kl", "top1")
    return ", ".join(f"{key} {sum(item[key] for item in items) / len(items):.3f}" for key in keys)


def main(argv: Sequence[str] | None = None, load_rows: Callable[[Path], tuple[Row, ...]] = read_rows) -> int:
    """Run what is missing and report. Status 0; bad input raises a LongrunError."""
    from rich.console import Console

    from longrun.lab.planted import NOTE, is_planted
    from longrun.model.fingerprint import model_fingerprint

    arguments = parse_arguments(argv)
    settings = collect_settings(arguments)
    rows, left_out = with_maps(load_rows(arguments.settings), named_folders(arguments.head_map))
    rows = (REFERENCE_ROW, *rows)
    choice = choose_model(arguments.model, arguments.adapter, arguments.download)
    arguments.model, arguments.adapter = choice.model_dir, choice.adapter
    settings["model_fingerprint"] = model_fingerprint(arguments.model)
    settings["adapter"] = None if arguments.adapter is None else _folder_checksum(arguments.adapter)
    results = QualityResults.open(arguments.out, settings, [row.to_dict() for row in rows], arguments.force)
    results.head["model"] = model_name(arguments.model)
    results.measured_in(environment())
    results.head["notes"] = [NOTE] if is_planted(arguments.model) else []
    results.head.setdefault("described", {})
    console = Console(highlight=False, width=160)
    if choice.notice:
        console.print(choice.notice)
    if left_out:
        console.print(f"rows left out, as --head-map names no folder for theirs: {', '.join(left_out)}")
    if results.records:
        console.print(f"{len(results.records)} records are there already: going on after them")
    comparison = Comparison(arguments, settings, results, console)
    comparison.check_rows(rows)
    for row in rows:
        comparison.run_row(row)
    files = write_report(results)
    for line in sentences(results):
        console.print(line)
    console.print("wrote " + ", ".join(str(file) for file in (arguments.out / "results.json", *files)))
    return 0


def _folder_checksum(folder: Path) -> str:
    """SHA-256 over an adapter's files, by name; InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"--adapter {folder} is not a folder: name an adapter's folder")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
