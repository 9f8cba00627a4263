"""How a needle sweep is shown: a grid in the terminal and a heat map as PNG."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from longrun.files.whole_file import write_whole
from longrun.lab.needle_results import SweepResults
from longrun.pictures import SCALE, wrapped
from longrun.specs.selection_spec import pages_text
from longrun.units import ALL_TOKENS, format_tokens

if TYPE_CHECKING:
    from rich.table import Table

HEATMAP_FILE = "heatmap.png"


def grid(results: SweepResults, setting: str, title: str) -> Table:
    """Depth by length: share of needles answered exactly, and share of tokens right under teacher forcing."""
    from rich.table import Table

    settings = results.head["settings"]
    table = Table(title=title, caption="exact match / tokens right under teacher forcing")
    table.add_column("depth", justify="right")
    for length in settings["lengths"]:
        table.add_column(format_tokens(length), justify="right")
    for depth in settings["depths"]:
        cells = [results.get(setting, length, depth) for length in settings["lengths"]]
        shown = ["-" if cell is None else f"{cell['score']:.0%} / {cell['token_accuracy']:.0%}" for cell in cells]
        style = None if None in cells else "green" if fmean(cell["score"] for cell in cells) == 1 else None
        table.add_row(f"{depth:.2f}", *shown, style=style)
    return table


def summary(results: SweepResults) -> list[str]:
    """Means per setting over its finished cells, and the difference to the control over cells that both finished."""
    done = {
        setting: {(cell["length"], cell["depth"]): cell for cell in results.cells if cell["setting"] == setting}
        for setting in ("main", "control")
    }
    lines = []
    for setting, cells in done.items():
        if cells:
            exact, tokens = _means(cells.values())
            lines.append(f"{setting}: exact match {exact:.1%}, tokens right {tokens:.1%} ({len(cells)} cells)")
    both = done["main"].keys() & done["control"].keys()
    if both:
        main, control = (_means([done[setting][key] for key in both]) for setting in ("main", "control"))
        exact, tokens = (100 * (one - other) for one, other in zip(main, control, strict=True))
        lines.append(
            f"main minus control: exact match {exact:+.1f} points, tokens right {tokens:+.1f} ({len(both)} cells)"
        )
    return lines


def _means(cells: Iterable[dict[str, Any]]) -> tuple[float, float]:
    cells = list(cells)
    return fmean(cell["score"] for cell in cells), fmean(cell["token_accuracy"] for cell in cells)


def draw_heatmap(results: SweepResults, titles: dict[str, str], note: str | None = None) -> Path:
    """Write `heatmap.png` next to the results: a panel per setting in `titles`, colour and first line = exact match.

    Args:
        titles: setting -> title of its panel.
        note: a line under the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = results.head["settings"]
    lengths, depths = settings["lengths"], settings["depths"]
    width, height = max(4.0, 1.0 + 0.95 * len(lengths)), max(2.8, 1.6 + 0.55 * len(depths))
    figure = Figure(figsize=(width * len(titles) + 0.8, height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    image = None
    for panel, (setting, title) in zip(panels, titles.items(), strict=True):
        cells = [[results.get(setting, length, depth) for length in lengths] for depth in depths]
        scores = [[float("nan") if cell is None else cell["score"] for cell in row] for row in cells]
        panel.set_facecolor("0.85")  # cells that were not run
        image = panel.imshow(scores, cmap=SCALE, vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                if cell is not None:
                    text = f"{cell['score']:.0%}\n{cell['token_accuracy']:.0%} tok"
                    colour = "white" if cell["score"] < 0.5 else "black"
                    panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        panel.set_xticks(range(len(lengths)), [format_tokens(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        panel.set_xlabel("prompt length (tokens)")
        panel.set_ylabel("depth of the needles")
        panel.set_title(wrapped(title, width, 9), fontsize=9)
    figure.colorbar(image, ax=list(panels), label="needles answered exactly", shrink=0.9)
    if note:
        figure.supxlabel(wrapped(note, figure.get_figwidth(), 8), fontsize=8)
    path = results.folder / HEATMAP_FILE
    write_whole(path, lambda file: canvas.print_figure(file, dpi=150, format="png"))
    return path


def panel_title(name: str, setting: str, described: dict[str, Any]) -> str:
    """Model, setting and what it keeps in which format, above a grid."""
    heads = f"{described['retrieval_heads']} of {described['kv_heads']} KV heads retrieval"
    finite = sum(
        described["recent_size"] < reach < ALL_TOKENS for row in described.get("reaches") or () for reach in row
    )
    heads += f", {finite} of finite reach" if finite else ""
    selection = described.get("selection")
    read = f", {pages_text(selection)} read" if selection else ""
    prefill = described.get("prefill")
    read += f", read sparsely ({100 * prefill['mass']:.4g}%)" if prefill else ""
    return f"{name}, {setting}\n{heads}\n{described['kv_format']} pages{read}, {described['weight_format']} weights"


def cell_line(cell: dict[str, Any]) -> str:
    """A finished cell as it is printed during the run."""
    return (
        f"{cell['setting']} {format_tokens(cell['length'])} at {cell['depth']:.2f}: exact {cell['score']:.0%}, tokens "
        f"{cell['token_accuracy']:.0%}, {cell['seconds']:.1f} s (read at {cell['prefill_tokens_per_s']:,.0f} tokens/s)"
    )
