"""Teach the demo model to read long texts: LoRA on all linears, a larger RoPE base, stages of growing length.

The loss of a step is the weighted cross entropy of the answers, plus `text_weight` times that of the next token at
random places of the text, plus `keep_weight` times the divergence from the original model on short text and on its own
chat answers. What to watch in the log is `exact`: the share of the values asked of which every token was the likeliest
one, given those before it; `first` is that of their first tokens alone, where a fact has to be found, `first_answers`
and `stretched` are `exact` of the first answers alone and of samples with stretched positions. Everything random is
drawn from the seed and the number of the step, sample or chat, so that a run that was stopped (SIGTERM, --stop-after)
continues as if it had not been, and torchrun's processes, each with its share of every step, take the steps that one
process would take. Writes to --out: log.jsonl, state.pt (to resume from) and adapter/ (what ships).
Example: python scripts/training/train_long.py --data out/long-data --out out/long-train --stop-after 540
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import COUNT, real
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.files.whole_file import write_whole
from longrun.hub.find import add_model_option
from longrun.lab.long_tasks import Corpus
from longrun.model.choice import NO_ADAPTER, choose_model
from longrun.model.fingerprint import weights_fingerprint
from longrun.model.tokenizer import load_tokenizer
from longrun.paths import path_option
from scripts.training import long_recompute
from scripts.training.long_attention import KERNELS, Attention
from scripts.training.long_batches import Batch, BatchMaker, make_share
from scripts.training.long_keep import Chat, Keeper, own_answers
from scripts.training.long_lora import LoraModel
from scripts.training.long_ranks import Ranks, world_size
from scripts.training.long_recipe import DEFAULT_RECIPE, Recipe
from scripts.training.long_samples import AnswerWeights, SampleWriter

STOPPED = 3  # exit status: stopped before the end, the same command goes on


class Trainer:
    """One run: model, optimizer, data, and everything that is written; one of them in each process of `ranks`."""

    def __init__(
        self, model_dir: Path, data: Path, out: Path, recipe: Recipe, ranks: Ranks, dtype: torch.dtype,
        start_from: Path | None = None, attention: str = "flash",
    ) -> None:  # fmt: skip
        """Load the model, and resume from what `out` holds. Only the first process writes there.

        Raises:
            InputError: a batch that the processes cannot share, or `out` is of a run with other settings.
        """

        recipe.check_world(ranks.world)
        self.out, self.recipe, self.ranks, self.device = out, recipe, ranks, ranks.device
        self.attention = Attention(attention, ranks, dtype)
        self.corpus = Corpus.read(data, "train")
        numbers = recipe.numbers
        self.identity = {
            "recipe": recipe.identity(),
            "base_weights": weights_fingerprint(model_dir),
            "data": hashlib.sha256((data / "train.tokens.xz").read_bytes()).hexdigest(),
            "start_from": None if start_from is None else start_from.name,
        }
        self.tokenizer = load_tokenizer(model_dir)
        weights = AnswerWeights(*(numbers[f"{key}_weight"] for key in ("first", "rest", "around", "first_turn")))
        self.writer = SampleWriter(self.tokenizer, weights)
        pad = self.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else pad
        self.share = partial(make_share, self.writer, self.corpus, recipe, self.pad_id, ranks.rank, ranks.world)
        self._maker = BatchMaker(self.share)
        settings = {
            "r": numbers["rank"], "lora_alpha": numbers["alpha"], "rope_theta": float(numbers["rope_theta"]),
            "max_position_embeddings": numbers["max_position_embeddings"], "seed": numbers["seed"],
            "base_weights": self.identity["base_weights"],
        }  # fmt: skip
        self.lora = LoraModel(model_dir, settings, dtype, self.device)
        # The recipe's RoPE base may be larger than the adapter's, which is how it comes to read longer texts.
        self.start_base = None if start_from is None else self.lora.load_adapter(start_from)
        self.optimizer = torch.optim.AdamW(self.lora.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0
        self.chats: list[Chat] = []
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        if not self._resume():
            self.chats = own_answers(self.lora, self.tokenizer, self.writer, ranks, numbers)
        self.keeper = Keeper(self.lora, self.corpus, self.chats, numbers, self.pad_id, self._hidden)
        per_token = long_recompute.activation_bytes(self.lora.model.config, numbers["rank"], dtype.itemsize)
        self._kept_tokens = long_recompute.most_kept_tokens(self.device, per_token)

    # What is written

    def _resume(self) -> bool:
        """Resume from state.pt where there is one. Raises `InputError` where it was run with other settings."""
        file = self.out / "state.pt"
        if not file.exists():
            return False
        state = torch.load(file, map_location="cpu", weights_only=True)
        for key, value in self.identity.items():
            earlier = state["identity"][key]
            if key == "recipe" and not self.recipe.goes_on_from(earlier, state["step"]):
                raise InputError(
                    f"{file} was written with another recipe, and stands at step {state['step']}: give the same up to "
                    "there, or another --out"
                )
            if key != "recipe" and earlier != value:
                raise InputError(f"{file} was written with another {key}: give the same, or another --out")
        self.lora.load_state(state["lora"], str(file))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.chats = state["step"], state["chats"]
        return True

    def save(self) -> None:
        """state.pt (complete or as it was) and the adapter; every process returns when both are written."""
        if self.ranks.rank == 0:
            state = {
                "identity": self.identity, "step": self.step, "chats": self.chats,
                "lora": {name: t.detach().cpu() for name, t in self.lora.state().items()},
                "optimizer": self.optimizer.state_dict(),
            }  # fmt: skip
            write_whole(self.out / "state.pt", lambda file: torch.save(state, file))
            notes = f"train_long.py, {self.step} of {self.recipe.steps} steps"
            size = self.lora.save_adapter(self.out / "adapter", notes)
            self.log({"event": "saved", "step": self.step, "adapter_bytes": size})
        self.ranks.wait()

    def log(self, entry: dict[str, Any]) -> None:
        """A line of log.jsonl, printed as well; only of the first process."""
        if self.ranks.rank:
            return
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    # What is computed

    def train(self, stop_after: float, save_every: int, most_steps: int | None = None) -> bool:
        """Run steps until the recipe ends (True), or until time, a signal or `most_steps` stops it; then save. Once.

        A signal to one process, or time that is up for one, stops all of them before the same step.
        """
        started, stop = time.monotonic(), []
        earlier = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        model = self.lora.model
        model.train()
        long_recompute.enable(model)
        self.log({
            "event": "started", "step": self.step, "of": self.recipe.steps, "identity": self.identity,
            "torch": torch.__version__, "device": self._device_name(), "processes": self.ranks.world,
            "kept_tokens": self._kept_tokens, "start_from_rope_theta": self.start_base,
        })  # fmt: skip
        first, slowest = self.step, 0.0
        try:
            while self.step < self.recipe.steps and self.step - first != most_steps:
                now = time.monotonic()
                if self.ranks.any(bool(stop) or now - started + slowest > stop_after):
                    break
                batches = self._maker.take(self.step, order_next=self.step + 1 < self.recipe.steps)
                measured = self.attention.choose(self.lora.model.config, *batches[0].token_ids.shape)
                if measured is not None:
                    self.log(measured)
                with self.attention.using():
                    self._step(batches, started)
                # Steps of the next stage are longer: a stage's first may take several times the last one's.
                ends = self.recipe.ends_stage(self.step)
                slowest = (time.monotonic() - now) * (4 if ends else 1.5)
                if ends or self.step % save_every == 0:
                    self.save()
            finished = self.step == self.recipe.steps
            self.save()
            self.log({"event": "finished" if finished else "stopped", "step": self.step,
                      "seconds": round(time.monotonic() - started, 1)})  # fmt: skip
            self.ranks.wait()
        finally:
            signal.signal(signal.SIGTERM, earlier)
            self._maker.close()
        return finished

    def _step(self, batches: list[Batch], started: float) -> None:
        """One step of the optimizer with the gradient of all processes' batches."""
        began = time.monotonic()
        numbers = self.recipe.numbers
        rate = self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        found = self._counts(batches)
        counts = torch.where(found > 0, found, 1.0)
        sums = torch.zeros(
            7, device=self.device
        )  # answers, text, to keep, and shares of values as `_losses` counts them
        for batch in batches:
            losses, right = self._losses(batch)
            losses = losses / counts[:2]
            (losses[0] + numbers["text_weight"] * losses[1]).backward()
            sums[:2] += losses.detach()
            sums[3:] += right / counts[[2, 2, 3, 4]]
        if numbers["keep_weight"]:
            own = range(self.ranks.rank, numbers["keep_batch"], self.ranks.world)
            for keep in self.keeper.losses(self.step, own):
                (numbers["keep_weight"] * keep / numbers["keep_batch"]).backward()
                sums[2] += keep.detach() / numbers["keep_batch"]
        sums = self._add_up(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.lora.parameters(), numbers["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        answer, text, keep_loss, first, *exact, gradient = torch.cat([sums, norm[None]]).tolist()
        *asked, tokens = found[2:].tolist()
        shares = zip(("exact", "first_answers", "stretched"), exact, asked, strict=True)
        groups = {name: round(share, 4) for name, share, count in shares if count}
        stage, number, _ = self.recipe.at(self.step)
        self.step += 1
        seconds = time.monotonic() - began
        self.log({
            "step": self.step, "stage": number, "length": stage.length, "answer": round(answer, 5),
            "text": round(text, 5), **({"keep": round(keep_loss, 5)} if numbers["keep_weight"] else {}),
            "first": round(first, 4), **groups, "values": round(asked[0]), "rate": round(rate, 7),
            "gradient": round(gradient, 4), "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds),
            "elapsed": round(time.monotonic() - started, 1), **self._memory(),
        })  # fmt: skip
        if not math.isfinite(answer) or not math.isfinite(gradient):
            raise InputError(f"the loss of step {self.step} is not finite: lower the rate of its stage")

    def _counts(self, batches: list[Batch]) -> Tensor:
        """float32 [6] of all processes: weight of answers and places of text that are learned; values asked, those that
        are first answers, those of stretched samples; tokens read."""
        own = [(b.weights.sum(), b.text.sum(), len(b.values), *b.groups.sum(axis=0), b.token_ids.size) for b in batches]
        return self.ranks.sum(torch.tensor([float(sum(part)) for part in zip(*own, strict=True)], device=self.device))

    def _add_up(self, sums: Tensor) -> Tensor:
        """Make every gradient the sum over the processes, in one exchange; returns that of `sums`, float32 [n]."""
        if self.ranks.world == 1:
            return sums
        gradients = [parameter.grad for parameter in self.lora.parameters()]
        everything = self.ranks.sum(torch.cat([*(gradient.flatten() for gradient in gradients), sums]))
        parts = everything.split([*(gradient.numel() for gradient in gradients), len(sums)])
        for gradient, part in zip(gradients, parts[:-1], strict=True):
            gradient.copy_(part.view_as(gradient))
        return parts[-1]

    def _hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states [batch, T, hidden] of ids [batch, T] that are filled up at the end, if at all.

        No mask is given, and none is made of it: attention is causal, and nothing attends to what comes after it.
        """
        model = self.lora.model
        long_recompute.recompute(model, ids.numel() > self._kept_tokens)
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits only of what is learned.

        Returns:
            Sums of the weighted cross entropy of the answers and of that of the drawn text, float32 [2]; and float32
            [4]: how many values' first tokens were the likeliest ones, how many values all of whose tokens were, of
            these the first answers of their samples, and those of stretched samples.
        """
        ids = torch.from_numpy(batch.token_ids).to(self.device)
        positions = None if batch.positions is None else torch.from_numpy(batch.positions).to(self.device)
        with self.lora.at_positions(positions):
            hidden = self._hidden(ids).flatten(0, 1)
        weights = torch.from_numpy(batch.weights.ravel())
        places = weights.nonzero()[:, 0]
        each, right = self._cross_entropy(hidden, ids, places.to(self.device))
        answers = (each * weights[places].to(self.device)).sum()
        text, _ = self._cross_entropy(hidden, ids, torch.from_numpy(batch.text.ravel()).nonzero()[:, 0].to(self.device))
        wrong_before = torch.zeros(len(weights) + 1, device=self.device)
        wrong_before[places.to(self.device) + 1] = (~right).float()
        wrong_before = wrong_before.cumsum(dim=0)
        start, first, stop = torch.from_numpy(batch.values).to(self.device).unbind(dim=1)
        found = wrong_before[first + 1] == wrong_before[start]
        exact = wrong_before[stop] == wrong_before[start]
        groups = torch.from_numpy(batch.groups).to(self.device)
        right = torch.cat([found.sum()[None], exact.sum()[None], (exact[:, None] & groups).sum(dim=0)])
        return torch.stack([answers, text.sum()]), right.float()

    def _cross_entropy(self, hidden: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of each place (predicted from the hidden state before it; no sample begins with a learned token), float32
        [places], and whether its token was the likeliest one."""
        wanted = ids.flatten()[places]
        logits = self.lora.model.lm_head(hidden[places - 1]).float()
        return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=-1) == wanted

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"peak_gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="LoRA training on long texts; see the recipe file.")
    add_model_option(parser)
    parser.add_argument("--data", required=True, type=path_option, metavar="DIR", help="what make_long_data.py wrote")
    parser.add_argument("--recipe", type=path_option, default=DEFAULT_RECIPE, metavar="FILE")
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument(
        "--start-from", type=path_option, metavar="DIR", help="an adapter to train on, with a fresh optimizer"
    )
    parser.add_argument(
        "--stop-after", type=real(0, above=True), default=math.inf, metavar="SECONDS", help="stop in time and save"
    )
    parser.add_argument("--save-every", type=COUNT, default=50, metavar="STEPS")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the frozen weights (default: bf16 on cuda)")
    parser.add_argument(
        "--attention",
        choices=[*KERNELS, "auto"],
        default="flash",
        help="kernel on cuda with bf16; auto: the faster, measured at the first stage of 32K or more",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; status 0 when the recipe is done, 3 when it was stopped before. Raises `LongrunError` on bad input."""
    arguments = parse_arguments(argv)
    started = time.monotonic()
    recipe = Recipe.read(arguments.recipe)
    recipe.check_world(world_size())
    # Nothing here tokenizes in threads; the tokenizer would warn of the fork of BatchMaker if it could.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ranks = Ranks.start(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if ranks.rank == 0:  # makes or fetches it
        choose_model(arguments.model, NO_ADAPTER, arguments.download)
    ranks.wait()
    arguments.model = choose_model(arguments.model, NO_ADAPTER).model_dir
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[arguments.dtype]
    dtype = dtype or (torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
    trainer = Trainer(
        arguments.model, arguments.data, arguments.out, recipe, ranks, dtype, arguments.start_from, arguments.attention
    )
    spent = time.monotonic() - started
    finished = trainer.train(arguments.stop_after - spent, arguments.save_every)
    ranks.close()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    run(main)
