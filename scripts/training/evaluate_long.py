"""How well a model with a long-text adapter reads: held-out facts by length and depth, perplexity, a few answers.

Texts, names and forms are those training never saw. Facts are asked with the answer begun, and count as exact where
greedy generation continues with the value, read as text; first tokens are counted as well. Texts with 30 facts (five of
every form compete) and with five are apart. A text is read once, by longrun with full attention. Perplexity at 4K
tokens of held-out prose and the chat answers are the trained model's and the original's, by transformers.
Example: python scripts/training/evaluate_long.py --adapter out/long-train/adapter --data out/long-data --lengths 8K,64K
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import longrun
from longrun.arguments import COUNT, SEED, whole
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.hub.find import add_model_option
from longrun.hub.names import model_name
from longrun.lab.long_tasks import Corpus, TaskWriter, TestDocument, TestQuestion
from longrun.lab.report_env import environment
from longrun.model.choice import choose_model
from longrun.paths import path_option
from longrun.plan.placement import DEFAULT_WEIGHT_FORMAT
from longrun.quant.kv_format import KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.units import format_tokens, parse_tokens
from scripts.training.long_ability import short_texts

SPARE = 96  # tokens of a question and its answer beyond the document
MORE = 4  # tokens that an answer may have beyond the tokenizer's own


def recall(
    runtime: longrun.Runtime, corpus: Corpus, lengths: Sequence[int], depths: int, densities: Sequence[tuple[int, int]],
    seed: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One record a length and density, as soon as it is done: counts of exact values and what was wrong.

    Args:
        densities: (facts at every depth of a text, texts) each.

    Yields:
        `exact`, `first` and `canonical`: [right, asked] in all, by depth and by form, of values that greedy generation
        gives; of values whose first token that is not a space is the likeliest one (and a space before it); and of
        values given in the tokenizer's own tokens. A code that stands in quotes may come back in other tokens.
    """
    writer = TaskWriter(runtime.tokenizer)
    places = [number / (depths - 1) for number in range(depths)] if depths > 1 else [0.5]
    for length in lengths:
        for per_depth, trials in densities:
            started = time.perf_counter()
            names = ("exact", "first", "canonical")
            counts: dict[str, dict[str, list[int]]] = {name: defaultdict(lambda: [0, 0]) for name in names}
            wrong = []
            for trial in range(trials):
                first_form = trial if per_depth == 1 else 0  # a depth would be one form in all texts
                document = writer.test_document(
                    corpus, f"{seed}/{trial}", length, places, per_depth, first_form=first_form
                )
                for question, told in answer(runtime, document, length):
                    for key in ("all", f"depth {question.depth:g}", f"form {question.form}"):
                        for name in names:
                            counts[name][key][0] += getattr(told, name)
                            counts[name][key][1] += 1
                    if not told.exact:
                        wrong.append([question.form, question.depth, question.value, told.text])
                print(f"  text {trial + 1} of {trials}, {time.perf_counter() - started:.1f} s", flush=True)
            seconds = round(time.perf_counter() - started, 1)
            yield {
                "length": length, "facts": per_depth * depths, "texts": trials,
                **{name: dict(found) for name, found in counts.items()}, "wrong": wrong[:20], "seconds": seconds,
            }  # fmt: skip


@dataclass(frozen=True)
class Told:
    """An answer: what greedy generation says, whether it is the value, and whether in the tokenizer's own tokens; and
    whether the first token of these is the likeliest one."""

    text: str
    exact: bool
    first: bool
    canonical: bool


def answer(runtime: longrun.Runtime, document: TestDocument, length: int) -> Iterator[tuple[TestQuestion, Told]]:
    """Each question with its answer; the document is read once.

    The value is read after the question, and each token compared with the choice that those before it give: where all
    are right, greedy generation says the value. Elsewhere it is asked, since other tokens may spell the same.
    """
    session, tokenizer = runtime.new_session(length + SPARE), runtime.tokenizer
    session.prefill(document.token_ids)
    end = session.mark()
    for question in document.questions:
        value = question.value_ids
        session.rewind(end)
        session.prefill(question.token_ids)
        chosen = session.score((*value, value[-1])).argmax(dim=-1).tolist()  # the last: what follows the value
        same = [a == b for a, b in zip(chosen, value, strict=False)]
        if not all(same):
            session.rewind(end)
            session.prefill(question.token_ids)
            chosen = list(session.generate(len(value) + MORE))
        text = tokenizer.decode(chosen)
        begun = first_token(tokenizer, value) + 1
        yield question, Told(text, says(text, question.value), all(same[:begun]), all(same))
    del session
    gc.collect()


