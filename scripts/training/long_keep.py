"""What keeps the short-text ability of a model in training: its divergence from the original on text and chats.

A step's texts are drawn from the seed and their numbers. Every other one is a short text of the corpus, the others are
chats that the original answered itself, each in a row of its own, as they are read in use. Which of the two a process
begins with changes from step to step, so that with one text to keep a process, or an even number of processes, it runs
rows of one shape only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.lab.long_tasks import Corpus, TaskWriter
from scripts.training.long_chat import chat_prompts
from scripts.training.long_lora import LoraModel
from scripts.training.long_ranks import Ranks

_CHATS_TOGETHER = 96
_TEMPERATURES = (1.0, 0.5)  # of the original's own answers, part by part: what it may say, and what it mostly says
_MULTIPLE = 64  # of a row of chats, so that few shapes occur
_BEGINNING, _BEGINNING_WEIGHT = 3, 6.0  # first tokens of a chat's answer: they decide whether it answers or copies

Chat = tuple[int, list[int]]
"""(tokens of the question and its turn, token ids of it all)."""
_Drawn = tuple[list[list[int]], list[tuple[int, int, float]]]


def own_answers(lora: LoraModel, tokenizer: Any, writer: TaskWriter, ranks: Ranks, numbers: dict) -> list[Chat]:
    """What the original model answers to short questions.

    Drawn in parts of a fixed size, each with a seed of its own, whichever process draws it.
    """
    prompts = chat_prompts(numbers["chat_answers"])
    parts = [prompts[start : start + _CHATS_TOGETHER] for start in range(0, len(prompts), _CHATS_TOGETHER)]
    own: dict[int, list[Chat]] = {}
    lora.model.eval()
    for number in range(ranks.rank, len(parts), ranks.world):
        torch.manual_seed(numbers["seed"] * 1000 + number)
        rows = [writer.encode(writer.head + text + writer.ask) for text in parts[number]]
        temperature = _TEMPERATURES[number % len(_TEMPERATURES)]
        answers = generate(lora, tokenizer, rows, numbers["chat_tokens"], temperature, original=True)
        own[number] = [(len(row), row + answer) for row, answer in zip(rows, answers, strict=True)]
    found = {number: chats for part in ranks.gather(own) for number, chats in part.items()}
    return [chat for number in range(len(parts)) for chat in found[number]]


def generate(
    lora: LoraModel, tokenizer: Any, rows: list[list[int]], count: int, temperature: float, original: bool
) -> list[list[int]]:
    """At most `count` new ids a row, up to and with the end token; of the original or of the trained model."""
    device, end = lora.model.lm_head.weight.device, tokenizer.eos_token_id
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.no_grad(), lora.as_original() if original else nullcontext():
        made = lora.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=True, top_k=0,
            temperature=temperature, pad_token_id=pad, eos_token_id=end, use_cache=True,
        )  # fmt: skip
    answers = made[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


class Keeper:
    """Draws a step's texts to keep and computes the divergence on them."""

    def __init__(
        self, lora: LoraModel, corpus: Corpus, chats: list[Chat], numbers: dict[str, Any], pad_id: int,
        hidden: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """`hidden`: ids [rows, T], filled up at the end, to the last hidden states [rows, T, hidden]."""
        self._lora, self._corpus, self._chats, self._numbers = lora, corpus, chats, numbers
        self._pad_id, self._hidden = pad_id, hidden
        widest = max((len(ids) for _, ids in chats), default=0)
        self._width = min(-(-widest // _MULTIPLE) * _MULTIPLE, numbers["keep_tokens"])

    def losses(self, step: int, own: Sequence[int]) -> Iterator[Tensor]:
        """Divergence (nats a token) of the model from the original, summed over the step's texts `own`.

        One loss for the texts and one for the chats, as far as `own` holds both: run each backward before the next.
        """
        texts, chats = [], []
        for number in own:
            rng = random.Random(f"keep/{self._numbers['seed']}/{step}/{number}")
            (chats if self._chats and (step + number) % 2 else texts).append(rng)
        if texts:
            yield self._divergence([self._text(rng) for rng in texts], self._numbers["keep_tokens"])
        if chats:
            yield self._divergence([self._some_chats(rng) for rng in chats], self._width)

    def _text(self, rng: random.Random) -> _Drawn:
        ids = self._corpus.stretch(rng, self._numbers["keep_tokens"])
        return self._draw(rng, [ids], [(0, place, 1.0) for place in range(len(ids))])

    def _some_chats(self, rng: random.Random) -> _Drawn:
        """As many chats as make rows of `keep_tokens` tokens together, at least one; compared where the answers are."""
        count = max(1, self._numbers["keep_tokens"] // self._width)
        chosen = [rng.choice(self._chats) for _ in range(count)]
        rows = [ids[: self._width] for _, ids in chosen]
        places = [
            (row, place, _BEGINNING_WEIGHT if place < asked - 1 + _BEGINNING else 1.0)
            for row, (asked, _) in enumerate(chosen)
            for place in range(min(asked - 1, len(rows[row]) - 2), len(rows[row]) - 1)
        ]
        return self._draw(rng, rows, places)

    def _draw(self, rng: random.Random, rows: list[list[int]], places: list[tuple[int, int, float]]) -> _Drawn:
        """The rows, and the (row, place, weight) of them that are compared."""
        return rows, sorted(rng.sample(places, min(len(places), self._numbers["keep_positions"])))

    def _divergence(self, drawn: list[_Drawn], width: int) -> Tensor:
        rows: list[list[int]] = []
        chosen: list[int] = []
        weights: list[float] = []
        for own, places in drawn:
            total = sum(weight for _, _, weight in places)
            chosen += [(len(rows) + row) * width + place for row, place, _ in places]
            weights += [weight / total for _, _, weight in places]
            rows += [ids + [self._pad_id] * (width - len(ids)) for ids in own]
        device, head = self._lora.model.lm_head.weight.device, self._lora.model.lm_head
        batch, at = torch.tensor(rows, device=device), torch.tensor(chosen, device=device)
        with torch.no_grad(), self._lora.as_original():
            wanted = F.log_softmax(head(self._hidden(batch).flatten(0, 1)[at]).float(), dim=-1)
        got = F.log_softmax(head(self._hidden(batch).flatten(0, 1)[at]).float(), dim=-1)
        each = F.kl_div(got, wanted, log_target=True, reduction="none").sum(dim=-1)
        return (each * torch.tensor(weights, device=device)).sum()
