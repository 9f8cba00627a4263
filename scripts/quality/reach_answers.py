"""Which loss keeps answers? Reaches given to heads by losses of several kinds, judged by questions about real code.

    python scripts/quality/reach_answers.py --model FOLDER_OR_FILE --length 30K --texts 10 --json out.json

Losses are measured on one half of the standard library's modules (`longrun.patterns.reach_measure`): of running text,
of parts repeated, of answers to questions about code, and of needles' numbers. Reaches by mixtures of them, and whole
heads with one window for all others, are judged on the other half, at equal tokens held: KL of running code, and how
many of the answers that full attention has right are kept, all questions of a text in one forward pass
(`longrun.lab.quality.answered`). Keys and values are exact.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import longrun
from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.answered import NEEDLES, AnsweredText, answered_texts
from longrun.lab.quality.code_source import source_facts, standard_library
from longrun.lab.quality.statistics import wilson
from longrun.lab.report_env import environment
from longrun.paths import path_option
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify_settings import rank_scores
from longrun.patterns.reach import finite_reaches, layer_weights, mean_losses
from longrun.patterns.reach_losses import ReachLosses
from longrun.patterns.reach_measure import layer_costs, measure_reaches
from longrun.text.encoder import TextEncoder
from longrun.units import parse_tokens
from scripts.quality.reach_cuts import RandomCuts
from scripts.quality.reach_probe import SINKS, Model, by_losses, fixed, held, make_text

KINDS = ("text", "repeats", "questions", "needles")
MIXTURES = {
    "text + 3 repeats (identify's)": (1, 3, 0, 0),
    "repeats": (0, 1, 0, 0),
    "text + 30 needles": (1, 0, 0, 30),
    "questions + needles": (0, 0, 1, 1),
}
BY_CUTS = "random cuts"
RANKED = ("questions + needles", BY_CUTS)
"""By which the heads that keep everything are chosen where all others have one window."""


@dataclass
class Judged:
    """What a rule keeps, over all texts."""

    held: list[float]
    kl: list[float]
    kept: Counter[str]

    def row(self, known: Counter[str]) -> dict[str, Any]:
        """JSON-able: means, and by task [kept, of those that full attention has right]."""
        tasks = {task: [self.kept[task], known[task]] for task in sorted(known)}
        every = sum(self.kept.values()), known.total()
        return {
            "held": sum(self.held) / len(self.held), "kl": sum(self.kl) / len(self.kl), "tasks": tasks,
            "kept": every[0], "known": every[1], "interval": wilson(*every).to_dict() if every[1] else None,
        }  # fmt: skip


class Judge:
    """The tested texts with full attention's predictions."""

    def __init__(self, model: Model, texts: Sequence[AnsweredText]) -> None:
        self._model, self._texts = model, texts
        self._reference = [model.log_probs(text, None) for text in texts]
        self._right = [
            text.kept(found.argmax(-1).cpu()) for text, found in zip(texts, self._reference, strict=True)
        ]  # fmt: skip
        self.known = Counter(
            task for text, right in zip(texts, self._right, strict=True)
            for (task, _), known in zip(text.answers, right, strict=True) if known
        )  # fmt: skip
        self.asked = Counter(task for text in texts for task, _ in text.answers)

    def judge(self, rule: Any) -> dict[str, Any] | None:
        """`rule` gives reaches for a length, or None where the tokens do not hold them."""
        found = Judged([], [], Counter())
        for text, reference, right in zip(self._texts, self._reference, self._right, strict=True):
            reaches = rule(len(text.ids))
            if reaches is None:
                return None
            log_probs, count = self._model.log_probs(text, reaches), len(text.text_rows)
            kl = (reference[:count].exp() * (reference[:count] - log_probs[:count])).sum(-1)
            found.held.append(held(reaches, len(text.ids)))
            found.kl.append(kl.mean().item())
            kept = text.kept(log_probs.argmax(-1).cpu())
            found.kept.update(
                task for (task, _), own, known in zip(text.answers, kept, right, strict=True) if own and known
            )
        return found.row(self.known)


