"""At which distances a model with a long-text adapter still reads: short samples whose positions jump once.

A real text of a million tokens costs minutes of a GPU. A sample of a few thousand tokens, of which a part is moved away
by a jump of the positions that RoPE turns by, shows in seconds what the angles of such a distance do alone, without the
many tokens that compete in a long text. Two jumps are measured: `questions`, all of them moved away from the document
that they ask about, and `document`, all moved away from the first 16 tokens, which attention rests on. With a larger
`--rope-theta` than the adapter's own the same weights turn more slowly. Samples are training's (long_samples.py), of
held-out text.
Example: python scripts/training/evaluate_positions.py --adapter out/long-train/adapter --data out/long-data --out FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import COUNT, SEED
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.long_tasks import Corpus
from longrun.lab.report_env import environment
from longrun.model.choice import choose_model
from longrun.model.tokenizer import load_tokenizer
from longrun.paths import path_option
from longrun.units import format_tokens, parse_tokens
from scripts.training.long_lora import LoraModel
from scripts.training.long_samples import AnswerWeights, Sample, SampleWriter

RESTING = 16
"""First tokens that stay where they are when the document is moved."""
MOVED = ("document", "questions")
_LEAST = 512  # tokens of a sample: below, the questions leave no room for a text


def count_right(lora: LoraModel, sample: Sample, positions: torch.Tensor) -> tuple[int, int, int]:
    """Values of the sample whose tokens are all the likeliest ones, those whose first token is, and all.

    Args:
        positions: int64 [1, T], what RoPE turns by.
    """
    device = positions.device
    ids = torch.tensor(sample.token_ids, device=device)
    exact = first = 0
    with torch.no_grad(), lora.at_positions(positions):
        hidden = lora.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for start, begun, stop in sample.values:
            same = lora.model.lm_head(hidden[start - 1 : stop - 1]).argmax(dim=-1) == ids[start:stop]
            exact += int(same.all())
            first += int(same[: begun - start + 1].all())
    return exact, first, len(sample.values)


def moved(sample: Sample, what: str | None, by: int) -> torch.Tensor:
    """Positions int64 [1, T]: 0, 1, 2 ... with one jump of `by` before what is moved, or none."""
    positions = torch.arange(len(sample.token_ids))
    if what is not None:
        positions[RESTING if what == "document" else sample.joints[-1] :] += by
    return positions[None]


def measure(lora: LoraModel, samples: Sequence[Sample], distances: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A record for samples as they are, and one for every part that is moved and every distance."""
    device = next(lora.model.parameters()).device
    cases = [(None, 0), *((what, by) for what in MOVED for by in distances)]
    for what, by in cases:
        counts = [count_right(lora, sample, moved(sample, what, by).to(device)) for sample in samples]
        exact, first, asked = (sum(part) for part in zip(*counts, strict=True))
        yield {"moved": what, "by": by, "exact": exact, "first": first, "asked": asked}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Distances at which an adapted model still reads, by RoPE base.")
    parser.add_argument("--model", type=path_option, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--adapter", type=path_option, metavar="DIR", help="default: the demo model's")
    parser.add_argument("--data", required=True, type=path_option, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--length", default="3K", metavar="3K", help="tokens of a sample")
    parser.add_argument("--samples", type=COUNT, default=3, metavar="N")
    parser.add_argument("--distances", default="128K,256K,512K,1M", metavar="128K,...")
    parser.add_argument("--rope-theta", metavar="4e6,...", help="RoPE bases to try (default: the adapter's)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--out", type=path_option, metavar="FILE", help="results as JSON")
    return parser.parse_args(argv)


def read_bases(text: str | None) -> list[float | None]:
    """RoPE bases of --rope-theta, or None for the adapter's own. Raises `InputError` for what is none."""
    if text is None:
        return [None]
    try:
        bases = [float(part) for part in text.split(",")]
    except ValueError:
        bases = [0.0]
    if not all(1 < base < float("inf") for base in bases):
        raise InputError(f"--rope-theta {text}: give numbers above 1, as in 4e6,6.4e7")
    return bases


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; status 0. Raises `LongrunError` on bad input."""

    arguments = parse_arguments(argv)
    choice = choose_model(arguments.model, arguments.adapter)
    if choice.adapter is None:
        raise InputError("no adapter to measure: give its folder as --adapter")
    length = parse_tokens(arguments.length, "--length")
    if length < _LEAST or arguments.samples < 1:
        raise InputError(
            f"--length {arguments.length} must be at least {_LEAST} and --samples {arguments.samples} at least 1"
        )
    distances = [parse_tokens(text, "--distances") for text in arguments.distances.split(",")]
    corpus = Corpus.read(arguments.data, "held_out")
    bases = read_bases(arguments.rope_theta)
    writer = SampleWriter(load_tokenizer(choice.model_dir), AnswerWeights(1, 1, 1, 1))
    samples = [writer.training_sample(corpus, arguments.seed, number, length) for number in range(arguments.samples)]
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, Any] = {
        "model": choice.model_dir.name, "adapter": choice.adapter.name, "length": length, "samples": len(samples),
        "seed": arguments.seed, "environment": environment(), "records": [],
    }  # fmt: skip
    for given in bases:
        lora = LoraModel.from_adapter(choice.model_dir, choice.adapter, dtype, device, given)
        lora.model.eval()
        base = lora.settings["rope_theta"]
        for record in measure(lora, samples, distances):
            results["records"].append({"rope_theta": base, **record})
            jump = f"{record['moved']} by {format_tokens(record['by'])}" if record["moved"] else "nothing moved"
            print(
                f"rope_theta {base:g}, {jump}: {record['exact']} of {record['asked']} exact, {record['first']} first "
                "tokens",
                flush=True,
            )
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
