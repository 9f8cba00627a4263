"""A head map as a picture: scores as colour, the split outlined, retrieval heads counted at the side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longrun.errors import HeadMapError
from longrun.paths import user_path
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.pictures import SCALE, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_head_map(head_map: HeadMap, split: HeadSplit, title: str, path: str | Path) -> None:
    """Write a PNG: a row per layer, a column per KV head, retrieval heads outlined, and their count a layer as bars.

    Raises:
        HeadMapError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, heads = head_map.num_layers, head_map.num_kv_heads
    figure = Figure(figsize=(min(4.5 + 0.28 * heads, 16), min(2.2 + 0.2 * layers, 20)), layout="constrained")
    FigureCanvasAgg(figure)
    scores, counts = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    image = scores.imshow(head_map.scores, vmin=0.0, vmax=1.0, cmap=SCALE, aspect="auto", interpolation="nearest")
    for layer in range(layers):
        for head in split.retrieval_heads(layer):
            outline_head(scores, layer, head)
    scores.set_xlabel("KV head")
    scores.set_ylabel("layer")
    scores.set_xticks(range(0, heads, -(-heads // 16)))
    scores.set_yticks(range(0, layers, -(-layers // 16)))
    figure.colorbar(image, ax=scores, label="score", location="left", fraction=0.05, aspect=40)

    per_layer = split.num_retrieval
    counts.barh(range(layers), per_layer, color="0.35", height=0.7)
    for layer, count in enumerate(per_layer):
        counts.text(count + 0.03 * heads, layer, str(count), va="center", fontsize=8)
    counts.set_xticks(range(0, heads + 1, -(-heads // 4)))
    counts.set_xlim(0, heads * 1.18)
    counts.set_xlabel("retrieval heads")
    counts.spines[["top", "right"]].set_visible(False)
    save_picture(figure, title, path)


def outline_head(panel: Axes, layer: int, head: int, dotted: bool = False) -> None:
    """Frame a head's cell in white within black, which shows on every colour; `dotted` puts a dot into it as well."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 2.2), ("white", 1.0)):
        corner = (head - 0.43, layer - 0.43)
        panel.add_patch(Rectangle(corner, 0.86, 0.86, fill=False, edgecolor=colour, linewidth=width))
    if dotted:
        panel.plot(head, layer, marker="o", markersize=4.5, color="white", markeredgecolor="black")


def save_picture(figure: Figure, title: str, path: str | Path) -> None:
    """Write the PNG, with its title within its width.

    Raises:
        HeadMapError: the file cannot be written.
    """
    title = wrapped(title, figure.get_figwidth() - 0.3, 10)
    figure.suptitle(title, fontsize=10)
    lines = title.count("\n") + max(panel.get_title().count("\n") for panel in figure.axes)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)  # the maps keep theirs
    path = user_path(path, "picture", HeadMapError)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise HeadMapError(f"picture {path} cannot be written: {error.strerror or error}") from error