def says(text: str, value: str) -> bool:
    """Whether generated text begins with the value, which no letter or digit continues."""
    text = text.strip()
    return text.startswith(value) and not text[len(value) : len(value) + 1].isalnum()


def first_token(tokenizer: Any, value_ids: Sequence[int]) -> int:
    """The place of the first token of a value that is not a space."""
    return next(number for number, token in enumerate(value_ids) if tokenizer.decode([token]).strip())


def show(record: dict[str, Any]) -> None:
    """A line of what was found right, and one by depth and form."""
    (exact, asked), (found, _), (own, _) = (record[name]["all"] for name in ("exact", "first", "canonical"))
    parts = ", ".join(f"{key} {right}/{count}" for key, (right, count) in record["exact"].items() if key != "all")
    print(
        f"{format_tokens(record['length'])}, {record['facts']} facts a text: {exact}/{asked} exact, "
        f"{found}/{asked} first tokens, {own}/{asked} in the tokenizer's own tokens, {record['seconds']} s\n  {parts}",
        flush=True,
    )


def read_densities(per_depth: str, trials: str) -> list[tuple[int, int]]:
    """(facts at every depth, texts) from the lists of --per-depth and --trials. Raises `InputError` on bad lists."""
    try:
        facts, texts = ([int(part) for part in text.split(",")] for text in (per_depth, trials))
    except ValueError:
        raise InputError(f"--per-depth {per_depth} and --trials {trials}: give whole numbers, as in 6,1") from None
    if len(facts) != len(texts) or min(facts + texts) < 1:
        raise InputError(
            f"--per-depth {per_depth} has {len(facts)} and --trials {trials} has {len(texts)} numbers: give as many of "
            "both, each of at least 1"
        )
    return list(zip(facts, texts, strict=True))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Held-out recall by length and depth; short-text ability.")
    add_model_option(parser)
    parser.add_argument("--adapter", type=path_option, metavar="DIR", help="or none: the original model's recall alone")
    parser.add_argument("--data", required=True, type=path_option, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--lengths", default="8K,32K,64K,128K", metavar="8K,...")
    parser.add_argument("--depths", type=COUNT, default=5, metavar="N")
    parser.add_argument(
        "--per-depth",
        default="6,1",
        metavar="N,...",
        help="facts at every depth of a text: dense texts and sparse ones",
    )
    parser.add_argument("--trials", default="2,6", metavar="N,...", help="texts a length, for each of --per-depth")
    parser.add_argument("--kv", default="bf16", choices=KV_FORMATS)
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--windows", type=whole(), default=32, metavar="N", help="of the perplexity; 0 leaves it out")
    parser.add_argument("--chat-tokens", type=whole(), default=80, metavar="N", help="0 leaves the answers out")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--out", type=path_option, metavar="FILE", help="results as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; status 0. Raises `LongrunError` on bad input."""
    arguments = parse_arguments(argv)
    choice = choose_model(arguments.model, arguments.adapter, arguments.download)
    arguments.model, arguments.adapter = choice.model_dir, choice.adapter
    if choice.notice:
        print(choice.notice, flush=True)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arguments.weights = arguments.weights or DEFAULT_WEIGHT_FORMAT[device.type]
    densities = read_densities(arguments.per_depth, arguments.trials)
    corpus = Corpus.read(arguments.data, "held_out")
    lengths = [parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")]
    results: dict[str, Any] = {
        "model": model_name(arguments.model),
        "adapter": None if arguments.adapter is None else arguments.adapter.name,
        "settings": {
            key: getattr(arguments, key) for key in ("kv", "weights", "depths", "per_depth", "trials", "seed")
        },
        "environment": environment(),
    }
    if arguments.adapter is not None and (arguments.windows or arguments.chat_tokens):
        results |= short_texts(
            arguments.model, arguments.adapter, corpus, arguments.windows, arguments.chat_tokens, device
        )
    if device.type == "cuda":
        # cuDNN plans for tenths of a second for every pair of lengths it has not seen: every question is one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    runtime = longrun.load(
        arguments.model, adapter=arguments.adapter, kv_format=arguments.kv, weight_format=arguments.weights,
        budget=arguments.budget, device=device.type, ctx=max(lengths) + SPARE,
    )  # fmt: skip
    results["recall"] = []
    for record in recall(runtime, corpus, lengths, arguments.depths, densities, arguments.seed):
        show(record)
        results["recall"].append(record)
        if arguments.out is not None:  # after every length: the longest may not be reached
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
