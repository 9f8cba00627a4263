"""How well a model with a long-text adapter reads: held-out facts by length and depth, perplexity, a few answers.

Texts, names and forms are those training never saw. Facts are asked with the answer begun, and count only where every
token of the value is the likeliest one; the text of a trial is read once, by longrun with full attention. Perplexity
at 4K tokens of held-out prose and the chat answers are the trained model's beside the original's, by transformers.
Example: python scripts/evaluate_long.py --adapter out/long-train/adapter --data out/long-data --lengths 8K,64K
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from long_chat import TEST_PROMPTS
from long_lora import LoraModel

import longrun
from longrun.cli import run
from longrun.long_tasks import Corpus, TaskWriter
from longrun.model.adapter import CONFIG_FILE
from longrun.model.choice import choose_model
from longrun.placement import DEFAULT_WEIGHT_FORMAT
from longrun.units import format_tokens, parse_tokens

WINDOW = 4096
SPARE = 96  # tokens of a question and its answer beyond the document


def recall(runtime: longrun.Runtime, corpus: Corpus, lengths: Sequence[int], depths: int, per_depth: int, trials: int,
           seed: int) -> list[dict[str, Any]]:  # fmt: skip
    """One record a length: counts of exact values in all, by depth and by form, and what was wrong."""
    writer = TaskWriter(runtime.tokenizer)
    places = [number / (depths - 1) for number in range(depths)] if depths > 1 else [0.5]
    records = []
    for length in lengths:
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        wrong = []
        started = time.perf_counter()
        for trial in range(trials):
            document = writer.test_document(corpus, f"{seed}/{trial}", length, places, per_depth)
            session = runtime.new_session(length + SPARE)
            session.prefill(document.token_ids)
            end = session.mark()
            for question in document.questions:
                session.rewind(end)
                session.prefill(question.token_ids)
                told = session.score(question.value_ids).argmax(dim=-1).tolist()
                exact = told == list(question.value_ids)
                for key in ("all", f"depth {question.depth:g}", f"form {question.form}"):
                    right[key][0] += exact
                    right[key][1] += 1
                if not exact:
                    wrong.append([question.form, question.depth, question.value, runtime.tokenizer.decode(told)])
            del session
            gc.collect()
        seconds = round(time.perf_counter() - started, 1)
        records.append({"length": length, "exact": dict(right), "wrong": wrong[:20], "seconds": seconds})
        print(f"{format_tokens(length)}: " + ", ".join(f"{k} {a}/{b}" for k, (a, b) in right.items()), flush=True)
    return records


def perplexity(lora: LoraModel, corpus: Corpus, windows: int, original: bool) -> float:
    """Of the next token, over `windows` runs of 4,096 tokens of held-out prose, each read from its beginning."""
    from contextlib import nullcontext

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


def chat_answers(lora: LoraModel, tokenizer: Any, count: int, original: bool) -> list[str]:
    """Greedy answers to `TEST_PROMPTS`."""
    from contextlib import nullcontext

    answers = []
    device = next(lora.model.parameters()).device
    for prompt in TEST_PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        with torch.no_grad(), lora.as_original() if original else nullcontext():
            made = lora.model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Held-out recall by length and depth; short-text ability.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="or none: the original model's recall alone")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--lengths", default="8K,32K,64K,128K", metavar="8K,...")
    parser.add_argument("--depths", type=int, default=5, metavar="N")
    parser.add_argument("--per-depth", type=int, default=6, metavar="N", help="facts at every depth of a text")
    parser.add_argument("--trials", type=int, default=2, metavar="N", help="texts a length")
    parser.add_argument("--kv", default="bf16", choices=["int4", "bf16", "fp32"])
    parser.add_argument(
        "--weights", choices=["fp32", "bf16", "int8", "nf4"], help="default: fp32 on a CPU, bf16 on a GPU"
    )
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
    corpus = Corpus.read(arguments.data, "held_out")
    lengths = [parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")]
    results: dict[str, Any] = {
        "model": arguments.model.name,
        "adapter": None if arguments.adapter is None else arguments.adapter.name,
        "settings": {
            key: getattr(arguments, key) for key in ("kv", "weights", "depths", "per_depth", "trials", "seed")
        },
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
    results["recall"] = recall(
        runtime, corpus, lengths, arguments.depths, arguments.per_depth, arguments.trials, arguments.seed
    )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def short_texts(arguments: argparse.Namespace, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Perplexity and chat answers of the original and of the adapted model; the model is gone afterwards."""
    from transformers import AutoTokenizer

    config = json.loads((arguments.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    settings = {"r": config["r"], "lora_alpha": config["lora_alpha"], **config["longrun"]}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lora = LoraModel(arguments.model, settings, dtype, device)
    lora.load_adapter(arguments.adapter)
    found: dict[str, Any] = {}
    if arguments.windows:
        before, after = (perplexity(lora, corpus, arguments.windows, original) for original in (True, False))
        found["perplexity_4k"] = {"original": before, "adapted": after, "ratio": after / before}
        print(f"perplexity at 4K: original {before:.3f}, adapted {after:.3f} ({after / before - 1:+.2%})", flush=True)
    if arguments.chat_tokens:
        tokenizer = AutoTokenizer.from_pretrained(str(arguments.model), local_files_only=True)
        before, after = (chat_answers(lora, tokenizer, arguments.chat_tokens, original) for original in (True, False))
        found["chat"] = [
            {"prompt": p, "original": a, "adapted": b} for p, a, b in zip(TEST_PROMPTS, before, after, strict=True)
        ]
        for one in found["chat"]:
            print(f"> {one['prompt']}\n  original: {one['original']!r}\n  adapted:  {one['adapted']!r}", flush=True)
    return found


if __name__ == "__main__":
    run(main)
