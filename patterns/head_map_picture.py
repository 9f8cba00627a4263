"""A head map as a picture: scores as colour, the split outlined, retrieval heads counted at the side."""

from __future__ import annotations

from pathlib import Path

from longrun.errors import HeadMapError
from longrun.patterns.head_map import HeadMap, HeadSplit


def draw_head_map(head_map: HeadMap, split: HeadSplit, title: str, path: str | Path) -> None:
    """Write a PNG: a row per layer, a column per KV head, retrieval heads outlined, and their count a layer as bars.

    Raises:
        HeadMapError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = head_map.num_layers, head_map.num_kv_heads
    figure = Figure(figsize=(min(4.5 + 0.28 * heads, 16), min(2.2 + 0.2 * layers, 20)), layout="constrained")
    FigureCanvasAgg(figure)
    scores, counts = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    image = scores.imshow(head_map.scores, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
    for layer in range(layers):
        for head in split.retrieval_heads(layer):
            corner = (head - 0.44, layer - 0.44)
            scores.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="tab:red", linewidth=1.4))
    scores.set_xlabel("KV head")
    scores.set_ylabel("layer")
    scores.set_xticks(range(0, heads, -(-heads // 16)))
    scores.set_yticks(range(0, layers, -(-layers // 16)))
    figure.colorbar(image, ax=scores, label="score", location="left", fraction=0.05, aspect=40)

    per_layer = split.num_retrieval
    counts.barh(range(layers), per_layer, color="tab:red", height=0.7)
    for layer, count in enumerate(per_layer):
        counts.text(count + 0.03 * heads, layer, str(count), va="center", fontsize=8)
    counts.set_xticks(range(0, heads + 1, -(-heads // 4)))
    counts.set_xlim(0, heads * 1.18)
    counts.set_xlabel("retrieval heads")
    counts.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise HeadMapError(f"picture {path} cannot be written: {error.strerror or error}") from error
