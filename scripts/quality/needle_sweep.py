"""Needle sweep: hide numbers at every depth of texts of every length, and count how many a model gives back.

Writes results.json (after every cell; a stopped run resumes) and heatmap.png. With --one-document the
needles of every depth stand in one text a length, which is read once: where reading takes minutes, the only way.
Example: python scripts/needle_sweep.py --lengths 1K,4K --depths 5 --kv int4 --control full --out sweeps/demo
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longrun.errors import InputError
from longrun.hub.names import model_name
from longrun.lab.needle_report import cell_line, draw_heatmap, grid, panel_title, summary
from longrun.lab.needle_results import SweepResults
from longrun.lab.report_env import environment
from longrun.needles.needles import Haystack
from longrun.plan.budget import OFF
from longrun.plan.pages_read import selection_facts
from longrun.plan.prefill import prefill_facts
from longrun.specs.prefill_spec import EXACT
from scripts.quality.needle_cells import capacity_for, run_cell, run_document
from scripts.quality.needle_options import collect_settings, parse_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from longrun.model.choice import ModelChoice
    from longrun.runtime.auto_head_map import AutoHeadMap
    from longrun.runtime.runtime import Runtime

FULL_ATTENTION = {
    "head_map": "full", "kv": "bf16", "select": OFF, "prefill": EXACT, "retrieval_ratio": None, "kv_bytes": None,
    "keep": None, "prefill_share": None, "prefill_mass": None, "prefill_dense": None,
}  # fmt: skip
"""What the control has in place of the sweep's settings."""


def load_runtime(
    choice: ModelChoice, settings: dict[str, Any], setting: str, on_head_map: Callable[[AutoHeadMap], None]
) -> Runtime:
    """The model under the asked settings, or under full attention with bf16 pages for the control."""
    import longrun

    asked = settings | FULL_ATTENTION if setting == "control" else settings
    return longrun.load(
        choice.model_dir,
        budget=asked["budget"],
        head_map=asked["head_map"],
        kv_format=asked["kv"],
        weight_format=asked["weights"],
        device=asked["device"],
        ctx=capacity_for(max(asked["lengths"])),
        adapter=choice.adapter,
        yarn=asked["yarn"],
        retrieval_ratio=asked["retrieval_ratio"],
        kv_bytes=asked["kv_bytes"],
        keep=asked["keep"],
        select=asked["select"],
        select_from=None if settings["select"] is None else 0,
        prefill=asked["prefill"],
        prefill_share=asked["prefill_share"],
        prefill_mass=asked["prefill_mass"],
        prefill_dense=asked["prefill_dense"],
        chunk_size=asked["chunk_size"],
        on_head_map=on_head_map,
    )


def describe(runtime: Runtime) -> dict[str, Any]:
    """How one setting was run, as results.json records it."""
    kept = sum(sum(row) for row in runtime.split.retrieval)
    total = runtime.config.num_layers * runtime.config.num_kv_heads
    return {
        "split_hash": runtime.split.hash,
        "retrieval_heads": kept,
        "reaches": [list(row) for row in runtime.split.reaches] or None,
        "kv_heads": total,
        "sink_size": runtime.split.sink_size,
        "recent_size": runtime.split.recent_size,
        "kv_format": runtime.plan.kv_format,
        "weight_format": runtime.plan.weight_format,
        "device": runtime.plan.device_type,
        "chunk_size": runtime.plan.chunk_size,
        "selection": selection_facts(runtime.plan),
        "prefill": prefill_facts(runtime.plan.attention),
    }


def run_setting(
    choice: ModelChoice,
    settings: dict[str, Any],
    setting: str,
    haystack: Haystack,
    results: SweepResults,
    console: Console,
) -> None:
    """Run the cells of one setting that `results` lacks; the model is loaded only if there are any."""
    from longrun.chat.progress import HeadMapProgress, PrefillProgress

    grid_cells = [(length, depth) for length in settings["lengths"] for depth in settings["depths"]]
    todo = [cell for cell in grid_cells if results.get(setting, *cell) is None]
    if not todo:
        return
    runtime = load_runtime(choice, settings, setting, HeadMapProgress(console))
    if runtime.tokenizer is None:
        raise InputError(f"model folder {choice.model_dir} has no tokenizer: needles are text, so add its files")
    if settings["select_question"] and setting != "control" and runtime.plan.attention.selection is None:
        raise InputError("--select-question needs pages to select: give --select N, or leave it out")
    results.head[setting] = describe(runtime)
    for notice in runtime.notices:
        console.print(f"note: {notice}")
    documents = [(length, [depth]) for length, depth in todo]
    if settings["one_document"]:
        lengths = dict.fromkeys(length for length, _ in todo)
        documents = [(length, [depth for other, depth in todo if other == length]) for length in lengths]
    for length, depths in documents:
        with PrefillProgress(console) as progress:
            progress.start(length)
            if settings["one_document"]:
                cells = run_document(runtime, haystack, settings, setting, length, depths, progress)
            else:
                cells = iter([run_cell(runtime, haystack, settings, setting, length, depths[0], progress)])
            for cell in cells:
                results.add(cell)
                console.print(cell_line(cell))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid. Status 0; bad input raises a LongrunError."""
    from rich.console import Console

    from longrun.config.model_config import ModelConfig
    from longrun.lab.planted import NOTE, is_planted
    from longrun.model.adapter import Adapter
    from longrun.model.choice import choose_model
    from longrun.model.fingerprint import model_fingerprint

    arguments = parse_arguments(argv)
    settings = collect_settings(arguments)
    choice = choose_model(arguments.model, arguments.adapter, arguments.download)
    adapter, name = None, model_name(choice.model_dir)
    if choice.adapter is not None:
        adapter = Adapter.open(choice.adapter, ModelConfig.from_dir(choice.model_dir))
    settings["model_fingerprint"] = model_fingerprint(choice.model_dir, adapter)
    haystack = Haystack.from_files(arguments.haystack) if arguments.haystack else Haystack.generated(arguments.seed)
    results = SweepResults.open(arguments.out, settings, arguments.force)
    results.head |= {"model": name, "environment": environment()}
    if adapter is not None:
        results.head["adapter"] = adapter.folder.name
    note = NOTE if is_planted(choice.model_dir) else None
    results.head["notes"] = [note] if note else []
    if settings["one_document"]:
        results.head["notes"].append("cells of one length and setting share one document, which was read once")
    console = Console(highlight=False)
    for line in (note, choice.notice):
        if line:
            console.print(line)
    if results.cells:
        total = len(settings["lengths"]) * len(settings["depths"]) * (2 if arguments.control else 1)
        console.print(f"{len(results.cells)} of {total} cells are there already: going on after them")

    wanted = ["main", "control"] if arguments.control else ["main"]
    for setting in wanted:
        run_setting(choice, settings, setting, haystack, results, console)
        gc.collect()  # the runtime is gone before the next one is planned

    titles = {setting: panel_title(name, setting, results.head[setting]) for setting in wanted}
    for setting, title in titles.items():
        console.print(grid(results, setting, title))
    for line in summary(results):
        console.print(line)
    picture = draw_heatmap(results, titles, note)
    console.print(f"wrote {arguments.out / 'results.json'} and {picture}")
    return 0