def losses_of(model: Model, tokenizer: Any, length: int, measured: int, weighing: int) -> tuple[Tensor, list[int]]:
    """float64 [num_layers, num_kv_heads, len(reaches), 4], nats by kind, and the reaches."""
    encoder, reaches = TextEncoder(tokenizer), finite_reaches(256, length)
    text = make_text(encoder, 0, length)
    plain = mean_losses(model.decoder, model.rotary, text, reaches, SINKS)
    short = make_text(encoder, 0, min(length, weighing))
    weights = torch.stack(list(layer_weights(model.decoder, model.rotary, short, reaches[0], SINKS, model.window)))
    found = [plain * weights[:, None, None]]
    files = standard_library()[0::2]
    asked = list(answered_texts(tokenizer, files, length, measured, seed=1))
    short_asked = next(iter(answered_texts(tokenizer, files, min(length, weighing), 1, seed=2)))
    kinds = ("questions", "needles")
    nats = torch.stack([_of_answers(model, asked, short_asked, kind, reaches) for kind in kinds], dim=-1)
    return torch.cat((*found, nats), dim=-1).clamp_(min=0), list(reaches)  # rounding can leave -1e-19


def _of_answers(
    model: Model, texts: Sequence[AnsweredText], short: AnsweredText, kind: str, reaches: Sequence[int]
) -> Tensor:
    """float64 [num_layers, num_kv_heads, len(reaches)], nats at the answers of one kind."""

    def mean(text: AnsweredText, some: Sequence[int]) -> Tensor:
        rows = _rows(text, kind)
        return measure_reaches(model.decoder, model.rotary, text.ids, rows, some, SINKS).double().mean(-1)

    plain = torch.stack([mean(text, reaches) for text in texts]).mean(0)
    of_layer = mean(short, reaches[:1]).sum((1, 2))
    costs = layer_costs(
        model.decoder, model.rotary, short.ids, (_rows(short, kind),), reaches[0], SINKS, model.window
    )  # fmt: skip
    cost = torch.tensor([one for (one,) in costs], dtype=torch.float64)
    return plain * torch.where(of_layer > 0, cost / of_layer, 0.0)[:, None, None]


def _rows(text: AnsweredText, kind: str) -> Tensor:
    return torch.cat([rows for task, rows in text.answers if (task == NEEDLES) == (kind == "needles")])


