"""Two head maps side by side: rank correlation, and how many retrieval heads they share, against what chance gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrun.errors import HeadMapError
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_map_picture import outline_head, save_picture
from longrun.patterns.head_split import HeadSplit
from longrun.pictures import SCALE, wrapped

DEFAULT_RATIOS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Overlap:
    """Retrieval heads of A and B at one retrieval ratio.

    Attributes:
        num_retrieval: heads each map keeps, of `num_heads`.
        shared: how many of A's are B's as well.
        chance: the mean of `shared` over random choices of that size (hypergeometric), and `deviation` its standard
            deviation.
    """

    retrieval_ratio: float
    num_heads: int
    num_retrieval: int
    shared: int

    @property
    def share(self) -> float:
        """Share of A's retrieval heads that are B's; NaN where there are none."""
        return self.shared / self.num_retrieval if self.num_retrieval else math.nan

    @property
    def chance(self) -> float:
        return self.num_retrieval**2 / self.num_heads

    @property
    def deviation(self) -> float:
        kept, total = self.num_retrieval, self.num_heads
        if total < 2:
            return 0.0
        return kept * (total - kept) / (total * math.sqrt(total - 1))


def compare_maps(a: HeadMap, b: HeadMap, ratios: Sequence[float] = DEFAULT_RATIOS) -> tuple[float, list[Overlap]]:
    """(Spearman's rank correlation over all heads, overlaps at the ratios).

    Raises:
        HeadMapError: the maps have unlike shapes, or a ratio is outside [0, 1].
    """
    if (a.num_layers, a.num_kv_heads) != (b.num_layers, b.num_kv_heads):
        raise HeadMapError(
            f"the maps have {a.num_layers} layers of {a.num_kv_heads} KV heads and {b.num_layers} of "
            f"{b.num_kv_heads}: compare maps of one model"
        )
    flat = [[score for row in head_map.scores for score in row] for head_map in (a, b)]
    overlaps = []
    for ratio in ratios:
        kept = [_heads(head_map.split(retrieval_ratio=ratio)) for head_map in (a, b)]
        overlaps.append(Overlap(ratio, len(flat[0]), len(kept[0]), len(kept[0] & kept[1])))
    return spearman(*flat), overlaps


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation in [-1, 1]: Pearson's of the ranks, equal values sharing their mean rank.

    NaN where one side has a single value, since it ranks nothing.
    """
    ranks = [_ranks(values) for values in (a, b)]
    mean = (len(a) + 1) / 2
    x, y = ([rank - mean for rank in side] for side in ranks)
    norm = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    return math.fsum(p * q for p, q in zip(x, y, strict=True)) / norm if norm else math.nan


def draw_comparison(a: HeadMap, b: HeadMap, ratio: float, names: tuple[str, str], title: str, path: str | Path) -> None:
    """Write a PNG: both maps, their retrieval heads at `ratio` framed, with a dot where both keep the head.

    Raises:
        HeadMapError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, heads = a.num_layers, a.num_kv_heads
    figure = Figure(figsize=(min(4.5 + 0.5 * heads, 18), min(2.4 + 0.2 * layers, 20)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    kept = [_heads(head_map.split(retrieval_ratio=ratio)) for head_map in (a, b)]
    for panel, head_map, own, name in zip(panels, (a, b), kept, names, strict=True):
        image = panel.imshow(head_map.scores, vmin=0.0, vmax=1.0, cmap=SCALE, aspect="auto", interpolation="nearest")
        for layer, head in sorted(own):
            outline_head(panel, layer, head, dotted=(layer, head) in kept[0] & kept[1])
        panel.set_title(wrapped(str(name), figure.get_figwidth() * 0.36, 9), fontsize=9)
        panel.set_xlabel("KV head")
        panel.set_xticks(range(0, heads, -(-heads // 16)))
    panels[0].set_ylabel("layer")
    panels[0].set_yticks(range(0, layers, -(-layers // 16)))
    figure.colorbar(image, ax=panels, label="score", fraction=0.05, aspect=40)
    save_picture(figure, title, path)


def _heads(split: HeadSplit) -> set[tuple[int, int]]:
    return {(layer, head) for layer in range(split.num_layers) for head in split.retrieval_heads(layer)}


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        stop = first
        while stop < len(order) and values[order[stop]] == values[order[first]]:
            stop += 1
        for index in order[first:stop]:
            ranks[index] = (first + 1 + stop) / 2
        first = stop
    return ranks
