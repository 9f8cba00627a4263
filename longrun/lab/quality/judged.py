"""What an approximation keeps of full attention's predictions of a text and of the answers behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longrun.lab.quality.answered import AnsweredText
from longrun.lab.quality.statistics import wilson


@dataclass(frozen=True)
class Known:
    """Full attention's part.

    Attributes:
        log_probs: float32 [rows, vocab_size] of the text's rows.
        right: for each question whether full attention has its answer.
    """

    text: AnsweredText
    log_probs: Tensor
    right: list[bool]

    @classmethod
    def of(cls, text: AnsweredText, log_probs: Tensor) -> Known:
        return cls(text, log_probs, text.kept(log_probs.argmax(-1).cpu()))

    def tasks(self) -> Counter[str]:
        """Answers that full attention has, by task."""
        return Counter(task for (task, _), right in zip(self.text.answers, self.right, strict=True) if right)


@dataclass
class Judged:
    """What is kept, over all texts; KL and equal likeliest tokens by row, of text and of answers."""

    kept: Counter[str] = field(default_factory=Counter)
    kl: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    same: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, known: Known, found: Tensor) -> None:
        """
        Args:
            found: float32 [rows, vocab_size], log-probabilities as `Known.log_probs`.
        """
        pairs = zip(known.log_probs.split(64), found.split(64), strict=True)
        kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs])
        same, count = (found.argmax(-1) == known.log_probs.argmax(-1)).float(), len(known.text.text_rows)
        for own, values in ((self.kl, kl), (self.same, same)):
            own[0].extend(values[:count].tolist())
            own[1].extend(values[count:].tolist())
        kept = known.text.kept(found.argmax(-1).cpu())
        tasks = zip(known.text.answers, kept, known.right, strict=True)
        self.kept.update(task for (task, _), own, right in tasks if own and right)

    def row(self, known: Counter[str]) -> dict[str, Any]:
        """JSON-able; by task [kept, of those that full attention has right]; error: the mean's standard error."""
        kept = self.kept.total(), known.total()
        text, answers = ([sum(own[i]) / len(own[i]) for own in (self.kl, self.same)] for i in (0, 1))
        error = torch.tensor(self.kl[0]).std().item() / len(self.kl[0]) ** 0.5
        return {
            "kept": kept[0], "known": kept[1], "interval": wilson(*kept).to_dict() if kept[1] else None,
            "tasks": {task: [self.kept[task], known[task]] for task in sorted(known)}, "kl_text": text[0],
            "kl_text_error": error,
            "same_text": text[1], "kl_answers": answers[0], "same_answers": answers[1],
        }  # fmt: skip
