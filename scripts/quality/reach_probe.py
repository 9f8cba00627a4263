"""Does the loss measured at a head's output say what a reach costs, and do reaches beat a fixed window at equal bytes?

    python scripts/quality/reach_probe.py --model FOLDER_OR_FILE --length 4K --json out.json

1. Losses are measured on one text (`longrun.patterns.reach_measure`), true KL of the next tokens on another: of single
   heads cut to one reach, all others seeing everything. Rank correlation (Spearman) says how far they agree.
2. At equal tokens held, KL of reaches given to heads by their losses, beside a share of the heads that sees everything
   and one window for all others, every window tried.

Both texts are modules of Python's standard library, followed by a request to repeat parts of them: KL is given for
tokens of the text and for repeated tokens. Keys and values are exact here; page formats are measured elsewhere.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import longrun
from longrun.arguments import COUNT, whole
from longrun.attention.interface import Attention, Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.cli import Parser, run
from longrun.errors import HeadMapError
from longrun.hub.find import add_yarn_option
from longrun.hub.names import model_name
from longrun.lab.quality.answered import AnsweredText
from longrun.lab.report_env import environment
from longrun.model.decoder import Decoder
from longrun.paths import path_option
from longrun.patterns.reach import REPEAT_WEIGHT, SampledText, finite_reaches, layer_weights, mean_losses, sampled_text
from longrun.patterns.reach_allocation import allocate
from longrun.patterns.reach_losses import ReachLosses
from longrun.runtime.runtime import Runtime
from longrun.text.encoder import TextEncoder
from longrun.units import ALL_TOKENS, parse_tokens

SINKS = 64


def make_text(encoder: TextEncoder, remainder: int, length: int) -> SampledText:
    """Modules of the standard library whose place in the list leaves this remainder when divided by 2."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 4000)
    random.Random("reach").shuffle(names)
    ids: list[int] = []
    for path in names[remainder::2]:
        ids += encoder.ids(f"# file: {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n")
        if len(ids) >= length:
            break
    return sampled_text(ids, encoder.ids, length, random.Random(remainder))


class Model:
    """A runtime's decoder under full attention, and what its next-token distributions become under reaches."""

    def __init__(self, runtime: Runtime) -> None:
        self.decoder: Decoder = runtime.parts.decoder
        self.rotary, kernels = runtime.parts.rotary, runtime.parts.gpu_kernels
        config = self.decoder.config
        self.shape, self.group = (config.num_layers, config.num_kv_heads), config.num_qo_heads // config.num_kv_heads
        self.scale, self.window = config.head_dim**-0.5, None if kernels is None else kernels.window_attention

    def log_probs(self, text: SampledText, reaches: list[list[int]] | None) -> Tensor:
        """float32 [rows, vocab_size] of the text's rows."""
        return self.predicted(text, WholeTextAttention(self.group, self.scale, SINKS, reaches, self.window))

    @torch.inference_mode()
    def predicted(self, text: SampledText | AnsweredText, attention: Attention) -> Tensor:
        """The same under any attention that takes a whole text in one step."""
        step = Step(0, len(text.ids), *self.rotary.cos_sin(0, len(text.ids), len(text.ids)))
        hidden = self.decoder.forward(text.ids.to(self.decoder.device), step, attention, all_positions=True)
        rows = hidden[text.rows.to(hidden.device)]
        return torch.cat([torch.log_softmax(self.decoder.logits(row), dim=-1) for row in rows.split(64)])

    def full(self) -> list[list[int]]:
        return [[ALL_TOKENS] * self.shape[1] for _ in range(self.shape[0])]


