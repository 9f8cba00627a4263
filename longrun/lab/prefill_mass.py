"""How much attention of a tile's queries falls on few pages of the past, and how much of it selectors find.

Full attention, measured on the way in some tiles; `longrun.lab.prefill_selectors` says what tiles and selectors are,
`prefill_choice` what rules. A page's *mass* is the share of the tile's attention that it gets, a mean over the 128
queries; *past* is the mass of all pages before the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.lab.prefill_choice import LEVELLED, Choice, Limits, by_whole, counts_at
from longrun.lab.prefill_selectors import TILE, page_values, tiles_of
from longrun.lab.selection import LayerKeys, padded
from longrun.lab.selection_rules import PAGE

HELD = (0.90, 0.95, 0.99)  # of the past's mass
LOST = (0.05, 0.02, 0.01)  # of all attention
SHARES = (0.05, 0.08, 0.15, 0.25)
LEVELS = tuple(10 ** (-0.25 * i) for i in range(1, 25))


@dataclass
class MassTable:
    """Sums over tiles; of texts of one length, several can be added up.

    Attributes:
        tiles: number of them.
        past: [num_layers, num_qo_heads], mass of the past.
        held, lost: [num_layers, num_qo_heads, 3], shares of the past's pages that hold `HELD` of its mass, and that
            leave at most `LOST` of all attention to others.
        by_tile: of each tile [past pages, mean past, mean shares to hold `HELD`], means over layers and heads.
        caught: by (selector, "share" or "weighed") [num_layers, num_qo_heads, shares], mass caught at `SHARES`.
        levelled: by (selector, rule) [2, levels], share of the pages read and mass caught at `LEVELS`, means over
            layers and heads.
    """

    tiles: int
    past: Tensor
    held: Tensor
    lost: Tensor
    by_tile: list[list[float]]
    caught: dict[tuple[str, str], Tensor]
    levelled: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_layers: int, num_qo_heads: int, device: torch.device) -> MassTable:
        def zeros(*more: int) -> Tensor:
            return torch.zeros(num_layers, num_qo_heads, *more, device=device)

        return cls(0, zeros(), zeros(len(HELD)), zeros(len(LOST)), [], {})

    def level(self, selector: str, rule: str, share: float) -> float:
        """At which so large a share of the pages is read, between the levels by logarithms."""
        shares = (self.levelled[selector, rule][0] / self.tiles).tolist()  # rises as levels fall
        for i, above in enumerate(shares):
            if above >= share:
                if i == 0:
                    return LEVELS[0]
                part = (share - shares[i - 1]) / (above - shares[i - 1])
                return LEVELS[i - 1] * (LEVELS[i] / LEVELS[i - 1]) ** part
        return LEVELS[-1]

    def caught_at(self, selector: str, rule: str, share: float) -> float | None:
        """Mass caught, a mean over tiles, layers and heads, where that share of the pages is read; between levels in
        straight lines, None outside them."""
        if rule not in LEVELLED:
            return self.caught[selector, rule][..., SHARES.index(share)].mean().item() / self.tiles
        shares, caught = (self.levelled[selector, rule] / self.tiles).tolist()
        for i in range(1, len(shares)):
            if shares[i - 1] <= share < shares[i]:
                part = (share - shares[i - 1]) / (shares[i] - shares[i - 1])
                return caught[i - 1] + part * (caught[i] - caught[i - 1])
        return None


class MassMeasure(WholeTextAttention):
    """Full attention over a whole text, measured in some of its tiles.

    Args:
        starts: of the tiles, multiples of TILE behind the first chunk.
        chunk: tokens, a multiple of TILE.
        yarn_factor: of the rotary tables.
        table: is added to.
    """

    def __init__(
        self, group: int, softmax_scale: float, starts: Sequence[int], chunk: int, yarn_factor: float,
        selectors: Sequence[str], limits: Limits, table: MassTable,
    ) -> None:  # fmt: skip
        super().__init__(group, softmax_scale, 0)
        assert all(start >= chunk and start % TILE == 0 for start in starts) and chunk % TILE == 0
        self._starts, self._chunk, self._factor = starts, chunk, yarn_factor
        self._selectors, self._limits, self.table = selectors, limits, table
        self._by_tile = torch.zeros(len(starts), 2 + len(HELD), device=table.past.device)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`; the step holds the whole text."""
        cos, sin = (padded(table / self._factor) for table in (step.cos, step.sin))
        keys = LayerKeys(padded(k.transpose(0, 1).float()), cos, sin)
        for number, start in enumerate(self._starts):
            tile = tiles_of(q[start : start + TILE].transpose(0, 1), len(keys.keys))
            self._tile(layer_idx, number, start, tile, keys)
        if layer_idx == len(self.table.past) - 1:
            self.table.tiles += len(self._starts)
            self.table.by_tile += (self._by_tile / len(self.table.past)).tolist()
        return super().run(layer_idx, q, k, v, step)

    def _tile(self, layer: int, number: int, start: int, tile: Tensor, keys: LayerKeys) -> None:
        begin = start // self._chunk * self._chunk
        pages, table = begin // PAGE, self.table
        mass, own_lse = self._mass(tile, start, begin, keys)  # [kv, group, 1, pages]
        past = mass.sum(-1).flatten()
        ordered = mass.sort(-1, descending=True).values.cumsum(-1).flatten(0, 2)
        held = torch.stack([(ordered < part * past[:, None]).sum(-1) + 1 for part in HELD], -1).clamp(max=pages) / pages
        left = torch.cat((past[:, None], past[:, None] - ordered), -1)
        lost = torch.stack([(left > part).sum(-1) for part in LOST], -1) / pages
        for own, found in ((table.past, past), (table.held, held), (table.lost, lost)):
            own[layer] += found
        self._by_tile[number] += torch.cat((past.new_tensor([pages]), past.mean()[None], held.mean(0)))
        levels = mass.new_tensor(LEVELS)
        at = torch.tensor([self._limits.chosen(share, pages) - 1 for share in SHARES], device=mass.device)
        for selector in self._selectors:
            values = page_values(selector, tile, own_lse, keys, pages, self.softmax_scale, self._limits.lam)
            for fixed in ("share", "weighed"):
                ranking = Choice(selector, 0, fixed).ranking(*values, self._limits)
                caught = mass.gather(-1, ranking.argsort(-1, descending=True)).cumsum(-1)
                zeros = table.past.new_zeros(*table.past.shape, len(SHARES))
                table.caught.setdefault((selector, fixed), zeros)[layer] += caught[..., at].flatten(0, 2)
                for rule in LEVELLED:
                    if by_whole("", rule) == (fixed == "weighed"):
                        counts = counts_at(ranking, rule, levels, self._limits)
                        found = torch.stack((counts / pages, caught.gather(-1, counts - 1))).mean((1, 2, 3))
                        own = table.levelled.setdefault((selector, rule), torch.zeros_like(found))
                        own += found / len(table.past)

    def _mass(self, tile: Tensor, start: int, begin: int, keys: LayerKeys) -> tuple[Tensor, Tensor]:
        """The pages' [num_kv_heads, group, 1, pages], and the queries' log-sum-exp over their own chunk
        [num_kv_heads, group, 1, TILE]."""
        stop = start + TILE
        scores = (tile.flatten(1, 3) @ keys.keys[:, :stop].mT).mul_(self.softmax_scale)
        scores = scores.unflatten(1, tile.shape[1:4])
        future = torch.ones(TILE, TILE, dtype=torch.bool, device=tile.device).triu(1)
        scores[..., start:].masked_fill_(future, -torch.inf)
        own_lse = scores[..., begin:].logsumexp(-1)
        whole = torch.logaddexp(scores[..., :begin].logsumexp(-1), own_lse)
        each = scores[..., :begin].sub_(whole[..., None]).exp_()
        return each.unflatten(-1, (-1, PAGE)).sum(-1).mean(3), own_lse
