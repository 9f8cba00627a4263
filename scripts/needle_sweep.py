"""Needle sweep: hide numbers at every depth of texts of every length, and count how many a model gives back.

Writes results.json (after every cell; a stopped run resumes) and heatmap.png. With --one-document the
needles of every depth stand in one text a length, which is read once: where reading takes minutes, the only way.
Example: python scripts/needle_sweep.py --lengths 1K,4K --depths 5 --kv int4 --control full --out sweeps/demo
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.arguments import COUNT, SEED, SHARE
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.hub.find import add_model_option, add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.needle_report import cell_line, draw_heatmap, grid, panel_title, summary
from longrun.lab.needle_results import SweepResults
from longrun.lab.report_env import environment
from longrun.needles.needles import Haystack, NeedlePrompt, NeedleQuestion, build_prompt, make_needles
from longrun.paths import path_option
from longrun.plan.budget import OFF
from longrun.plan.pages_read import selection_facts
from longrun.plan.prefill import add_prefill_options, prefill_facts
from longrun.plan.selection import SELECT_HELP, SELECT_QUESTION_HELP, parse_select
from longrun.plan.split import KEEP_HELP, KV_BYTES_HELP, parse_keep
from longrun.quant.kv_format import KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import EXACT, parse_dense_tokens
from longrun.units import parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from longrun.runtime.auto_head_map import AutoHeadMap
    from longrun.runtime.runtime import Runtime
    from longrun.session.session import Session

SPARE_TOKENS = 4  # generated beyond the key, to see that the number ends where it should


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Needle x depth x length grid, scored by exact match.")
    add_model_option(parser)
    add_yarn_option(parser)
    parser.add_argument(
        "--adapter",
        type=path_option,
        metavar="DIR|none",
        help="LoRA adapter folder (default: the demo model's, for that alone)",
    )
    parser.add_argument("--lengths", required=True, metavar="1K,4K,...", help="prompt lengths in the model's tokens")
    parser.add_argument("--depths", type=COUNT, default=5, metavar="N", help="evenly spaced depths from 0 to 1")
    parser.add_argument("--needles", type=COUNT, default=3, metavar="N", help="needles a cell")
    parser.add_argument(
        "--one-document", action="store_true", help="one text a length with the needles of every depth, read once"
    )
    parser.add_argument("--chunk-size", metavar="N", help="tokens of a prefill step (default: the budget's)")
    parser.add_argument("--head-map", default="full", metavar="DIR|full|auto")
    parser.add_argument("--retrieval-ratio", type=SHARE, metavar="R", help="share of the map's KV heads to keep")
    parser.add_argument("--kv-bytes", metavar="SIZE", help=KV_BYTES_HELP)
    parser.add_argument("--keep", metavar="N", help=KEEP_HELP)
    parser.add_argument("--select", metavar="N|P%|off", help=SELECT_HELP)
    parser.add_argument("--select-question", action="store_true", help=SELECT_QUESTION_HELP)
    add_prefill_options(parser)
    parser.add_argument("--kv", choices=KV_FORMATS, help="KV page format (default: the budget's)")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="default: the budget's")
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--haystack", nargs="+", type=path_option, metavar="FILE", help="text files instead of generated text"
    )
    parser.add_argument("--control", choices=["full"], help="the same grid under full attention with bf16 pages")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="start over where --out holds another sweep")
    return parser.parse_args(argv)


def collect_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the results, JSON-able; a resumed run must have the same.

    Raises:
        InputError: an impossible length, number of depths or of needles, or a haystack file that cannot be read.
    """
    lengths = sorted({parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")})
    if arguments.depths < 1:
        raise InputError(f"--depths {arguments.depths} must be at least 1: it is the number of depths from 0 to 1")
    last = arguments.depths - 1
    depths = [round(i / last, 6) for i in range(arguments.depths)] if last else [0.5]
    make_needles(arguments.needles * (len(depths) if arguments.one_document else 1), 0)
    files = []
    for path in arguments.haystack or []:
        if not path.is_file():
            raise InputError(f"--haystack {path} is not a file: name text files")
        files.append({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    return {
        "lengths": lengths,
        "depths": depths,
        "needles": arguments.needles,
        "head_map": arguments.head_map,
        "retrieval_ratio": arguments.retrieval_ratio,
        "kv": arguments.kv,
        "weights": arguments.weights,
        "budget": arguments.budget,
        "device": arguments.device,
        "haystack": files or "generated",
        "control": arguments.control,
        "seed": arguments.seed,
        # None where they are not used, as in the results of sweeps that knew no such options
        "one_document": arguments.one_document or None,
        "kv_bytes": arguments.kv_bytes,
        "keep": None if arguments.keep is None else parse_keep(arguments.keep, "--keep"),
        "select": None if arguments.select is None else parse_select(arguments.select, "--select"),
        "select_question": arguments.select_question or None,
        "prefill": arguments.prefill,
        "prefill_share": arguments.prefill_share,
        "prefill_mass": arguments.prefill_mass,
        "prefill_dense": dense_tokens(arguments),
        "yarn": arguments.yarn,
        "chunk_size": None if arguments.chunk_size is None else parse_tokens(arguments.chunk_size, "--chunk-size"),
    }


def dense_tokens(arguments: argparse.Namespace) -> int | None:
    """Of --prefill-dense. Raises InputError where it is none."""
    given = arguments.prefill_dense
    return None if given is None else parse_dense_tokens(given, "--prefill-dense")


def ask(
    session: Session, prompt: NeedlePrompt, decode: Callable[[list[int]], str], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Prefill the document once, then put every question to it: greedy answer, and each token right if forced."""
    session.prefill(prompt.document_ids, progress=progress)
    return put_questions(session, prompt.questions, decode, session.mark())


def put_questions(
    session: Session, questions: Sequence[NeedleQuestion], decode: Callable[[list[int]], str], document_end: Any,
    answers_one_by_one: bool = False, questions_one_by_one: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Put every question to the document that ends at the mark `document_end`; see `one_by_one`."""
    answers = []
    for question in questions:
        session.rewind(document_end)
        session.prefill(question.token_ids, one_by_one=questions_one_by_one, sparse=False)
        asked = session.mark()
        generated = list(session.generate(max_new_tokens=len(question.expected_ids) + SPARE_TOKENS))
        session.rewind(asked)
        forced = session.score(question.expected_ids, one_by_one=answers_one_by_one).argmax(dim=-1).tolist()
        right = sum(one == other for one, other in zip(forced, question.expected_ids, strict=True))
        text = decode(generated)
        answers.append(
            {
                "name": question.needle.name,
                "depth": question.depth,
                "at": round(question.at, 4),
                "expected": question.needle.key,
                "generated": text,
                "exact": question.needle.matches(text),
                "token_accuracy": right / len(question.expected_ids),
            }
        )
    return answers


def run_cell(
    runtime: Runtime,
    haystack: Haystack,
    settings: dict[str, Any],
    setting: str,
    length: int,
    depth: float,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """One cell in a session of its own: the record for results.json."""
    needles = make_needles(settings["needles"], seed=f"{settings['seed']}/{length}/{depth}")
    prompt = build_prompt(runtime.tokenizer, haystack, needles, length, depth)
    session = make_session(runtime, prompt)
    start = time.perf_counter()
    document_end, read = read_document(session, prompt, progress)
    ways = one_by_one(session, settings)
    answers = put_questions(session, prompt.questions, decoder(runtime), document_end, *ways)
    return record(setting, length, depth, prompt, session, answers, time.perf_counter() - start, read)


def run_document(
    runtime: Runtime,
    haystack: Haystack,
    settings: dict[str, Any],
    setting: str,
    length: int,
    depths: Sequence[float],
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    """The cells `depths` of one length, all from one document with the needles of all depths, read once.

    The document is the same whatever cells are still wanted. `seconds` of a cell are its questions' alone.
    """
    every = [depth for depth in settings["depths"] for _ in range(settings["needles"])]
    needles = make_needles(len(every), seed=f"{settings['seed']}/{length}/one document")
    prompt = build_prompt(runtime.tokenizer, haystack, needles, length, every)
    session = make_session(runtime, prompt)
    document_end, read = read_document(session, prompt, progress)
    for depth in depths:
        start = time.perf_counter()
        questions = [question for question in prompt.questions if question.depth == depth]
        answers = put_questions(session, questions, decoder(runtime), document_end, *one_by_one(session, settings))
        cell = record(setting, length, depth, prompt, session, answers, time.perf_counter() - start, read)
        yield cell | {"shared_document": {"needles": len(every), "depths": len(settings["depths"])}}


def one_by_one(session: Session, settings: dict[str, Any]) -> tuple[bool, bool]:
    """Whether right answers, and questions, are read token by token, which is how selected pages are read."""
    selects = session.plan.attention.selection is not None
    return selects, selects and bool(settings["select_question"])


def make_session(runtime: Runtime, prompt: NeedlePrompt) -> Session:
    """A session for the prompt, once nothing is left of those before it (pools, pinned memory)."""
    release_memory()
    return runtime.new_session(capacity=capacity_for(prompt.num_tokens))


def release_memory() -> None:
    """Give back what nothing refers to any more: sessions may stand in reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def decoder(runtime: Runtime) -> Callable[[list[int]], str]:
    return lambda ids: runtime.tokenizer.decode(ids, skip_special_tokens=True)


def read_document(
    session: Session, prompt: NeedlePrompt, progress: Callable[[int, int], None]
) -> tuple[Any, dict[str, Any]]:
    """The mark at the document's end, how long reading took (the mark waits for the GPU), and where it is read sparsely
    how much of it and what that read."""
    start = time.perf_counter()
    session.prefill(prompt.document_ids, progress=progress)
    document_end = session.mark()
    seconds = time.perf_counter() - start
    speed = len(prompt.document_ids) / seconds
    read = {"prefill_seconds": round(seconds, 3), "prefill_tokens_per_s": round(speed, 1)}
    counts = session.prefill_counts
    if counts is not None:
        read["read_sparsely"] = {"sparse_tokens": session.sparse_tokens, **counts.to_dict()}
    return document_end, read


def record(
    setting: str, length: int, depth: float, prompt: NeedlePrompt, session: Session, answers: list[dict[str, Any]],
    seconds: float, read: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A finished cell as results.json holds it."""
    return {
        "setting": setting,
        "length": length,
        "depth": depth,
        "score": sum(answer["exact"] for answer in answers) / len(answers),
        "token_accuracy": sum(answer["token_accuracy"] for answer in answers) / len(answers),
        "prompt_tokens": prompt.num_tokens,
        "seconds": round(seconds, 3),
        **read,
        "cache_bytes": session.cache_bytes,
        "needles": answers,
    }


def capacity_for(prompt_tokens: int) -> int:
    """Tokens a session needs for a prompt and its answer (a digit is at most two tokens)."""
    return prompt_tokens + 32


def load_runtime(
    arguments: argparse.Namespace,
    model_dir: Path,
    setting: str,
    longest: int,
    on_head_map: Callable[[AutoHeadMap], None],
) -> Runtime:
    """The model under the asked settings, or under full attention with bf16 pages for the control."""
    import longrun

    control = setting == "control"
    return longrun.load(
        model_dir,
        budget=arguments.budget,
        head_map="full" if control else arguments.head_map,
        kv_format="bf16" if control else arguments.kv,
        weight_format=arguments.weights,
        device=arguments.device,
        ctx=capacity_for(longest),
        adapter=arguments.adapter,
        yarn=arguments.yarn,
        retrieval_ratio=None if control else arguments.retrieval_ratio,
        kv_bytes=None if control else arguments.kv_bytes,
        keep=None if control else arguments.keep,
        select=OFF if control else arguments.select,
        select_from=None if arguments.select is None else 0,
        prefill=EXACT if control else arguments.prefill,
        prefill_share=None if control else arguments.prefill_share,
        prefill_mass=None if control else arguments.prefill_mass,
        prefill_dense=None if control else dense_tokens(arguments),
        chunk_size=None if arguments.chunk_size is None else parse_tokens(arguments.chunk_size, "--chunk-size"),
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
    arguments: argparse.Namespace,
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
    runtime = load_runtime(arguments, arguments.model, setting, max(settings["lengths"]), HeadMapProgress(console))
    if runtime.tokenizer is None:
        raise InputError(f"model folder {arguments.model} has no tokenizer: needles are text, so add its files")
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
    arguments.model, arguments.adapter = choice.model_dir, choice.adapter
    adapter = None
    if arguments.adapter is not None:
        adapter = Adapter.open(arguments.adapter, ModelConfig.from_dir(arguments.model))
    settings["model_fingerprint"] = model_fingerprint(arguments.model, adapter)
    haystack = Haystack.from_files(arguments.haystack) if arguments.haystack else Haystack.generated(arguments.seed)
    results = SweepResults.open(arguments.out, settings, arguments.force)
    results.head |= {"model": model_name(arguments.model), "environment": environment()}
    if adapter is not None:
        results.head["adapter"] = adapter.folder.name
    note = NOTE if is_planted(arguments.model) else None
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
        run_setting(arguments, settings, setting, haystack, results, console)
        gc.collect()  # the runtime is gone before the next one is planned

    titles = {setting: panel_title(model_name(arguments.model), setting, results.head[setting]) for setting in wanted}
    for setting, title in titles.items():
        console.print(grid(results, setting, title))
    for line in summary(results):
        console.print(line)
    picture = draw_heatmap(results, titles, note)
    console.print(f"wrote {arguments.out / 'results.json'} and {picture}")
    return 0


if __name__ == "__main__":
    run(main)
