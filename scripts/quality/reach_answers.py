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
from longrun.patterns.reach import finite_reaches, layer_weights, mean_losses
from longrun.patterns.reach_measure import layer_costs, measure_reaches
from longrun.text.encoder import TextEncoder
from longrun.units import parse_tokens
from scripts.quality.reach_probe import SINKS, Model, by_losses, fixed, held, make_text

KINDS = ("text", "repeats", "questions", "needles")
MIXTURES = {
    "text + 3 repeats (identify's)": (1, 3, 0, 0),
    "text": (1, 0, 0, 0),
    "repeats": (0, 1, 0, 0),
    "questions": (0, 0, 1, 0),
    "needles": (0, 0, 0, 1),
    "text + 30 repeats": (1, 30, 0, 0),
    "text + 3 questions": (1, 0, 3, 0),
    "text + 30 questions": (1, 0, 30, 0),
    "text + 30 needles": (1, 0, 0, 30),
    "text + 3 repeats + 10 needles": (1, 3, 0, 10),
    "questions + needles": (0, 0, 1, 1),
    "text + 10 questions + 10 needles": (1, 0, 10, 10),
}
RANKED = ("text + 3 repeats (identify's)", "repeats", "questions")
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
    parser.add_argument("--budgets", default="0.125,0.25,0.5")
    parser.add_argument("--windows", default="256,1024,4096")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args(argv)
    length, weighing = parse_tokens(args.length, "--length"), parse_tokens(args.weighing, "--weighing")
    runtime = longrun.load(
        args.model, head_map="full", weight_format=args.weights, ctx=2048, yarn=args.yarn, chunk_size=256,
        adapter=args.adapter,
    )  # fmt: skip
    model = Model(runtime)
    began = time.perf_counter()
    losses, reaches = losses_of(model, runtime.tokenizer, length, args.measured, weighing)
    print(f"losses in {time.perf_counter() - began:.1f} s", flush=True)
    judge = Judge(model, list(answered_texts(runtime.tokenizer, standard_library()[1::2], length, args.texts, seed=0)))
    print(f"full attention has right: {dict(judge.known)} of {dict(judge.asked)}", flush=True)
    result: dict[str, Any] = {
        "benchmark": "reach answers", "model": model_name(Path(args.model)), "length": length, "reaches": reaches,
        "kinds": KINDS, "mixtures": MIXTURES, "losses": losses.tolist(), "known": judge.known, "asked": judge.asked,
        "texts": args.texts, "device": str(model.decoder.device), "yarn": args.yarn, "code": source_facts(),
        "rows": [],
    }  # fmt: skip
    mixed = {name: losses @ losses.new_tensor(weights) for name, weights in MIXTURES.items()}
    windows = [parse_tokens(window, "--windows") for window in args.windows.split(",")]
    for budget in map(float, args.budgets.split(",")):
        rules: dict[str, Any] = {
            f"reaches by {name}": lambda n, own=own, b=budget: by_losses(own, reaches, n, b)
            for name, own in mixed.items()
        }
        for window in windows:
            known = max((place for place, reach in enumerate(reaches) if reach <= window), default=0)
            for name in RANKED:
                ranking = mixed[name][..., known]
                rules[f"window {window} by {name}"] = lambda n, r=ranking, w=window, b=budget: fixed(r, w, n, b)
        for name, rule in rules.items():
            began = time.perf_counter()
            if (row := judge.judge(rule)) is None:
                continue
            row |= {"budget": budget, "rule": name, "seconds": time.perf_counter() - began}
            result["rows"].append(row)
            print(
                f"{budget:.3f} {name:42} held {row['held']:.3f} KL {row['kl']:.4f} kept {row['kept']} of "
                f"{row['known']} {row['tasks']}", flush=True,
            )  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps(result | {"environment": environment()}))
    return 0


if __name__ == "__main__":
    run(main)