def costs_by_cuts(
    model: Model, texts: Sequence[AnsweredText], window: int, trials: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """Nats by which answers suffer from cutting each head to `window` where about half are cut, float64
    [num_layers, num_kv_heads]; fitted by `trials` cuts at random, then by as many that cut heads of small cost more.
    """
    cuts = RandomCuts(model, texts, window)
    first, facts = cuts.fit(trials)
    second, more = cuts.fit(trials, first)
    return second, [facts, more]


def mixed_losses(losses: Tensor, costs: Tensor | None) -> dict[str, Tensor]:
    """float64 [num_layers, num_kv_heads, len(reaches)] by name: mixtures, and with costs of cuts a loss that is the
    cost at the longest reach, and at shorter ones larger as the loss of answers is."""
    found = {name: losses @ losses.new_tensor(weights) for name, weights in MIXTURES.items()}
    if costs is not None:
        answers = found["questions + needles"]
        curve = answers / answers[..., -1:].clamp(min=1e-12)
        found[BY_CUTS] = costs.clamp(min=1e-5)[..., None] * curve.clamp(1.0, 100.0)
    return found


def save_map(folder: Path, losses: Tensor, reaches: Sequence[int], length: int) -> None:
    """A head map of these losses, [num_layers, num_kv_heads, len(reaches)], measured on `length` tokens."""
    rows = tuple(tuple(tuple(head) for head in row) for row in losses.tolist())
    scores = rank_scores(losses[..., -1].tolist())
    HeadMap(
        tuple(tuple(row) for row in scores), SINKS, reaches[0],
        reach_losses=ReachLosses(SINKS, length, tuple(reaches), rows),
    ).save(folder)  # fmt: skip


def rules_within(mixed: dict[str, Tensor], reaches: Sequence[int], windows: Sequence[int], budget: float) -> dict:
    """What is judged, by name: see `Judge.judge`."""
    rules: dict[str, Any] = {
        f"reaches by {name}": lambda n, own=own: by_losses(own, reaches, n, budget) for name, own in mixed.items()
    }
    for window in windows:
        known = max((place for place, reach in enumerate(reaches) if reach <= window), default=0)
        for name in RANKED:
            if name in mixed:
                rules[f"window {window} by {name}"] = lambda n, r=mixed[name][..., known], w=window: fixed(
                    r, w, n, budget
                )
    return rules


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=path_option)
    add_yarn_option(parser)
    parser.add_argument("--adapter", type=path_option)
    parser.add_argument("--length", default="8K")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--texts", type=COUNT, default=10, help="texts that are judged")
    parser.add_argument("--measured", type=COUNT, default=2, help="texts whose answers losses are measured on")
    parser.add_argument("--weighing", default="8K", help="tokens of the text that layers are weighed on")
    parser.add_argument("--cuts", type=COUNT, default=0, metavar="N", help="also twice N random cuts on ten texts")
    parser.add_argument("--losses", type=path_option, help="take losses from this result, of a shorter text")
    parser.add_argument("--maps", type=path_option, metavar="DIR", help="write head maps of all losses here")
    parser.add_argument("--rules", default="", metavar="WORDS,WORDS", help="only rules whose names hold one of these")
    parser.add_argument("--budgets", default="0.125,0.25,0.5")
    parser.add_argument("--windows", default="256,1024,4096")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args(argv)
    length, weighing = parse_tokens(args.length, "--length"), parse_tokens(args.weighing, "--weighing")
    runtime = longrun.load(
        args.model, head_map="full", weight_format=args.weights, ctx=2048, yarn=args.yarn, chunk_size=256,
        adapter=args.adapter,
    )  # fmt: skip
    model, tokenizer, costs, facts = Model(runtime), runtime.tokenizer, None, []
    began = time.perf_counter()
    if args.losses:
        known = json.loads(args.losses.read_text())
        reaches = known["reaches"]
        losses = torch.tensor(known["losses"], dtype=torch.float64)[..., [known["kinds"].index(kind) for kind in KINDS]]
        costs, facts = known["costs"] and torch.tensor(known["costs"], dtype=torch.float64), known["cuts"]
    else:
        losses, reaches = losses_of(model, tokenizer, length, args.measured, weighing)
        print(f"losses in {time.perf_counter() - began:.1f} s", flush=True)
        if args.cuts:
            asked = list(answered_texts(tokenizer, standard_library()[0::2], length, 10, seed=3))
            costs, facts = costs_by_cuts(model, asked, reaches[-1], args.cuts)
            print(f"random cuts: {facts}, in {time.perf_counter() - began:.1f} s", flush=True)
    judge = Judge(model, list(answered_texts(tokenizer, standard_library()[1::2], length, args.texts, seed=0)))
    print(f"full attention has right: {dict(judge.known)} of {dict(judge.asked)}", flush=True)
    result: dict[str, Any] = {
        "benchmark": "reach answers", "model": model_name(Path(args.model)), "length": length, "reaches": reaches,
        "kinds": KINDS, "mixtures": MIXTURES, "losses": losses.tolist(),
        "costs": None if costs is None else costs.tolist(), "cuts": facts, "known": judge.known,
        "asked": judge.asked, "texts": args.texts, "device": str(model.decoder.device), "yarn": args.yarn,
        "code": source_facts(), "rows": [],
    }  # fmt: skip
    mixed = mixed_losses(losses, costs)
    if args.maps:
        for name, own in mixed.items():
            save_map(args.maps / re.sub(r"\W+", "-", name).strip("-"), own, reaches, length)
    windows = [parse_tokens(window, "--windows") for window in args.windows.split(",")]
    every = {1.0: {"all but one token, by another kernel": lambda n: [[n - 1] * model.shape[1]] * model.shape[0]}}
    for budget in map(float, args.budgets.split(",")):
        every[budget] = rules_within(mixed, reaches, windows, budget)
    for budget, rules in every.items():
        for name, rule in rules.items():
            if budget < 1 and not any(words in name for words in args.rules.split(",")):
                continue
            began = time.perf_counter()
            if (row := judge.judge(rule)) is None:
                continue
            row |= {"budget": budget, "rule": name, "seconds": time.perf_counter() - began}
            result["rows"].append(row)
            print(
                f"{budget:.3f} {name:38} held {row['held']:.3f} KL {row['kl']:.4f} kept {row['kept']} of "
                f"{row['known']} {[kept for kept, _ in row['tasks'].values()]}", flush=True,
            )  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps(result | {"environment": environment()}))
    return 0


if __name__ == "__main__":
    run(main)
