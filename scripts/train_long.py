"""Teach the demo model to read long texts: LoRA on all linears, a larger RoPE base, stages of growing length.

The loss of a step is the cross entropy of the answers, plus `text_weight` times that of the next token at random
places of the text, plus `keep_weight` times the divergence from the original model on short text and on its own chat
answers. Everything random is drawn from (seed, step), so that a run that was stopped (SIGTERM, --stop-after) goes on
as if it had not been. Writes to --out: log.jsonl, state.pt (to go on from) and adapter/ (what ships).
Example: python scripts/train_long.py --data out/long-data --out out/long-train --stop-after 540
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from long_chat import chat_prompts
from long_lora import LoraModel

from longrun.cli import run
from longrun.errors import InputError
from longrun.long_tasks import Corpus, TaskWriter
from longrun.model.checkpoint import weights_fingerprint

STOPPED = 3  # exit status: stopped before the end, the same command goes on
DEFAULT_RECIPE = Path(__file__).with_name("long_recipe.toml")
_NUMBERS = {
    "seed": 0, "rank": 32, "alpha": 32, "rope_theta": 4e6, "max_position_embeddings": 1048576, "peak_rate": 1e-3,
    "final_rate": 3e-4, "warmup_steps": 10, "clip": 1.0, "text_weight": 0.3, "text_positions": 2048,
    "keep_weight": 0.5, "keep_tokens": 2048, "keep_positions": 1024, "chat_answers": 192, "chat_tokens": 192,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Numbers of `_NUMBERS` and the stages: (length, batch, steps) each."""

    numbers: dict[str, Any]
    stages: tuple[tuple[int, int, int], ...]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a TOML file: top-level numbers and `[[stage]]` tables.

        Raises:
            InputError: unreadable, an unknown key, a number or a stage that is impossible.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"recipe {path} cannot be read ({error}): name a TOML file") from error
        stages = data.pop("stage", [])
        for key, value in data.items():
            if key not in _NUMBERS:
                raise InputError(f"{path}: key {key} is unknown: use {', '.join(_NUMBERS)} and [[stage]]")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InputError(f"{path}: {key} is {value!r}, and must be a number of at least 0")
        wanted = {"length", "batch", "steps"}
        if not stages or any(set(stage) != wanted or min(stage.values()) < 1 for stage in stages):
            raise InputError(f"{path}: every [[stage]] needs length, batch and steps of at least 1")
        return cls({**_NUMBERS, **data}, tuple((s["length"], s["batch"], s["steps"]) for s in stages))

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.stages)

    def at(self, step: int) -> tuple[int, int, int, int]:
        """(stage, length, batch, index of the step's first sample) of a step."""
        first = 0
        for number, (length, batch, steps) in enumerate(self.stages):
            if step < steps:
                return number, length, batch, first + step * batch
            step, first = step - steps, first + steps * batch
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then half a cosine from the peak to the final rate."""
        peak, final, warmup = (self.numbers[key] for key in ("peak_rate", "final_rate", "warmup_steps"))
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class Batch:
    """Samples side by side, filled up at the end: int64 [batch, T] ids; bool [batch, T] answers and text.

    A position is marked where its own token is learned; it is predicted from the one before it.
    """

    token_ids: Tensor
    answers: Tensor
    text: Tensor
    forms: tuple[str, ...]


def make_batch(writer: TaskWriter, corpus: Corpus, recipe: Recipe, step: int, pad_id: int) -> Batch:
    _, length, batch, first = recipe.at(step)
    samples = [
        writer.training_sample(corpus, recipe.numbers["seed"], first + number, length) for number in range(batch)
    ]
    longest = max(len(sample.token_ids) for sample in samples)
    ids = torch.full((batch, longest), pad_id, dtype=torch.int64)
    answers, text = torch.zeros(batch, longest, dtype=torch.bool), torch.zeros(batch, longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.token_ids)
        ids[row, :count] = torch.tensor(sample.token_ids)
        answers[row, :count] = torch.tensor(sample.answer_mask, dtype=torch.bool)
        text[row, 1:count] = ~answers[row, 1:count]
    return Batch(ids, answers, text, tuple(form for sample in samples for form in sample.forms))


class Trainer:
    """One run: model, optimizer, data, and everything that is written."""

    def __init__(
        self, model_dir: Path, data: Path, out: Path, recipe: Recipe, device: torch.device, dtype: torch.dtype,
        start_from: Path | None = None,
    ) -> None:  # fmt: skip
        from transformers import AutoTokenizer

        self.out, self.recipe, self.device = out, recipe, device
        numbers = recipe.numbers
        self.identity = {
            "recipe": json.loads(json.dumps([numbers, recipe.stages])),
            "base_weights": weights_fingerprint(model_dir),
            "data": hashlib.sha256((data / "train.tokens.xz").read_bytes()).hexdigest(),
            "start_from": None if start_from is None else start_from.name,
        }
        settings = {
            "r": numbers["rank"], "lora_alpha": numbers["alpha"], "rope_theta": float(numbers["rope_theta"]),
            "max_position_embeddings": numbers["max_position_embeddings"], "seed": numbers["seed"],
            "base_weights": self.identity["base_weights"],
        }  # fmt: skip
        self.lora = LoraModel(model_dir, settings, dtype, device)
        if start_from is not None:
            self.lora.load_adapter(start_from)
        self.tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        self.writer = TaskWriter(self.tokenizer)
        self.corpus = Corpus.read(data, "train")
        pad = self.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else pad
        self.optimizer = torch.optim.AdamW(self.lora.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0
        self.chats: list[list[int]] = []
        out.mkdir(parents=True, exist_ok=True)
        if not self._resume():
            self.chats = self._own_answers()

    # What is written

    def _resume(self) -> bool:
        """Go on from state.pt where there is one. Raises `InputError` where it was run with other settings."""
        file = self.out / "state.pt"
        if not file.exists():
            return False
        state = torch.load(file, map_location="cpu", weights_only=True)
        for key, value in self.identity.items():
            if state["identity"][key] != value:
                raise InputError(f"{file} was written with another {key}: give the same, or another --out")
        self.lora.load_state(state["lora"], str(file))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.chats = state["step"], state["chats"]
        return True

    def save(self) -> None:
        """state.pt (complete or as it was) and the adapter."""
        state = {
            "identity": self.identity, "step": self.step, "chats": self.chats,
            "lora": {name: t.detach().cpu() for name, t in self.lora.state().items()},
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        partial = self.out / ".state.pt"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")
        size = self.lora.save_adapter(self.out / "adapter", f"train_long.py, {self.step} of {self.recipe.steps} steps")
        self.log({"event": "saved", "step": self.step, "adapter_bytes": size})

    def log(self, entry: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    # What is computed

    def train(self, stop_after: float, save_every: int, most_steps: int | None = None) -> bool:
        """Run steps until the recipe ends (True), or until time, a signal or `most_steps` stops it; then save."""
        started, stop = time.monotonic(), []
        earlier = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        model = self.lora.model
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.log({"event": "started", "step": self.step, "of": self.recipe.steps, "identity": self.identity,
                  "torch": torch.__version__, "device": self._device_name()})  # fmt: skip
        first, slowest = self.step, 0.0
        try:
            with ThreadPoolExecutor(max_workers=1) as pool:
                coming = pool.submit(self._batch, self.step)
                while self.step < self.recipe.steps:
                    now = time.monotonic()
                    if stop or now - started + slowest > stop_after or self.step - first == most_steps:
                        break
                    batch = coming.result()
                    coming = pool.submit(self._batch, self.step + 1)
                    self._step(batch, started)
                    # Steps of the next stage are longer: a stage's first may take several times the last one's.
                    slowest = (time.monotonic() - now) * (4 if self._stage_ends() else 1.5)
                    if self.step % save_every == 0:
                        self.save()
        finally:
            signal.signal(signal.SIGTERM, earlier)
        self.save()
        finished = self.step == self.recipe.steps
        self.log({"event": "finished" if finished else "stopped", "step": self.step,
                  "seconds": round(time.monotonic() - started, 1)})  # fmt: skip
        return finished

    def _stage_ends(self) -> bool:
        return self.step < self.recipe.steps and self.recipe.at(self.step)[0] != self.recipe.at(self.step - 1)[0]

    def _batch(self, step: int) -> Batch | None:
        if step >= self.recipe.steps:
            return None
        return make_batch(self.writer, self.corpus, self.recipe, step, self.pad_id)

    def _step(self, batch: Batch, started: float) -> None:
        began = time.monotonic()
        numbers = self.recipe.numbers
        rate = self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._losses(batch)
        loss = losses["answer"] + numbers["text_weight"] * losses["text"]
        loss.backward()
        if numbers["keep_weight"]:
            losses["keep"] = self._keep_loss()
            (numbers["keep_weight"] * losses["keep"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.lora.parameters(), numbers["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        entry = {name: round(value.item(), 5) for name, value in losses.items()}
        stage, length, _, _ = self.recipe.at(self.step)
        self.step += 1
        seconds = time.monotonic() - began
        self.log({
            "step": self.step, "stage": stage, "length": length, **entry, "rate": round(rate, 7),
            "gradient": round(norm.item(), 4), "seconds": round(seconds, 3),
            "tokens_per_s": round(batch.token_ids.numel() / seconds), "elapsed": round(time.monotonic() - started, 1),
            **self._memory(),
        })  # fmt: skip
        if not math.isfinite(entry["answer"]) or not math.isfinite(norm.item()):
            raise InputError(f"the loss of step {self.step} is not finite: lower peak_rate")

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross entropy of the answers, and of `text_positions` places of the text; logits only of these."""
        ids = batch.token_ids.to(self.device)
        hidden = self.lora.model.model(input_ids=ids, use_cache=False).last_hidden_state
        generator = random.Random(f"text positions/{self.recipe.numbers['seed']}/{self.step}")
        text = batch.text.flatten().nonzero().flatten()
        count = min(len(text), self.recipe.numbers["text_positions"])
        chosen = text[sorted(generator.sample(range(len(text)), count))]
        answers = batch.answers.flatten().nonzero().flatten()
        found = {}
        for name, places in (("answer", answers), ("text", chosen)):
            # Place p is predicted from the hidden state before it; no sample begins with a learned token.
            states = hidden.flatten(0, 1)[(places - 1).to(self.device)]
            logits = self.lora.model.lm_head(states).float()
            found[name] = F.cross_entropy(logits, ids.flatten()[places.to(self.device)])
        return found

    def _keep_loss(self) -> Tensor:
        """Divergence (nats a token) of the model from the original, on a short text or the original's own answers."""
        numbers = self.recipe.numbers
        rng = random.Random(f"keep/{numbers['seed']}/{self.step}")
        length = numbers["keep_tokens"]
        if self.chats and self.step % 2:
            ids: list[int] = []
            while len(ids) < length:
                ids += rng.choice(self.chats)
            ids = ids[:length]
        else:
            ids = self.corpus.stretch(rng, length)
        places = torch.tensor(sorted(rng.sample(range(length), min(length, numbers["keep_positions"]))))
        row, places = torch.tensor([ids], device=self.device), places.to(self.device)
        model = self.lora.model
        with torch.no_grad(), self.lora.as_original():
            states = model.model(input_ids=row, use_cache=False).last_hidden_state[0, places]
            wanted = F.log_softmax(model.lm_head(states).float(), dim=-1)
        states = model.model(input_ids=row, use_cache=False).last_hidden_state[0, places]
        got = F.log_softmax(model.lm_head(states).float(), dim=-1)
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean")

    def _own_answers(self) -> list[list[int]]:
        """What the original model answers to short questions, drawn at temperature 1: chats as token ids."""
        numbers = self.recipe.numbers
        prompts = chat_prompts(numbers["chat_answers"])
        if not prompts:
            return []
        chats = []
        torch.manual_seed(numbers["seed"])
        self.lora.model.eval()
        for start in range(0, len(prompts), 64):
            rows = [
                self.writer.encode(self.writer.head + text + self.writer.ask) for text in prompts[start : start + 64]
            ]
            answers = self.generate(rows, numbers["chat_tokens"], sample=True, original=True)
            chats += [row + answer for row, answer in zip(rows, answers, strict=True)]
        return chats

    def generate(self, rows: list[list[int]], count: int, sample: bool, original: bool) -> list[list[int]]:
        """At most `count` new ids a row, up to and with the end token; of the original or of the trained model."""
        from contextlib import nullcontext

        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        end = self.tokenizer.eos_token_id
        with torch.no_grad(), self.lora.as_original() if original else nullcontext():
            made = self.lora.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=sample, top_k=0, temperature=1.0,
                pad_token_id=self.pad_id, eos_token_id=end, use_cache=True,
            ) if sample else self.lora.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False,
                pad_token_id=self.pad_id, eos_token_id=end, use_cache=True,
            )  # fmt: skip
        answers = made[:, longest:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in answers]

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"peak_gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA training on long texts; see the recipe file.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="an adapter to train on, with a fresh optimizer")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="stop in time and save")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the frozen weights (default: bf16 on cuda)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; status 0 when the recipe is done, 3 when it was stopped before. Raises `LongrunError` on bad input."""
    arguments = parse_arguments(argv)
    started = time.monotonic()
    if arguments.model is None:
        from longrun.model.demo import demo_model_dir

        arguments.model = demo_model_dir()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[arguments.dtype]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    recipe = Recipe.read(arguments.recipe)
    trainer = Trainer(arguments.model, arguments.data, arguments.out, recipe, device, dtype, arguments.start_from)
    spent = time.monotonic() - started
    return 0 if trainer.train(arguments.stop_after - spent, arguments.save_every) else STOPPED


if __name__ == "__main__":
    run(main)
