"""A tiny model trained once on long texts, from beginning to end, and what it was trained with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from long_text import save_corpus, save_model, tokenizer

from scripts.training import train_long
from scripts.training.long_ranks import Ranks

RECIPE = """
rank = 4
alpha = 8
rope_theta = 5000.0
max_position_embeddings = 4096
final_rate = 0.0
warmup_steps = 2
text_positions = 64
keep_weight = 0.5
keep_batch = 4
keep_tokens = 64
keep_positions = 16
chat_answers = 2
chat_tokens = 6
[[stage]]
length = 256
batch = 2
steps = 5
rate = 1e-2
stretched = 0.5
[[stage]]
length = 384
batch = 2
steps = 3
rate = 5e-3
[[stage]]
length = 512
batch = 2
steps = 2
rate = 3e-3
"""
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Training:
    """Folders of the model and of its texts, the recipe's file, and the folder of the finished run."""

    model: Path
    data: Path
    recipe: Path
    trained: Path

    @classmethod
    def run(cls, folder: Path) -> Training:
        made = cls(folder / "model", folder / "corpus", folder / "recipe.toml", folder / "trained")
        save_model(made.model)
        tokenizer().save_pretrained(made.model)
        save_corpus(made.data)
        made.recipe.write_text(RECIPE)
        assert made.trainer(made.trained).train(1e9, save_every=100)
        return made

    def trainer(self, out: Path, recipe: Path | None = None, **changes) -> train_long.Trainer:
        """A trainer of this model on these texts that writes into `out`, or resumes what is there."""
        read = train_long.Recipe.read(recipe or self.recipe)
        return train_long.Trainer(self.model, self.data, out, read, ALONE, torch.float32, **changes)


def steps_of(out: Path) -> list[dict]:
    return [entry for line in (out / "log.jsonl").read_text().splitlines() if "rate" in (entry := json.loads(line))]
