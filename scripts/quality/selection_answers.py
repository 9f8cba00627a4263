"""Answers kept where every query reads a choice of pages: rules and budgets on a real model, by teacher forcing.

    python scripts/quality/selection_answers.py --model FOLDER_OR_FILE --lengths 8K --json out.json

A document of real code is read under full attention but for its last 256 tokens. These and all questions with their
right answers (`longrun.lab.quality.answered`) are read by a rule of `longrun.lab.selection_rules`: every query of
every layer and KV head reads the pages chosen for it, the first page, its own and the newest full ones. Behind a
rule's name and a comma stand other ways to choose (`longrun.lab.selection_choice`): `mean 16 at 4 bits, mass 0.9`, with
the budget as the cap, `..., previous token` and `..., every 4th layer`. Budgets do not count what is always read;
results say how many pages were chosen beside it on average, and which share of all was read.

`dense` questions are read in full, up to the last token before the answer, as a prompt is. Compared with full attention
over the same rows: answers kept of those that it has right, KL and the share of equal likeliest tokens, of running text
and of answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.cli import Parser, run
from longrun.lab.quality.answered import AnsweredText, answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.quality.judged import Judged, Known
from longrun.lab.selection import LayerKeys, LayerQueries, padded
from longrun.lab.selection_choice import OWN_BEST, Choosing, Way, read_row
from longrun.lab.selection_names import named_rule
from longrun.lab.selection_rules import PAGE, TODAY, Rule, digest_rules, known_rules, pages_of
from longrun.units import parse_tokens
from scripts.quality.reach_probe import Model
from scripts.quality.selection_probe import started

TEXT_ROWS = 256
RULES = (
    "perfect", "keys", TODAY, "mean 16 at 4 bits", "mean 16 + 0.25 at 4 bits", "unturned 16 + 0.25 at 4 bits",
    "4% by unturned 64 + 0.25 at 4 bits, then keys", "perfect, 16-token units",
    "unturned 16 + 0.25 at 4 bits, 16-token units",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A rule, the pages that a head reads by it at most, whether questions are read in full, and how is chosen."""

    rule: Rule
    count: int
    dense_questions: bool
    way: Way = OWN_BEST


class SelectedAttention(WholeTextAttention):
    """Full attention over a text's first rows, whose keys and values are kept; then the rows behind it, all in one
    step, as often as wanted."""

    def __init__(self, model: Model, text: AnsweredText, start: int, newest: int) -> None:
        super().__init__(model.group, model.scale, 0)
        device, dtype = model.decoder.device, model.decoder.compute_dtype
        shape = (*model.shape, len(text.ids) + -len(text.ids) % PAGE, model.decoder.config.head_dim)
        self._kept = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        tables = model.rotary.cos_sin(0, len(text.ids), len(text.ids))
        self._cos, self._sin = (padded(table / model.rotary.scaling) for table in tables)
        # Of a question's last token the answer's first follows.
        written = torch.cat([rows[1:] for _, rows in text.answers])
        self._in_full = torch.arange(len(text.ids), device=device) >= text.document_length
        self._in_full[written.to(device)] = False
        self._newest, self._questions = newest, text.document_length
        self._choosing: Choosing | None = None

    def choose(self, choice: Choice | None) -> Choosing | None:
        """For the next step alone; None: full attention. Returns what will say how much was read."""
        self._choosing = None
        if choice is not None:
            selects = ~self._in_full if choice.dense_questions else torch.ones_like(self._in_full)
            self._choosing = Choosing(choice.rule, choice.way, choice.count, selects, self._questions)
        return self._choosing

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        rows = torch.arange(step.start, step.start + len(q), device=q.device)
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[layer_idx][:, rows] = new.transpose(0, 1)
        if step.start == 0:
            return super().run(layer_idx, q, k, v, step)
        own, values = (kept[layer_idx].float() for kept in self._kept)
        keys, found = LayerKeys(own, self._cos, self._sin), []
        parts = LayerQueries.pieces(q, rows, keys, self.softmax_scale, self._newest)
        for part in parts if self._choosing is None else self._choosing.narrowed(layer_idx, parts):
            weights = part.scores.softmax(-1)
            found.append((weights.flatten(1, 2) @ values).unflatten(1, weights.shape[1:3]))
        return torch.cat(found, 1).transpose(0, 1).reshape(q.shape).to(q.dtype)


