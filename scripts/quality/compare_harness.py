"""Compares the loglikelihoods of two runs of lm-evaluation-harness, item by item: the same tasks, the same model, once
over a server (`--model local-completions`) and once by transformers (`--model hf`), each with `--log_samples` and
`--output_path FOLDER`. docs/clients.md has the commands.

    python scripts/quality/compare_harness.py out/server out/hf --json compared.json

The last line of stdout is one JSON object. Exit status 1 where two loglikelihoods differ by more than --most.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import real
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.report_env import environment
from longrun.paths import path_option

_MOST = 0.01
Scores = dict[tuple[str, int, int], tuple[float, bool]]


def scores_of(folder: Path) -> Scores:
    """Loglikelihood, and whether greedy decoding would have written it, by task, item and continuation.

    Raises:
        InputError: the folder holds no samples of loglikelihoods.
    """
    found: Scores = {}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for number, answers in enumerate(sample["resps"]):
                score, greedy = answers[0]
                found[task, sample["doc_id"], number] = float(score), greedy in (True, "True")
    if not found:
        raise InputError(f"{folder} holds no samples_*.jsonl: run lm_eval with --log_samples --output_path {folder}")
    return found


def made_by(folder: Path) -> dict[str, Any]:
    """Which program made the run."""
    (file,) = folder.rglob("results_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    return {"lm_eval": found["lm_eval_version"], "transformers": found["transformers_version"],
            "model": found["config"]["model"], "batch_size": found["config"]["batch_size"]}  # fmt: skip


def compared(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """How far they are apart, all in all and by task.

    Raises:
        InputError: they are not of the same items.
    """
    if ours.keys() != theirs.keys():
        raise InputError(f"the runs hold {len(ours):,} and {len(theirs):,} scores of other items: run the same tasks")
    tasks = {}
    for task in sorted({key[0] for key in ours}):
        keys = [key for key in ours if key[0] == task]
        tasks[task] = {
            "items": len({key[1] for key in keys}), "scores": len(keys),
            "largest_difference": max(abs(ours[key][0] - theirs[key][0]) for key in keys),
            "greedy_differs": sum(ours[key][1] != theirs[key][1] for key in keys),
        }  # fmt: skip
    return {
        "largest_difference": max(task["largest_difference"] for task in tasks.values()), "tasks": tasks,
        "scores": [
            {"task": task, "item": item, "continuation": number, "server": ours[task, item, number][0],
             "transformers": theirs[task, item, number][0]}
            for task, item, number in sorted(ours)
        ],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit status."""
    parser = Parser(prog="python scripts/quality/compare_harness.py", description=__doc__)
    parser.add_argument("server", type=path_option, metavar="FOLDER", help="output of the run over the server")
    parser.add_argument("transformers", type=path_option, metavar="FOLDER", help="output of the run by transformers")
    parser.add_argument("--most", type=real(0), default=_MOST, metavar="X", help=f"by which they may differ ({_MOST})")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the result with every score there")
    args = parser.parse_args(argv)
    result = compared(scores_of(args.server), scores_of(args.transformers))
    if args.json is not None:
        runs = {"server": made_by(args.server), "transformers": made_by(args.transformers)}
        whole = result | {"runs": runs, "environment": environment()}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"largest_difference": result["largest_difference"], "tasks": result["tasks"]}))
    return 0 if result["largest_difference"] <= args.most else 1


if __name__ == "__main__":
    run(main)
