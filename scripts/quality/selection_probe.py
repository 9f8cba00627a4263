"""How much attention a choice of pages catches: page indices, and rules across steps and layers, on a real model.

    python scripts/quality/selection_probe.py --model FOLDER_OR_FILE --lengths 8K --json out.json

A text of real code with its questions and answers is read under full attention. For a sample of its queries, in every
layer, the attention that falls on pages which a rule does not choose is *lost*: the share of all attention, mean over
query heads and rows, beside what the best choice of as many pages loses. The first page, the query's own and the newest
full pages are always read and stand apart. `longrun.lab.selection` says what the indices compute.

Then, for consecutive queries (`selection_steps.py`): what is lost where the choice is some tokens old, hits of a pool
of recently chosen pages (LRU), and what is lost where a few layers choose for all, fitted on the first text and judged
on the last.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import longrun
from longrun.arguments import COUNT
from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.cli import Parser, run
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.answered import AnsweredText, answered_texts
from longrun.lab.quality.code_source import source_facts, standard_library
from longrun.lab.report_env import environment
from longrun.lab.selection import LayerKeys, LayerQueries, padded
from longrun.lab.selection_rules import LAMBDAS, PAGE, Rule, fitted_name, known_rules, pages_of
from longrun.paths import path_option
from longrun.runtime.runtime import Runtime
from longrun.units import parse_tokens
from scripts.quality.reach_probe import Model
from scripts.quality.selection_steps import Stream, filter_layers, lost_by_source, old_choices, own_choice

BUDGETS = ("32", "64", "128", "256", "512", "26%", "6%", "4%", "3%", "1.5%", "1.3%")
AT = BUDGETS.index("6%")
ROWS, STREAM = 96, 128  # queries of a kind and text; consecutive ones
STREAM_RULES, STREAM_BUDGETS = ("keys", "middle 16 + 0.5 at 4 bits"), ("6%", "1.5%")
FITTED = ("mean", "middle", "unturned")


def lost_mass(values: Tensor, mass: Tensor, counts: Sequence[int]) -> Tensor:
    """[num_kv_heads, len(counts)], summed over rows: the mass that the `counts` units of highest value leave.

    Args:
        values: of `LayerQueries.ranking`; mass: [num_kv_heads, R, units], 0 where a unit cannot be chosen.
    """
    order = values.argsort(-1, descending=True)
    caught = mass.masked_fill(values == float("-inf"), 0).gather(-1, order).cumsum(-1)
    at = torch.tensor([min(n, mass.shape[-1]) - 1 for n in counts], device=mass.device)
    return (mass.sum(-1, keepdim=True) - caught[..., at]).clamp_min(0).sum(1)


class Measure(WholeTextAttention):
    """Full attention, measured on the way.

    Attributes:
        lost: by (kind of rows, rule) [num_layers, num_kv_heads, budgets], mean over rows.
        past: by kind of rows [num_layers, num_kv_heads]: the mass of all that can be chosen.
        streams: by kind of consecutive rows.
    """

    def __init__(
        self, model: Model, rows: Mapping[str, Tensor], streams: Mapping[str, Tensor], counts: Sequence[int],
        newest: int, rules: Mapping[str, Rule],
    ) -> None:  # fmt: skip
        super().__init__(model.group, model.scale, 0)
        device = model.decoder.device
        self.rules, self._counts, self._newest, self._factor = rules, counts, newest, model.rotary.scaling
        self._rows = {kind: some.to(device) for kind, some in rows.items()}
        self.streams = {kind: Stream(some.to(device)) for kind, some in streams.items()}
        self.lost = {(kind, name): torch.zeros(*model.shape, len(counts)) for kind in rows for name in self.rules}
        self.past = {kind: torch.zeros(model.shape) for kind in rows}

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`; the step holds the whole text."""
        cos, sin = (padded(table / self._factor) for table in (step.cos, step.sin))
        keys = LayerKeys(padded(k.transpose(0, 1).float()), cos, sin)
        for kind, rows in self._rows.items():
            for some in self._queries(q, keys, rows):
                mass = {unit: some.mass(unit) for unit in (16, PAGE)}
                self.past[kind][layer_idx] += mass[PAGE].sum((1, 2)).cpu() / len(rows)
                lost = [
                    lost_mass(some.ranking(rule), mass[unit], [n * PAGE // unit for n in self._counts])
                    for rule in self.rules.values() for unit in (rule.chosen_unit,)
                ]  # fmt: skip
                for name, own in zip(self.rules, torch.stack(lost).cpu() / len(rows), strict=True):
                    self.lost[kind, name][layer_idx] += own
        for stream in self.streams.values():
            for some in self._queries(q, keys, stream.rows):
                stream.mass.append(some.mass(PAGE))
                for name in STREAM_RULES:
                    stream.values.setdefault(name, []).append(some.ranking(self.rules[name]))
        return super().run(layer_idx, q, k, v, step)

    def _queries(self, q: Tensor, keys: LayerKeys, rows: Tensor) -> Iterator[LayerQueries]:
        return LayerQueries.pieces(q[rows], rows, keys, self.softmax_scale, self._newest)


def measure(model: Model, text: AnsweredText, newest: int) -> Measure:
    """One text."""
    rows = text.answer_rows[:: -(-len(text.answer_rows) // ROWS)]
    end, length = text.document_length - 1, len(text.ids)
    streams = {"text": torch.arange(end - STREAM, end), "questions": torch.arange(length - STREAM, length)}
    counts = [pages_of(budget, length // PAGE) for budget in BUDGETS]
    kinds = {"answers": rows, "text": text.text_rows[-ROWS:]}
    found = Measure(model, kinds, streams, counts, newest, known_rules())
    step = Step(0, length, *model.rotary.cos_sin(0, length, length))
    model.decoder.forward(text.ids.to(model.decoder.device), step, found)
    return found


def table_of(found: Sequence[Measure], head_dim: int) -> dict[str, dict[str, Any]]:
    """By kind of rows and rule the mean loss at every budget over all texts, and the worst layer and head at 6%, each
    with the least that it could lose."""
    table: dict[str, dict[str, Any]] = {}
    for kind in found[0].past:
        mean = {name: torch.stack([one.lost[kind, name] for one in found]).mean(0) for name in found[0].rules}
        past = torch.stack([one.past[kind] for one in found]).mean().item()
        table[kind] = {"could_be_chosen": past, "rules": {}}
        least = mean["perfect"][..., AT]
        for name, rule in found[0].rules.items():
            heads = mean[name][..., AT]
            layer, (one, head) = int(heads.mean(1).argmax()), divmod(int(heads.argmax()), heads.shape[1])
            table[kind]["rules"][name] = {
                "bytes": None if rule.index is None else rule.index.token_bytes(head_dim),
                "lost": [round(x, 5) for x in mean[name].mean((0, 1)).tolist()],
                "worst_layer": [layer, *(round(x[layer].mean().item(), 4) for x in (heads, least))],
                "worst_head": [one, head, *(round(x[one, head].item(), 4) for x in (heads, least))],
            }
    return table


def fitted_lambda(found: Sequence[Measure], kind: str) -> dict[str, Any]:
    """The lambda that loses least at 6% on the first text, and what every lambda loses on the others."""

    def lost(lam: float, some: Sequence[Measure]) -> float:
        name = fitted_name(kind, lam)
        return sum(one.lost[rows, name][..., AT].mean().item() for one in some for rows in one.past) / len(some) / 2

    chosen = min(LAMBDAS, key=lambda lam: lost(lam, found[:1]))
    return {"lambda": chosen, "lost_on_the_others": {lam: lost(lam, found[1:] or found) for lam in LAMBDAS}}


def steps_of(found: Sequence[Measure], pages: int, layers: int) -> Iterator[dict[str, Any]]:
    """Every stream, rule and budget: see `selection_steps`."""
    for kind in found[0].streams:
        for rule in STREAM_RULES:
            streams = [one.streams[kind].joined(rule, layers) for one in found]
            for budget in STREAM_BUDGETS:
                count = pages_of(budget, pages)
                each = [old_choices(*stream, count) for stream in streams]
                mean = {
                    key: {k: sum(one[key][k] for one in each) / len(each) for k in each[0][key]} for key in each[0]
                }  # fmt: skip
                fit, judged = (lost_by_source(*stream, count, layers) for stream in (streams[0], streams[-1]))
                yield {
                    "rows": kind, "rule": rule, "pages": count, **mean, "filters_judged_on_another_text": len(each) > 1,
                    "lost_by_own_choice": own_choice(judged), "filters": filter_layers(fit, judged),
                }  # fmt: skip


def started(
    described: str, argv: Sequence[str] | None, texts: int, add: Callable[[Parser], object] = lambda parser: None
) -> tuple[Any, Runtime, Model, dict[str, Any]]:
    """Options, the model, and what every result says of them.

    Args:
        texts: default of `--texts`; add: adds options.
    """
    parser = Parser(description=described.split("\n")[0])
    parser.add_argument("--model", required=True, type=path_option)
    add_yarn_option(parser)
    parser.add_argument("--adapter", type=path_option)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--lengths", default="8K", metavar="4K,8K,...")
    parser.add_argument("--texts", type=COUNT, default=texts, help="of every length")
    parser.add_argument("--newest", type=COUNT, default=4, help="full pages that are always read")
    parser.add_argument("--json", type=path_option, help="write the result here")
    add(parser)
    args = parser.parse_args(argv)
    runtime = longrun.load(
        args.model, head_map="full", weight_format=args.weights, ctx=2048, yarn=args.yarn, chunk_size=256,
        adapter=args.adapter,
    )  # fmt: skip
    if runtime.parts.decoder.device.type == "cuda":  # bf16 keys and queries are exact in TF32
        torch.set_float32_matmul_precision("high")
    settings = {
        "model": model_name(Path(args.model)), "yarn": args.yarn, "texts": args.texts, "newest": args.newest,
        "adapter": None if args.adapter is None else args.adapter.name, "code": source_facts(),
        "environment": environment(),
    }  # fmt: skip
    return args, runtime, Model(runtime), settings


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    args, runtime, model, result = started(__doc__, argv, texts=2)
    result |= {"benchmark": "selection probe", "rows": ROWS, "stream": STREAM, "budgets": BUDGETS, "lengths": []}
    for length in (parse_tokens(one, "--lengths") for one in args.lengths.split(",")):
        texts = list(answered_texts(runtime.tokenizer, standard_library()[1::2], length, args.texts, seed=0))
        began, pages = time.perf_counter(), len(texts[0].ids) // PAGE
        found = [measure(model, text, args.newest) for text in texts]
        part = {
            "length": length, "pages": pages, "counts": [pages_of(budget, pages) for budget in BUDGETS],
            "mass": table_of(found, runtime.config.head_dim),
            "fitted": {kind: fitted_lambda(found, kind) for kind in FITTED},
            "steps": list(steps_of(found, pages, model.shape[0])), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        result["lengths"].append(part)
        show(part)
        if args.json:
            args.json.write_text(json.dumps(result))
    return 0


def show(part: Mapping[str, Any]) -> None:
    """Print a length's tables."""
    print(f"\n{part['length']:,} tokens, {part['pages']:,} pages, {part['seconds']:.0f} s. Percent of attention lost")
    for kind, table in part["mass"].items():
        print(f"\n{kind} ({100 * table['could_be_chosen']:.1f}% could be chosen)")
        print(f"{'':42}{'bytes':>7}" + "".join(f"{name:>7}" for name in BUDGETS))
        for name, row in table["rules"].items():
            size = "-" if row["bytes"] is None else f"{row['bytes']:.2f}"
            print(f"{name:42}{size:>7}" + "".join(f"{100 * x:7.2f}" for x in row["lost"]))
    print(f"\nfitted: {_short(part['fitted'])}")
    for row in part["steps"]:
        print(_short({key: value for key, value in row.items() if key != "filters"}))
        for one in row["filters"]:
            print("   ", _short(one))
    sys.stdout.flush()


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run(main)
