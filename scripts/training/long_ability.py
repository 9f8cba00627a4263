"""What an adapted model still does with short texts, against the original: perplexity of prose, answers in a chat."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from longrun.lab.long_tasks import Corpus
from longrun.model.tokenizer import load_tokenizer
from scripts.training.long_chat import TEST_PROMPTS
from scripts.training.long_lora import LoraModel

WINDOW = 4096


def short_texts(
    model_dir: Path, adapter: Path, corpus: Corpus, windows: int, chat_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Perplexity and chat answers of the original and of the adapted model; the model is gone afterwards.

    Args:
        windows: texts of 4,096 tokens for the perplexity; 0 leaves it out.
        chat_tokens: the most tokens of an answer; 0 leaves the answers out.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lora = LoraModel.from_adapter(model_dir, adapter, dtype, device)
    found: dict[str, Any] = {}
    if windows:
        before, after = (perplexity(lora, corpus, windows, original) for original in (True, False))
        found["perplexity_4k"] = {"original": before, "adapted": after, "ratio": after / before}
        print(f"perplexity at 4K: original {before:.3f}, adapted {after:.3f} ({after / before - 1:+.2%})", flush=True)
    if chat_tokens:
        tokenizer = load_tokenizer(model_dir)
        found |= chat_answers(lora, tokenizer, chat_tokens)
        (same, tokens), (begun, prompts) = found["chat_agreement"], found["chat_begins_alike"]
        print(f"chat: {same} of {tokens} tokens and {begun} of {prompts} first tokens as the original", flush=True)
        for one in found["chat"]:
            print(f"> {one['prompt']}\n  original: {one['original']!r}\n  adapted:  {one['adapted']!r}", flush=True)
    return found


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
