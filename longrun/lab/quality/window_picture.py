"""Quality by the streaming heads' window: sinks and recent tokens on one map at one ratio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.files.whole_file import write_whole
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE
from longrun.lab.quality.statistics import Estimate
from longrun.lab.quality.summary import ALL_TASKS, RowSummary
from longrun.pictures import series_style, wrapped
from longrun.units import format_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW_PICTURE = "quality_window.png"
_SAME = ("head_map", "retrieval_ratio", "kv", "weights", "eviction")

Windows = dict[str, tuple[str, int, int]]


def windows(results: QualityResults) -> Windows:
    """Rows whose map, ratio and formats another row has with another window: name -> (map, sink_size, recent_size)."""
    groups: dict[tuple[Any, ...], Windows] = {}
    for row in results.head["rows"]:
        described = results.head["described"].get(row["name"])
        if described is None or row["eviction"] != "none" or described["retrieval_heads"] is None:
            continue  # the heads of a row with a share of the tokens differ with the length
        if described["retrieval_heads"] < described["kv_heads"]:
            label = f"{Path(row['head_map']).name} {described['retrieval_ratio']:.0%}"
            key = tuple(row[name] for name in _SAME)
            groups.setdefault(key, {})[row["name"]] = label, described["sink_size"], described["recent_size"]
    found: Windows = {}
    for members in groups.values():
        if len({member[1:] for member in members.values()}) > 1:
            found |= members
    return found


def draw_windows(results: QualityResults, by_length: dict[int, list[RowSummary]]) -> Path | None:
    """Exact match (above) and KL divergence (below) by recent tokens, a line a number of sinks, a column a length.

    Returns:
        The picture's file, or None where no two rows differ by their window alone.
    """
    places = windows(results)
    if not places:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(by_length) + 1.5, 7.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(by_length), squeeze=False)
    ticks = sorted({recent for _, _, recent in places.values()})
    for column, (length, rows) in enumerate(by_length.items()):
        for panel, label, value in (
            (panels[0][column], "exact match, all tasks", _exact),
            (panels[1][column], "KL(reference || row), nats", _divergence),
        ):
            _lines(panel, rows, places, value)
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xlabel("recent tokens of a streaming head")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        panels[0][column].set_title(f"{format_tokens(length)} tokens", fontsize=10)
        panels[0][column].set_ylim(-0.03, 1.03)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if not handles:
        handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 + len(by_length), fontsize=8)
    title = " - ".join([results.head["model"], *results.head["notes"]])
    figure.suptitle(wrapped(title, figure.get_figwidth(), 9), fontsize=9)
    path = results.folder / WINDOW_PICTURE
    write_whole(path, lambda file: canvas.print_figure(file, dpi=130, format="png"))
    return path


def _exact(row: RowSummary) -> Estimate | None:
    return row.tasks[ALL_TASKS].exact if ALL_TASKS in row.tasks else None


def _divergence(row: RowSummary) -> Estimate | None:
    return None if row.text is None else row.text.kl


def _lines(
    panel: Axes, rows: list[RowSummary], places: Windows, value: Callable[[RowSummary], Estimate | None]
) -> None:
    lines: dict[tuple[str, int], list[tuple[int, Estimate]]] = {}
    for row in rows:
        found = value(row)
        if row.name in places and found is not None:
            label, sinks, recent = places[row.name]
            lines.setdefault((label, sinks), []).append((recent, found))
    for number, ((label, sinks), points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda point: point[0])
        x, y = [recent for recent, _ in points], [one.value for _, one in points]
        spread: Any = [[one.value - one.low for _, one in points], [one.high - one.value for _, one in points]]
        name = f"{label}, {sinks} sinks"
        panel.errorbar(x, y, yerr=spread, **series_style(number), capsize=2, alpha=0.8, label=name)
    reference = next((value(row) for row in rows if row.name == REFERENCE), None)
    if reference is not None:
        panel.axhline(reference.value, color="0.4", linestyle="--", linewidth=1, label=REFERENCE)
