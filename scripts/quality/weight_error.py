#!/usr/bin/env python
"""What each weight format costs a real model, beside what another 4-bit format would; JSON is the last line.

    python scripts/quality/weight_error.py [--model DIR] [--tokens 1024] [--also FILE.safetensors] [--json FILE]

Of every linear of the model: the RMS of the weight's error over the weight's own, and of the output's error over the
output's own, for the inputs that it sees when the model reads a text (Python's own documentation). Of the whole model:
logits at the last three quarters of the positions beside float32's. `--also` measures the weights of another
checkpoint, of any architecture: its matrices of at least 256 x 256, embeddings left out.

The demo model's weights come from a file in Q4_1 (affine, groups of 32), so formats whose groups and steps are like
those look better on it than on weights that were never quantized: hence `--also`, and random weights.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

import longrun
from longrun import cli
from longrun.arguments import COUNT
from longrun.errors import InputError
from longrun.model.demo import demo_model_dir
from longrun.paths import path_option
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import linear_bytes
from scripts.bench.bench_common import finish

SHIPPED = ("bf16", "int8", "nf4", "int4")
ROWS = 1024
KINDS = ("qkv", "out", "gate_up", "down")


def shipped(weight_format: str) -> Callable[[Tensor], Tensor]:
    """The weight as the format holds it, float32."""
    dtype = torch.bfloat16 if weight_format == "bf16" else torch.float32
    return lambda weight: QuantLinear(weight.to(dtype), weight_format).dense().float()


def symmetric(group: int, shares: Iterable[float], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """-8 to 7 steps, the step that of `shares` of the largest weight's eighth with the least error, as `dtype`."""

    def quantized(weight: Tensor) -> Tensor:
        x = weight.reshape(-1, group)
        eighth = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
        best, least = torch.zeros_like(x), torch.full_like(eighth, torch.inf)
        for share in shares:
            step = (eighth * share).to(dtype).float()
            found = x.div(step.masked_fill(step == 0, 1)).round_().clamp_(-8, 7).mul_(step)
            error = (found - x).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        return best.view_as(weight)

    return quantized


def affine(group: int, shares: Iterable[float], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """0 to 15 steps above a minimum: those of `shares` of the smallest and of the largest weight with the least error,
    fitted once to the rounding by least squares."""

    def quantized(weight: Tensor) -> Tensor:
        x = weight.reshape(-1, group)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        best, least = torch.zeros_like(x), torch.full_like(low, torch.inf)
        for below in shares:
            for above in shares:
                step, minimum = (high * above - low * below) / 15, low * below
                codes = ((x - minimum) / step).round_().clamp_(0, 15)
                centred = codes - codes.mean(1, keepdim=True)
                step = ((centred * x).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True)).to(dtype).float()
                minimum = (x.mean(1, keepdim=True) - step * codes.mean(1, keepdim=True)).to(dtype).float()
                found = ((x - minimum) / step).round_().clamp_(0, 15).mul_(step).add_(minimum)
                error = (found - x).square().sum(1, keepdim=True)
                best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        return best.view_as(weight)

    return quantized


_FINE = [0.6 + 0.025 * i for i in range(21)]
# name: (bits a weight, what makes it)
WAYS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    **{name: (8 * linear_bytes(64, 4096, name, 4, False) / 64 / 4096, shipped(name)) for name in SHIPPED},
    "symmetric, 32, largest weight": (4.5, symmetric(32, [1.0], torch.bfloat16)),
    "symmetric, 32, 21 steps tried": (4.5, symmetric(32, _FINE, torch.bfloat16)),
    "symmetric, 64, 21 steps tried": (4.25, symmetric(64, _FINE, torch.bfloat16)),
    "affine, 64, smallest and largest": (4.5, affine(64, [1.0], torch.float16)),
    "affine, 64, 36 pairs tried": (4.5, affine(64, [0.75, 0.8, 0.85, 0.9, 0.95, 1.0], torch.float16)),
}


class Recorder:
    """A linear that keeps what it was given."""

    def __init__(self, linear: QuantLinear) -> None:
        self.linear = linear
        self.x: list[Tensor] = []

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        self.x.append(x.clone())
        return self.linear(x, **options)


def load(model: Path, weight_format: str, tokens: int) -> longrun.Runtime:
    return longrun.load(model, device="cpu", weight_format=weight_format, kv_format="fp32", ctx=tokens + 1)


def read(runtime: longrun.Runtime, ids: Tensor) -> Tensor:
    """Logits of the last three quarters of the text, float32 [n, vocab_size]: row i is what stands before token i."""
    session, first = runtime.new_session(), len(ids) // 4
    session.prefill(ids[:first])
    return session.score(ids[first:]).float()


