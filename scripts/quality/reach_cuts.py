"""What cutting a head costs where half of the others are cut, too: from answers under many random cuts.

A head cut alone costs less than rounding does, because others see what it no longer sees. So heads are cut at random,
many at once, and the rise of the answers' loss is fitted as a sum over the heads that were cut (least squares; the idea
of datamodels, Ilyas et al. 2022, with heads for training examples).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.lab.quality.answered import AnsweredText
from longrun.units import ALL_TOKENS

if TYPE_CHECKING:
    from scripts.quality.reach_probe import Model

MOST = 3.0  # nats that one answer can count: a lost one is lost
RIDGE = 3.0  # cuts' worth of belief that a head costs nothing more than believed so far


class RandomCuts:
    """Answers under random cuts of a model's heads to one window.

    Args:
        window: newest tokens that a cut head sees beside the sinks.
    """

    def __init__(self, model: Model, texts: Sequence[AnsweredText], window: int, seed: int = 0) -> None:
        self._model, self._window = model, window
        self._texts = [dataclasses.replace(text, text_rows=text.text_rows[:0]) for text in texts]
        self._heads = model.shape[0] * model.shape[1]
        self._generator = torch.Generator().manual_seed(seed)
        full = [self._answers(text, None) for text in self._texts]
        self._full = [nats for nats, _ in full]
        self._known = [torch.tensor(text.kept(best)) for text, (_, best) in zip(self._texts, full, strict=True)]

    def _answers(self, text: AnsweredText, reaches: list[list[int]] | None) -> tuple[Tensor, Tensor]:
        """float64 nats of each answer, and int64 the likeliest tokens at all their places."""
        log_probs = self._model.log_probs(text, reaches).cpu()
        nats = -log_probs.gather(1, text.ids[text.answer_rows + 1, None]).squeeze(1).double()
        parts = nats.split([len(rows) for _, rows in text.answers])
        return torch.stack([part.sum() for part in parts]), log_probs.argmax(-1)

    def rise(self, number: int, cut: Tensor) -> float:
        """Mean rise of the loss over the answers of text `number` that full attention has right, nats.

        Args:
            cut: bool [num_layers * num_kv_heads].
        """
        flat = [self._window if one else ALL_TOKENS for one in cut.tolist()]
        width = self._model.shape[1]
        nats, _ = self._answers(
            self._texts[number], [flat[at : at + width] for at in range(0, len(flat), width)]
        )  # fmt: skip
        return (nats - self._full[number])[self._known[number]].clamp(max=MOST).mean().item()

    def fit(self, trials: int, believed: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """Nats that cutting each head costs: float64 [num_layers, num_kv_heads], and how well the sum fits.

        Args:
            trials: cuts of about half of the heads, over all texts in turn. Without `believed` every second one is its
                forerunner's complement on the same text.
            believed: costs of a fit before; the head of the smallest is then cut in nine of ten trials, that of the
                largest in one, and the new costs stay near the old ones where trials say nothing.
        """
        cuts, numbers, rises = [], [], []
        for trial in range(trials):
            paired = believed is None and trial % 2
            chance = torch.full((self._heads,), 0.5)
            if believed is not None:
                chance = 0.9 - 0.8 * believed.flatten().argsort().argsort() / self._heads
            cut = ~cuts[-1] if paired else torch.rand(self._heads, generator=self._generator) < chance
            number = numbers[-1] if paired else trial // (1 if believed is not None else 2) % len(self._texts)
            cuts.append(cut)
            numbers.append(number)
            rises.append(self.rise(number, cut))
        return self._least_squares(torch.stack(cuts).double(), torch.tensor(numbers), rises, believed)

    def _least_squares(
        self, cuts: Tensor, numbers: Tensor, rises: list[float], believed: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        before = torch.zeros(self._heads, dtype=torch.float64) if believed is None else believed.flatten()
        found = torch.tensor(rises, dtype=torch.float64)
        design, left = cuts.clone(), found - cuts @ before
        for number in numbers.unique():  # each text rises by its own amount, whatever is cut
            own = numbers == number
            design[own] -= design[own].mean(0)
            left[own] -= left[own].mean()
        gram = design.T @ design + RIDGE * torch.eye(self._heads, dtype=torch.float64)
        more = torch.linalg.solve(gram, design.T @ left)
        unexplained = (left - design @ more).square().mean().sqrt().item()
        facts = {"trials": len(rises), "mean_rise": found.mean().item(), "spread": found.std().item(),
                 "unexplained": unexplained}  # fmt: skip
        return (before + more).view(self._model.shape), facts
