"""Quality of head maps, KV formats and evicting caches, each against full bf16 attention of the same model.

Every row reads the same documents and answers the same questions; the reference (full attention, bf16 pages) goes
first. Writes results.json after every row, length and task (a stopped run resumes), report.md and
pictures. Several processes may share the lengths, each with an --out of its own: compare_merge.py joins them.
Example: python scripts/compare.py --settings scripts/quality/compare_settings.toml --lengths 4K,8K --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.cli import redraws
from longrun.errors import InputError
from longrun.hub.names import model_name
from longrun.lab.quality.asked import AskedDocument, CodeDocuments
from longrun.lab.quality.code_source import standard_library
from longrun.lab.quality.measure_answers import measure_asked
from longrun.lab.quality.measures import SPARE_TOKENS, Opened, ReferenceLogits, measure_retrieval, measure_text
from longrun.lab.quality.report import write_report
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE, REFERENCE_ROW, Row
from longrun.lab.quality.row_fields import SYSTEM
from longrun.lab.quality.rules import RULES_TASK
from longrun.lab.quality.settings import chosen_rows, read_rows, with_maps
from longrun.lab.quality.summary import sentences
from longrun.lab.quality.tasks import TaskDocument, held_out_text, retrieval_documents, text_documents
from longrun.lab.quality.texts import CHAT_TEXT, CODE_TEXT, TEXT_TASKS, chat_texts, code_texts
from longrun.lab.report_env import environment
from longrun.model.choice import choose_model
from longrun.needles.needles import Haystack
from longrun.patterns.head_map import HeadSplit
from longrun.text.encoder import TextEncoder, leading_ids
from longrun.text.turn_end import template_ends
from longrun.units import ALL_TOKENS, format_tokens
from scripts.quality.compare_options import ASKED, collect_settings, named_folders, parse_arguments
from scripts.quality.compare_runtimes import Runtimes, comparison_budget
from scripts.quality.memory import release_memory

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from longrun.plan.plan import Plan
    from longrun.runtime.runtime import Runtime


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
            asked = self._asked_documents(runtime.tokenizer, length, group)
            alone = group == "code" and row.name == REFERENCE
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
            runtime = self._runtimes.get(row, length, self._system_size(length) if row.keep == SYSTEM else 0)
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

    def _system_size(self, length: int) -> int:
        """Tokens of the longest system prompt that rules are asked for with at this length."""
        asked = self._asked_documents(self._runtimes.tokenizer(), length, RULES_TASK)
        return max(document.opening for document in asked)

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

    def _asked_documents(self, tokenizer: PreTrainedTokenizerBase, length: int, group: str) -> list[AskedDocument]:
        """The same for every row, made once."""
        settings, key = self._settings, (length, group)
        if key not in self._asked:
            if self._code is None:
                self._code = CodeDocuments(tokenizer, standard_library())
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

    arguments = parse_arguments(argv, __doc__)
    settings = collect_settings(arguments)
    rows, left_out = with_maps(load_rows(arguments.settings), named_folders(arguments.head_map))
    rows = (REFERENCE_ROW, *chosen_rows(rows, arguments.rows))
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
