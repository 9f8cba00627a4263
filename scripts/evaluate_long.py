"""How well a model with a long-text adapter reads: held-out facts by length and depth, perplexity, a few answers.

Texts, names and forms are those training never saw. Facts are asked with the answer begun, and count as exact where
greedy generation goes on with the value, read as text; first tokens are counted as well. Texts with 30 facts (five of
every form compete) and with five are apart. A text is read once, by longrun with full attention. Perplexity at 4K
tokens of held-out prose and the chat answers are the trained model's beside the original's, by transformers.
Example: python scripts/evaluate_long.py --adapter out/long-train/adapter --data out/long-data --lengths 8K,64K
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from long_chat import TEST_PROMPTS
from long_lora import LoraModel

import longrun
from longrun.cli import run
from longrun.errors import InputError
from longrun.long_tasks import Corpus, TaskWriter, TestDocument, TestQuestion
from longrun.model.choice import choose_model
from longrun.placement import DEFAULT_WEIGHT_FORMAT
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.report_env import environment
from longrun.units import format_tokens, parse_tokens

WINDOW = 4096
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


def perplexity(lora: LoraModel, corpus: Corpus, windows: int, original: bool) -> float:
    """Of the next token, over `windows` runs of 4,096 tokens of held-out prose, each read from its beginning."""
    model, device = lora.model.eval(), next(lora.model.parameters()).device
    rows = [
        document[start : start + WINDOW]
        for document in corpus.documents("prose")
        for start in range(0, len(document) - WINDOW, WINDOW)
    ]
    step = max(1, len(rows) // windows)
    total, count = 0.0, 0
    for row in rows[::step][:windows]:
        ids = torch.tensor(row.astype("int64"), device=device)[None]
        with torch.no_grad(), lora.as_original() if original else nullcontext():
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            for start in range(0, WINDOW - 1, 512):
                part = slice(start, min(start + 512, WINDOW - 1))
                logits = model.lm_head(states[part]).float()
                total += F.cross_entropy(logits, ids[0, part.start + 1 : part.stop + 1], reduction="sum").item()
                count += part.stop - part.start
    return float(torch.tensor(total / max(count, 1)).exp())


def chat_answers(lora: LoraModel, tokenizer: Any, count: int) -> dict[str, Any]:
    """Greedy answers to `TEST_PROMPTS` of the original and of the trained model, at most `count` tokens each.

    Returns:
        `chat`: prompt and both answers; `chat_agreement`: of the tokens of the original's answers [those that the
        trained model finds likeliest as well, all], given the tokens before them; `chat_begins_alike`: the same of
        first tokens.
    """
    chat, alike, begins = [], [0, 0], [0, 0]
    device = next(lora.model.parameters()).device
    model = lora.model.eval()
    for prompt in TEST_PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        asked, told = ids.shape[1], {}
        for name in ("original", "adapted"):
            with torch.no_grad(), lora.as_original() if name == "original" else nullcontext():
                told[name] = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
        original = told["original"]
        with torch.no_grad():
            best = model(input_ids=original[:, :-1], use_cache=False).logits[0, asked - 1 :].argmax(dim=-1)
        same = (best == original[0, asked:]).tolist()
        alike = [alike[0] + sum(same), alike[1] + len(same)]
        begins = [begins[0] + same[0], begins[1] + 1]
        answers = {
            name: tokenizer.decode(made[0, asked:], skip_special_tokens=True).strip() for name, made in told.items()
        }
        chat.append({"prompt": prompt, **answers})
    return {"chat": chat, "chat_agreement": alike, "chat_begins_alike": begins}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Held-out recall by length and depth; short-text ability.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="or none: the original model's recall alone")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--lengths", default="8K,32K,64K,128K", metavar="8K,...")
    parser.add_argument("--depths", type=int, default=5, metavar="N")
    parser.add_argument(
        "--per-depth",
        default="6,1",
        metavar="N,...",
        help="facts at every depth of a text: dense texts and sparse ones",
    )
    parser.add_argument("--trials", default="2,6", metavar="N,...", help="texts a length, for each of --per-depth")
    parser.add_argument("--kv", default="bf16", choices=["int4", "bf16", "fp32"])
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="of the perplexity; 0 leaves it out")
    parser.add_argument("--chat-tokens", type=int, default=80, metavar="N", help="0 leaves the answers out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; status 0. Raises `LongrunError` on bad input."""
    arguments = parse_arguments(argv)
    choice = choose_model(arguments.model, arguments.adapter)
    arguments.model, arguments.adapter = choice.model_dir, choice.adapter
    if choice.notice:
        print(choice.notice, flush=True)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arguments.weights = arguments.weights or DEFAULT_WEIGHT_FORMAT[device.type]
    densities = read_densities(arguments.per_depth, arguments.trials)
    corpus = Corpus.read(arguments.data, "held_out")
    lengths = [parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")]
    results: dict[str, Any] = {
        "model": arguments.model.name,
        "adapter": None if arguments.adapter is None else arguments.adapter.name,
        "settings": {
            key: getattr(arguments, key) for key in ("kv", "weights", "depths", "per_depth", "trials", "seed")
        },
        "environment": environment(),
    }
    if arguments.adapter is not None and (arguments.windows or arguments.chat_tokens):
        results |= short_texts(arguments, corpus, device)
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


def short_texts(arguments: argparse.Namespace, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Perplexity and chat answers of the original and of the adapted model; the model is gone afterwards."""
    from transformers import AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lora = LoraModel.from_adapter(arguments.model, arguments.adapter, dtype, device)
    found: dict[str, Any] = {}
    if arguments.windows:
        before, after = (perplexity(lora, corpus, arguments.windows, original) for original in (True, False))
        found["perplexity_4k"] = {"original": before, "adapted": after, "ratio": after / before}
        print(f"perplexity at 4K: original {before:.3f}, adapted {after:.3f} ({after / before - 1:+.2%})", flush=True)
    if arguments.chat_tokens:
        tokenizer = AutoTokenizer.from_pretrained(str(arguments.model), local_files_only=True)
        found |= chat_answers(lora, tokenizer, arguments.chat_tokens)
        (same, tokens), (begun, prompts) = found["chat_agreement"], found["chat_begins_alike"]
        print(f"chat: {same} of {tokens} tokens and {begun} of {prompts} first tokens as the original", flush=True)
        for one in found["chat"]:
            print(f"> {one['prompt']}\n  original: {one['original']!r}\n  adapted:  {one['adapted']!r}", flush=True)
    return found


if __name__ == "__main__":
    run(main)