def compare(reference: Tensor, found: Tensor, text: SampledText) -> dict[str, float]:
    """Mean KL(reference || found) in nats and top-1 agreement, of text and of repeated tokens; and how many of the
    tokens to repeat are still the likeliest, of those that were."""
    kl = torch.cat(
        [(a.exp() * (a - b)).sum(-1) for a, b in zip(reference.split(64), found.split(64), strict=True)]
    ).cpu()
    best, was = found.argmax(-1).cpu(), reference.argmax(-1).cpu()
    count = len(text.text_rows)
    targets = text.ids[text.repeat_rows + 1]
    known = was[count:] == targets
    return {
        "kl_text": kl[:count].mean().item(), "kl_repeat": kl[count:].mean().item(),
        "top1_text": (best == was)[:count].float().mean().item(),
        "repeated": (best[count:] == targets)[known].float().mean().item(), "known": int(known.sum()),
    }  # fmt: skip


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def single_heads(
    model: Model, losses: Tensor, text: SampledText, reference: Tensor, reaches: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """`count` heads, evenly over the order of their losses at the shortest reach; each at three reaches."""
    heads = model.shape[1]
    order = losses[:, :, 0].sum(-1).flatten().argsort(descending=True).tolist()
    chosen = [order[i * (len(order) - 1) // (count - 1)] for i in range(count)]
    rows = []
    for at in chosen:
        layer, head = divmod(at, heads)
        for reach in reaches[:3]:
            row = model.full()
            row[layer][head] = reach
            own = losses[layer, head, reaches.index(reach)].tolist()
            rows.append(
                {"layer": layer, "head": head, "reach": reach, "loss_text": own[0], "loss_repeat": own[1],
                 **compare(reference, model.log_probs(text, row), text)}
            )  # fmt: skip
    return rows


def held(reaches: list[list[int]], length: int) -> float:
    """Share of full attention's tokens that are held."""
    tokens = [min(length, SINKS + reach) for row in reaches for reach in row]
    return sum(tokens) / len(tokens) / length


def by_losses(losses: Tensor, reaches: Sequence[int], length: int, budget: float) -> list[list[int]] | None:
    """Reaches of least loss within `budget` of full attention's tokens; None where the shortest do not fit."""
    rows = tuple(tuple(tuple(head) for head in row) for row in losses.tolist())
    measured = ReachLosses(SINKS, max(length, 4 * reaches[-1]), tuple(reaches), rows)
    try:
        found = allocate(measured, lambda reach: min(length, SINKS + reach), budget * length * losses[..., 0].numel())
    except HeadMapError:
        return None
    return [list(row) for row in found]


def fixed(ranking: Tensor, window: int, length: int, budget: float) -> list[list[int]] | None:
    """The heads of the highest rank see everything, all others the window; None where that does not fit."""
    layers, heads = ranking.shape
    least = min(length, SINKS + window)
    count = int((budget * length - least) * layers * heads / (length - least))
    if count < 0 or least == length:
        return None
    kept = set(ranking.flatten().argsort(descending=True)[:count].tolist())
    return [[ALL_TOKENS if i * heads + j in kept else window for j in range(heads)] for i in range(layers)]


def main() -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=path_option)
    add_yarn_option(parser)
    parser.add_argument("--length", default="4K")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--heads", type=whole(), default=20, help="single heads to compare")
    parser.add_argument("--shortest", type=COUNT, default=256, help="reach, in tokens")
    parser.add_argument("--weighing", default="8K", help="tokens of the text that layers are weighed on")
    parser.add_argument("--budgets", default="0.0625,0.125,0.25,0.5")
    parser.add_argument("--windows", default="256,1024,4096,16384")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args()
    length = parse_tokens(args.length, "--length")
    runtime = longrun.load(
        args.model, head_map="full", weight_format=args.weights, ctx=2048, yarn=args.yarn, chunk_size=256
    )
    model, encoder = Model(runtime), TextEncoder(runtime.tokenizer)
    finite = finite_reaches(args.shortest, length)
    measured, tested = (make_text(encoder, remainder, length) for remainder in (0, 1))
    began = time.perf_counter()
    plain = mean_losses(model.decoder, model.rotary, measured, finite, SINKS)
    seconds = time.perf_counter() - began
    began, short = time.perf_counter(), make_text(encoder, 0, min(length, parse_tokens(args.weighing, "--weighing")))
    weights = list(layer_weights(model.decoder, model.rotary, short, finite[0], SINKS, model.window))
    weighing_seconds = time.perf_counter() - began
    losses = plain * torch.stack(weights)[:, None, None]
    print(f"measured {length:,} tokens in {seconds:.1f} s, weighed layers in {weighing_seconds:.1f} s", flush=True)
    reference = model.log_probs(tested, None)
    result: dict[str, Any] = {
        "benchmark": "reach probe", "model": model_name(Path(args.model)), "length": length, "reaches": finite,
        "measure_seconds": seconds, "weighing_seconds": weighing_seconds, "losses": losses.tolist(),
        "losses_before_weighing": plain.tolist(), "weights": torch.stack(weights).tolist(),
        "device": str(model.decoder.device), "yarn": args.yarn,
    }  # fmt: skip

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result | {"environment": environment()}))

    if args.heads:
        result["heads"] = single_heads(model, losses, tested, reference, finite, args.heads)
        for loss in ("loss_text", "loss_repeat"):
            for kl in ("kl_text", "kl_repeat"):
                value = spearman([row[loss] for row in result["heads"]], [row[kl] for row in result["heads"]])
                result[f"spearman {loss} {kl}"] = value
                print(f"Spearman of {loss} and {kl}: {value:.3f}", flush=True)
        save()
    result["rows"] = []
    windows = [window for window in (parse_tokens(w, "--windows") for w in args.windows.split(",")) if window < length]
    by_window, kinds = dict(zip(finite, losses.unbind(2), strict=True)), losses.new_tensor([1, REPEAT_WEIGHT])
    given = {
        "reach": losses @ kinds, "reach, repeats weighed once": losses.sum(-1), "reach by text": losses[..., 0],
        "reach by repeats": losses[..., 1], "reach, layers not weighed": plain @ kinds,
    }  # fmt: skip
    for budget in map(float, args.budgets.split(",")):
        tried = {name: by_losses(values, finite, length, budget) for name, values in given.items()}
        for window in windows:  # a wide one ranks heads by the widest reach measured
            ranking = by_window[max(reach for reach in finite if reach <= window)] @ kinds
            tried[f"window {window}"] = fixed(ranking, window, length, budget)
        for name, reaches in tried.items():
            if reaches is None:
                continue
            found = compare(reference, model.log_probs(tested, reaches), tested)
            row = {"budget": budget, "name": name, "held": held(reaches, length), **found}
            result["rows"].append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        save()
    return 0


if __name__ == "__main__":
    run(main)
