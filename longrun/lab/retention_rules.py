"""Retention rules: a score says which tokens of a KV head matter, an allocation how many each layer and head keeps.

Every rule keeps the same number of tokens in all: `keep` for each KV head of the model, besides the window. An
allocation is one dataclass with one method, as a score is (`retention_scores`), and any two can be joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longrun.errors import InputError, quoted
from longrun.lab.retention_scores import (
    HeavyHitterScore,
    LayerPrompt,
    RandomScore,
    RecencyScore,
    Score,
    SnapKVScore,
)

RULE_NAMES = ("snapkv", "h2o", "streamingllm", "pyramidkv", "adakv", "random-SEED")


class Allocation(Protocol):
    """How many tokens each layer and KV head keeps."""

    def choose(self, scores: Tensor, keep: int, layer_idx: int, num_layers: int) -> Tensor:
        """The tokens of one layer that stay.

        Args:
            scores: float32 [num_kv_heads, n], of the tokens before the window; n is the same in every layer.
            keep: tokens of a KV head, on the mean over all heads of all layers; at most n.

        Returns:
            bool [num_kv_heads, n]. Of equal scores the older token stays.
        """
        ...


@dataclass(frozen=True)
class UniformAllocation:
    """`keep` tokens for every KV head."""

    def choose(self, scores: Tensor, keep: int, layer_idx: int, num_layers: int) -> Tensor:
        """See `Allocation.choose`."""
        return _best(scores, keep)


@dataclass(frozen=True)
class PyramidAllocation:
    """Falls linearly from the first layer to the last, which keeps a `steepness`-th of the mean (PyramidKV, arXiv
    2406.02069; its published code has 20). No layer is given more than it has: the last ones get the rest."""

    steepness: int = 20

    def choose(self, scores: Tensor, keep: int, layer_idx: int, num_layers: int) -> Tensor:
        """See `Allocation.choose`."""
        first = min(2 * keep - keep // self.steepness, scores.shape[1])
        return _best(scores, _falling(first, 2 * keep - first, num_layers)[layer_idx])


@dataclass(frozen=True)
class AdaAllocation:
    """A layer's tokens go to the best of all its KV heads together, so that a head whose attention is spread out keeps
    more; every head keeps a `floor`-th of `keep` at least (Ada-KV, arXiv 2407.11550; its published code has a fifth).
    """

    floor: int = 5

    def choose(self, scores: Tensor, keep: int, layer_idx: int, num_layers: int) -> Tensor:
        """See `Allocation.choose`. Of equal scores at one position that of the first head stays."""
        raised = scores.masked_fill(_best(scores, keep // self.floor), float("inf"))
        heads, count = scores.shape
        return _best(raised.T.reshape(1, -1), keep * heads).view(count, heads).T


@dataclass(frozen=True)
class RetentionRule:
    """What is kept of a prompt: the best by `score`, as many as `allocation` says, and the window."""

    score: Score
    allocation: Allocation

    def kept(self, prompt: LayerPrompt, keep: int) -> Tensor:
        """bool [num_kv_heads, n], over all tokens of the layer; keep: at most `prompt.num_candidates`."""
        chosen = self.allocation.choose(self.score.score(prompt), keep, prompt.layer_idx, prompt.num_layers)
        return torch.cat((chosen, chosen.new_ones(len(chosen), len(prompt.queries))), dim=1)


def retention_rule(name: str, kernel: int = 7) -> RetentionRule:
    """The rule of a name in `RULE_NAMES`, random-SEED with a number for SEED.

    Args:
        kernel: see `SnapKVScore`; PyramidKV and Ada-KV score as SnapKV does.

    Raises:
        InputError: any other name.
    """
    uniform, snapkv = UniformAllocation(), SnapKVScore(kernel)
    rules = {
        "snapkv": RetentionRule(snapkv, uniform),
        "h2o": RetentionRule(HeavyHitterScore(), uniform),
        "streamingllm": RetentionRule(RecencyScore(), uniform),
        "pyramidkv": RetentionRule(snapkv, PyramidAllocation()),
        "adakv": RetentionRule(snapkv, AdaAllocation()),
    }
    kind, _, seed = name.partition("-")
    if kind == "random" and seed.isdecimal() and len(seed) < 10:
        return RetentionRule(RandomScore(int(seed)), uniform)
    if name not in rules:
        raise InputError(f"eviction method {quoted(name)} is unknown: use tova, {', '.join(RULE_NAMES)}")
    return rules[name]


def _best(scores: Tensor, count: int) -> Tensor:
    """bool like `scores` [rows, n]: the `count` largest of each row; of equals the first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _falling(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers that fall on a line from `first` to `last`, rounded so that they add up to its sum; one
    number is the mean. first + last is even."""
    steps = max(1, count - 1)
    exact = [first * (steps - i) + last * i for i in range(count)] if count > 1 else [(first + last) // 2]
    missing = (sum(exact) - sum(value // steps * steps for value in exact)) // steps
    by_rest = sorted(range(count), key=lambda i: (-(exact[i] % steps), i))[:missing]
    return [value // steps + (i in by_rest) for i, value in enumerate(exact)]