def ratio(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """RMS of all errors over RMS of all that they are errors of."""
    sums = [(error.double().square().sum().item(), whole.double().square().sum().item()) for error, whole in pairs]
    return (sum(a for a, _ in sums) / sum(b for _, b in sums)) ** 0.5


def weight_errors(weights: list[Tensor]) -> dict[str, float]:
    """By `WAYS`."""
    return {name: ratio((way(w) - w, w) for w in weights) for name, (_, way) in WAYS.items()}


def layer_errors(layers: list[dict[str, Recorder]]) -> dict[str, dict[str, Any]]:
    """By `WAYS`: error of the weights, and of the outputs by kind of layer and as the mean of the kinds."""
    found = {}
    for name, (_, way) in WAYS.items():
        weights: list[tuple[Tensor, Tensor]] = []
        outputs: dict[str, float] = {}
        for kind in KINDS:
            pairs = []
            for layer in layers:
                weight, x = layer[kind].linear.data, torch.cat(layer[kind].x)
                error = way(weight) - weight
                weights.append((error, weight))
                pairs.append((x @ error.T, x @ weight.T))
            outputs[kind] = ratio(pairs)
        found[name] = {"weights": ratio(weights), "outputs": outputs, "mean_output": sum(outputs.values()) / len(KINDS)}
    return found


def model_errors(model: Path, ids: Tensor, expected: Tensor) -> dict[str, dict[str, float]]:
    """By shipped format: RMS of the logits' difference over theirs, nats of divergence, nats of the text's tokens."""
    after = ids[len(ids) // 4 :]
    reference = expected.log_softmax(-1)
    found = {"fp32": {"loss": -reference.gather(1, after[:, None]).mean().item()}}
    for name in SHIPPED:
        logits = read(load(model, name, len(ids)), ids)
        log_p = logits.log_softmax(-1)
        found[name] = {
            "logits": ratio([(logits - expected, expected)]),
            "divergence": (reference.exp() * (reference - log_p)).sum(-1).mean().item(),
            "loss": -log_p.gather(1, after[:, None]).mean().item(),
            "top1_agrees": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        }
    return found


def matrices_of(file: Path) -> list[Tensor]:
    """Matrices of at least 256 x 256, float32, without embeddings; those whose rows are no whole groups left out.

    Raises:
        InputError: there are none.
    """
    with safe_open(file, "pt") as stored:
        names = [name for name in stored.keys() if "embed" not in name]  # noqa: SIM118
        found = [stored.get_tensor(name) for name in names if len(stored.get_slice(name).get_shape()) == 2]
    found = [w.float() for w in found if min(w.shape) >= 256 and w.shape[1] % 64 == 0]
    if not found:
        raise InputError(f"--also {file} holds no matrix of at least 256 x 256: give a checkpoint's safetensors file")
    return found


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path_option, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--tokens", type=COUNT, default=1024, help="tokens of text that are read")
    parser.add_argument(
        "--also", type=path_option, metavar="FILE", help="safetensors file of weights to measure as well"
    )
    parser.add_argument("--also-name", metavar="NAME", help="what to call them (default: the file's name)")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    args = parser.parse_args()
    if not 8 <= args.tokens <= ROWS:
        raise InputError(f"--tokens {args.tokens} is out of range: give 8 to {ROWS}")
    if args.also is not None and not args.also.is_file():
        raise InputError(f"--also {args.also} is no file: give a safetensors file")
    model = args.model or demo_model_dir()
    runtime = load(model, "fp32", args.tokens)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(runtime.encode(text[: 8 * args.tokens])[: args.tokens])
    layers = []
    for layer in runtime._parts.decoder._layers:
        layers.append({kind: Recorder(getattr(layer, kind)) for kind in KINDS})
        for kind, recorder in layers[-1].items():
            setattr(layer, kind, recorder)
    expected = read(runtime, ids)
    others = {"Gaussian": [torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))]}
    if args.also:
        others[args.also_name or args.also.name] = matrices_of(args.also)
    result = {
        "benchmark": "weight error", "model": model.name, "tokens": len(ids),
        "text": "pydoc_data.topics", "bits": {name: bits for name, (bits, _) in WAYS.items()},
        "layers": layer_errors(layers), "model_errors": model_errors(model, ids, expected),
        "weights_of_others": {name: weight_errors(weights) for name, weights in others.items()},
    }  # fmt: skip
    table = Table("format", "bits", "weights", "outputs", *others)
    for name, (bits, _) in WAYS.items():
        errors = result["layers"][name]
        more = [f"{result['weights_of_others'][other][name]:.4f}" for other in others]
        table.add_row(name, f"{bits:g}", f"{errors['weights']:.4f}", f"{errors['mean_output']:.4f}", *more)
    Console(width=120).print(table)
    return finish(result, args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
