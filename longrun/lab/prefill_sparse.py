"""A text read with sparse attention to what lies before each chunk, without a cache or a kernel of its own.

Chunk by chunk: attention of a chunk to itself is dense; each tile of its queries reads the pages of the past that
`longrun.lab.prefill_choice` chooses, gathered; both are merged by log-sum-exp. Every `stride`-th query is attended
densely as well. That says how much attention the choice caught, and corrects its neighbours if wanted (delta
correction, arXiv 2505.11254): what the dense row differs by is added to the rows up to the next dense one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.lab.prefill_choice import Choice, Limits
from longrun.lab.prefill_selectors import TILE, page_values, tiles_of
from longrun.lab.selection import LayerKeys, padded
from longrun.lab.selection_rules import PAGE

_GATHERED_BYTES = {"cpu": 2**26, "cuda": 2**31}


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    Attributes:
        chunk: tokens, a multiple of TILE.
        dense_from: position, a multiple of TILE, from which on all queries see everything.
        delta: whether rows between the dense ones are corrected; stride: of those, a divisor of TILE.
        dense_layers: that are read in full.
    """

    choice: Choice
    limits: Limits
    chunk: int
    dense_from: int
    delta: bool = False
    stride: int = 64
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert self.chunk % TILE == 0 and self.dense_from % TILE == 0 and TILE % self.stride == 0


class SparsePrefill(WholeTextAttention):
    """A whole text in one step.

    Args:
        yarn_factor: of the rotary tables.

    Attributes:
        read: [pages read, pages of the past] of all tiles and heads.
        caught: [num_layers, num_qo_heads], the share of their attention that dense rows have in what their tile reads,
            summed over `rows` rows of each.
        alike: [num_layers, 2], sums of e[r] . e[r + 1] and of e[r] . e[r], of errors e of a chunk's dense rows before
            any correction: above a half of each other, a correction makes the rows between nearer to dense ones.
    """

    def __init__(
        self, group: int, softmax_scale: float, yarn_factor: float, num_layers: int, num_qo_heads: int, reading: Reading
    ) -> None:
        super().__init__(group, softmax_scale, 0)
        self._factor, self._reading = yarn_factor, reading
        self.read, self.caught, self.rows = [0, 0], torch.zeros(num_layers, num_qo_heads), 0
        self.alike = torch.zeros(num_layers, 2)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`; the step holds the whole text."""
        reading = self._reading
        if layer_idx in reading.dense_layers:
            return super().run(layer_idx, q, k, v, step)
        cos, sin = (padded(table / self._factor) for table in (step.cos, step.sin))
        heads, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
        keys = LayerKeys(padded(k.float()), cos, sin)
        out, end = torch.empty_like(heads), min(reading.dense_from, len(q) // TILE * TILE)
        starts = range(0, end, reading.chunk)
        self.rows = sum(min(reading.chunk, end - start) // reading.stride for start in starts[1:])
        for start in starts:
            rows = slice(start, min(start + reading.chunk, end))
            out[:, rows] = self._chunk(layer_idx, heads[:, rows], k, v, rows, keys)
        if end < len(q):
            out[:, end:] = self._tail(heads[:, end:], k, v, end)
        return out.transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """As `attention_with_lse`, but float32."""
        out, lse = attention_with_lse(q, k, v, causal, self.softmax_scale, plan_uses=len(self.caught))
        return out.float(), lse

    def _tail(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Of the queries from `start` on [num_qo_heads, n, head_dim], the last ones."""
        found = self._attend(q, k[:, start:], v[:, start:], True)
        return merge_partial(*found, *self._attend(q, k[:, :start], v[:, :start], False))[0] if start else found[0]

    def _chunk(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: LayerKeys) -> Tensor:
        """float32 [num_qo_heads, n, head_dim] of q in that shape."""
        own, own_lse = self._attend(q, k[:, rows], v[:, rows], True)
        if rows.start == 0:
            return own
        reading, pages = self._reading, rows.start // PAGE
        tiles, by_tile = tiles_of(q, len(k)), own_lse.unflatten(1, (-1, TILE)).unflatten(0, (len(k), -1))
        choice, limits = reading.choice, reading.limits
        values = page_values(choice.selector, tiles, by_tile, keys, pages, self.softmax_scale, limits.lam)
        ranking = choice.ranking(*values, limits)
        del values, tiles
        counts = choice.counts(ranking, limits)
        self.read[0] += int(counts.sum())
        self.read[1] += counts.numel() * pages
        every = slice(None, None, reading.stride)
        dense = self._attend(q[:, every], k[:, : rows.start], v[:, : rows.start], False)
        dense, dense_lse = merge_partial(*dense, own[:, every], own_lse[:, every])
        past, past_lse = self._past(q, k, v, ranking.flatten(0, 1), counts.flatten(0, 1))
        found, lse = merge_partial(own, own_lse, past, past_lse)
        self.caught[layer] += (lse[:, every] - dense_lse).clamp_(max=0).exp_().sum(-1).cpu()
        errors = dense - found[:, every]
        products = [(errors[:, :-1] * other).sum() for other in (errors[:, 1:], errors[:, :-1])]
        self.alike[layer] += torch.stack(products).cpu()
        if reading.delta:
            found.unflatten(1, (-1, reading.stride)).add_(errors[:, :, None])
            found[:, every] = dense
        return found

    def _past(self, q: Tensor, k: Tensor, v: Tensor, ranking: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of each tile to its pages.

        Args:
            q: [num_qo_heads, n, head_dim]; ranking: [num_qo_heads, tiles, pages]; counts: [num_qo_heads, tiles].

        Returns:
            float32 [num_qo_heads, n, head_dim] and [num_qo_heads, n].
        """
        heads, tiles, pages = ranking.shape
        paged = [x[:, : pages * PAGE].unflatten(1, (pages, PAGE)).flatten(0, 1) for x in (k, v)]
        first = torch.arange(heads, device=q.device) // self.group * pages
        ordered = ranking.topk(int(counts.max()), -1).indices + first[:, None, None]
        ordered, counts, q = ordered.flatten(0, 1), counts.flatten(), q.unflatten(1, (tiles, TILE)).flatten(0, 1)
        out, lse = torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)
        for count in counts.unique().tolist():
            size = max(1, _GATHERED_BYTES[q.device.type] // (count * paged[0][0].nbytes))
            for some in (counts == count).nonzero()[:, 0].split(size):
                keys, values = (x[ordered[some, :count]].flatten(1, 2) for x in paged)
                out[some], lse[some] = self._attend(q[some], keys, values, False)
        return out.view(heads, tiles * TILE, -1), lse.view(heads, -1)