class Read:
    """One text, read under full attention up to its last `TEXT_ROWS` tokens before the questions."""

    def __init__(self, model: Model, text: AnsweredText, newest: int) -> None:
        end = text.document_length
        self._model, self._start = model, end - TEXT_ROWS
        self.text = replace(text, text_rows=torch.arange(self._start, end - 1))
        self._ids = text.ids.to(model.decoder.device)
        self.attention = SelectedAttention(model, text, self._start, newest)
        self._forward(0, self._start, False)
        self.known = Known.of(self.text, self.log_probs(None)[0])

    def _forward(self, start: int, stop: int, every: bool) -> Tensor:
        step = Step(start, stop - start, *self._model.rotary.cos_sin(start, stop - start, len(self._ids)))
        return self._model.decoder.forward(self._ids[start:stop], step, self.attention, all_positions=every)

    @torch.inference_mode()
    def log_probs(self, choice: Choice | None) -> tuple[Tensor, Tensor | None]:
        """float32 [rows, vocab_size] of the text's rows, and `Choosing.read` on the CPU, if any."""
        choosing = self.attention.choose(choice)
        hidden = self._forward(self._start, len(self._ids), True)[self.text.rows.to(self._ids.device) - self._start]
        found = torch.cat([self._model.decoder.logits(part).log_softmax(-1) for part in hidden.split(64)])
        return found, None if choosing is None else choosing.read.cpu()


def options(parser: Parser) -> None:
    """Rules and budgets."""
    parser.add_argument("--rules", default=";".join(RULES), help="separated by semicolons")
    parser.add_argument("--budgets", default="26%,6%,3%,1.5%,512,256,128,64", help="pages, or shares of all")
    parser.add_argument("--questions", default="selected,dense", help="how questions are read: either or both")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    args, runtime, model, result = started(__doc__, argv, 4, options)
    known_names, head_dim = digest_rules() | known_rules(), runtime.config.head_dim
    rules = {name.strip(): named_rule(name, known_names) for name in args.rules.split(";")}
    result |= {"benchmark": "selection answers", "text_rows": TEXT_ROWS, "lengths": []}
    for length in (parse_tokens(one, "--lengths") for one in args.lengths.split(",")):
        texts = list(answered_texts(runtime.tokenizer, standard_library()[1::2], length, args.texts, seed=0))
        pages, began = len(texts[0].ids) // PAGE, time.perf_counter()
        counts = {budget: pages_of(budget, pages) for budget in args.budgets.split(",")}
        choices = {
            (questions, budget, name): Choice(rule, count, questions == "dense", way)
            for questions in args.questions.split(",") for budget, count in counts.items()
            for name, (rule, way) in rules.items()
            if count < pages and count < (rule.coarse or 1) * pages
        }  # fmt: skip
        reads = dict.fromkeys(choices, torch.zeros(2, 3, dtype=torch.float64))
        judged, known, asked = {key: Judged() for key in choices}, Counter[str](), Counter[str]()
        part: dict[str, Any] = {"length": length, "pages": pages}
        result["lengths"].append(part)
        for number, text in enumerate(texts, 1):
            read = Read(model, text, args.newest)
            asked.update(task for task, _ in text.answers)
            known.update(read.known.tasks())
            for key, choice in choices.items():
                found, own = read.log_probs(choice)
                judged[key].add(read.known, found)
                reads[key] = reads[key] + own
            part |= {
                "texts_read": number, "asked": asked, "seconds": time.perf_counter() - began, "rows": [
                    {"questions": key[0], "budget": key[1], "rule": key[2], "pages": choice.count,
                     "bytes": choice.rule.index and choice.rule.index.token_bytes(head_dim), **read_row(reads[key]),
                     **judged[key].row(known)}
                    for key, choice in choices.items()
                ],
            }  # fmt: skip
            print(f"{len(text.ids):,} tokens, {len(choices)} choices: {part['seconds']:.0f} s so far", flush=True)
            if args.json:
                args.json.write_text(json.dumps(result))
        print(f"\n{length:,} tokens: {dict(known)} right of {dict(asked)}, {part['seconds']:.0f} s")
        for row in part["rows"]:
            name = f"{row['questions']:8} {row['budget']:>5} {row['pages']:5} {row['rule']:36}"
            name += f" chosen {row['pages_chosen']:7.1f} read {100 * row['share_read']:5.1f}%"
            values = " ".join(f"{key} {row[key]:.4f}" for key in ("kl_text", "same_text", "kl_answers", "same_answers"))
            print(f"{name} kept {row['kept']:3} of {row['known']:3} {values}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
