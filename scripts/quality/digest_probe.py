"""Which digest of a page's keys loses least attention: bits of centres and half-ranges, and the weight lambda.

    python scripts/quality/digest_probe.py --model FOLDER_OR_FILE --lengths 8K --json out.json

As `selection_probe.py` measures, for digests that need nothing but the page as it is stored (`k5v3`): no spread of a
channel, no mean key of the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from longrun.arguments import COUNT
from longrun.attention.interface import Step
from longrun.cli import run
from longrun.lab.quality.answered import answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.selection_rules import PAGE, digest_rules, pages_of
from longrun.units import parse_tokens
from scripts.quality.selection_probe import BUDGETS, Measure, started, table_of


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    args, runtime, model, result = started(
        __doc__,
        argv,
        1,
        lambda parser: parser.add_argument("--rows", type=COUNT, default=32, help="of a kind and text"),
    )
    result |= {"benchmark": "digest probe", "rows": args.rows, "budgets": BUDGETS, "lengths": []}
    for length in (parse_tokens(one, "--lengths") for one in args.lengths.split(",")):
        began, found = time.perf_counter(), []
        for text in answered_texts(runtime.tokenizer, standard_library()[1::2], length, args.texts, seed=0):
            counts = [pages_of(budget, len(text.ids) // PAGE) for budget in BUDGETS]
            kinds = {
                name: rows[torch.linspace(0, len(rows) - 1, min(args.rows, len(rows))).long()]
                for name, rows in (("answers", text.answer_rows), ("text", text.text_rows))
            }  # fmt: skip
            own = Measure(model, kinds, {}, counts, args.newest, digest_rules())
            step = Step(0, len(text.ids), *model.rotary.cos_sin(0, len(text.ids), len(text.ids)))
            model.decoder.forward(text.ids.to(model.decoder.device), step, own)
            found.append(own)
        part = {
            "length": length, "pages": len(text.ids) // PAGE, "counts": counts,
            "mass": table_of(found, runtime.config.head_dim), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        result["lengths"].append(part)
        print(f"{length:,} tokens, {part['pages']:,} pages, {part['seconds']:.0f} s. Percent of attention lost")
        both = [table["rules"] for table in part["mass"].values()]
        shown = [BUDGETS.index(name) for name in ("26%", "6%", "3%")]
        for name, row in both[0].items():
            size = "" if row["bytes"] is None else f"{row['bytes']:.2f}"
            values = "".join(f"{100 * rules[name]['lost'][at]:7.2f}" for rules in both for at in shown)
            print(f"{name:42}{size:>7}{values}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
