"""Choices of pages across steps and layers: old choices, pools of recently chosen pages, layers that choose for others.

Read by `selection_probe.py`. A stream is consecutive queries: what attention gives to pages, and what a rule makes of
them, as [num_layers * num_kv_heads, R, pages].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longrun.lab.selection import best

AGES, POOLS, FILTERS = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12)
_WARM_ROWS = 16


@dataclass
class Stream:
    """Rows' parts, layer after layer and piece after piece, [num_kv_heads, some rows, pages] each.

    Attributes:
        rows: int64 [R], consecutive positions.
        mass: mean over a KV head's queries; 0 where a page cannot be chosen.
        values: by rule, of `longrun.lab.selection.LayerQueries.ranking`.
    """

    rows: Tensor
    mass: list[Tensor] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def joined(self, rule: str, layers: int) -> tuple[Tensor, Tensor]:
        """Mass and values of one rule, [num_layers * num_kv_heads, R, pages]."""
        pieces = len(self.mass) // layers
        mass, values = (
            torch.cat([torch.cat(parts[i : i + pieces], 1) for i in range(0, len(parts), pieces)])
            for parts in (self.mass, self.values[rule])
        )
        return mass, values


def old_choices(mass: Tensor, values: Tensor, count: int) -> dict[str, dict[int, float]]:
    """What choices of `count` pages lose when they are 0, 1, 2, 4, 8 tokens old, how many of their pages are chosen
    again, and hits of pools."""
    chosen, past = best(values, count), mass.sum(-1)
    lost, repeated = {}, {}
    for age in (0, *AGES):
        old, new = chosen[:, : chosen.shape[1] - age], chosen[:, age:]
        lost[age] = (past[:, age:] - (mass[:, age:] * old).sum(-1)).mean().item()
        repeated[age] = ((old & new).sum() / new.sum()).item()
    return {"lost_by_age": lost, "repeated_by_age": repeated, "pool_hits": pool_hits(chosen, count)}


def pool_hits(chosen: Tensor, count: int) -> dict[int, float]:
    """Share of chosen pages that stand in a pool of the 1, 2, 4, 8 times `count` pages a head that were chosen most
    recently, from the 17th row on.

    Args:
        chosen: bool [heads, R, pages].
    """
    used = torch.zeros(len(chosen), chosen.shape[2], dtype=torch.int32, device=chosen.device)
    hits, asked = dict.fromkeys(POOLS, 0), 0
    for row, now in enumerate(chosen.unbind(1)):
        if row >= _WARM_ROWS:
            place = used.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            asked += int(now.sum())
            for size in POOLS:
                hits[size] += int((now & (used > 0) & (place < size * count)).sum())
        used[now] = row + 1
    return {size: found / max(1, asked) for size, found in hits.items()}


def lost_by_source(mass: Tensor, values: Tensor, count: int, layers: int) -> Tensor:
    """[num_layers, num_kv_heads, num_layers, num_kv_heads]: what a head loses with the pages that another chooses."""
    chosen = best(values, count).flatten(1).to(mass.dtype)
    lost = (mass.sum((1, 2))[:, None] - mass.flatten(1) @ chosen.mT) / mass.shape[1]
    return lost.reshape(layers, -1, layers, len(mass) // layers).cpu()


def own_choice(lost: Tensor) -> float:
    """Of `lost_by_source`: the mean where every head chooses for itself."""
    return lost.flatten(2).flatten(0, 1).diagonal().mean().item()


def filter_layers(fit: Tensor, judged: Tensor) -> list[dict[str, Any]]:
    """A few layers choose for all: every head takes the pages of the head, in one of these layers up to its own, that
    serves it best (as OmniKV and Kascade do). Layers are added one by one, each that which lowers the mean of `fit`
    most, the first layer before all, or those before the first filter would have none. Both as `lost_by_source`; the
    map fitted on the one is judged on the other."""
    layers = fit.shape[0]

    def of(chosen: Sequence[int]) -> tuple[float, float]:
        late = (torch.tensor(chosen) > torch.arange(layers)[:, None])[:, None, :, None]
        lost, at = fit[:, :, chosen].masked_fill(late, float("inf")).flatten(2).min(-1)
        return lost.mean().item(), judged[:, :, chosen].flatten(2).gather(-1, at[..., None]).mean().item()

    chosen, found = [0], []
    while True:
        if len(chosen) in FILTERS:
            fitted, lost = of(chosen)
            found.append({"layers": sorted(chosen), "lost": lost, "lost_where_fitted": fitted})
        left = [layer for layer in range(layers) if layer not in chosen]
        if not left or len(chosen) == FILTERS[-1]:
            return found
        costs = [of([*chosen, layer])[0] for layer in left]
        chosen.append(left[costs.index(min(costs))])
