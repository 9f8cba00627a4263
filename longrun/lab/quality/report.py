"""How a comparison is shown: markdown tables and pictures, quality against KV bytes, retrieval ratio and window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.files.whole_file import write_whole
from longrun.lab.quality.asked import ASKED_TASKS
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE
from longrun.lab.quality.statistics import Estimate
from longrun.lab.quality.summary import ALL_TASKS, RowSummary, percent, points, sentences, summarize
from longrun.lab.quality.tasks import RETRIEVAL_TASKS
from longrun.lab.quality.texts import TEXT_TASKS
from longrun.lab.quality.window_picture import draw_windows
from longrun.pictures import series_style, wrapped
from longrun.units import format_bytes, format_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE = "report.md"
BYTES_PICTURE, RATIO_PICTURE = "quality_bytes.png", "quality_ratio.png"
SIMULATED_NOTE = (
    "Rows with computed bytes simulate a format: their pages went through its grid and were held as bf16, which KV in "
    "use, peak and speeds are of. What the format itself would have in use is computed from its spec, not measured."
)
KEPT_NOTE = (
    "Of the answers that the reference gets right, and of code not without the document as well, how many are right:"
)
_TITLES = {"passkey": "pass key", "needle": "needle", "several": "several needles", "keyvalue": "key-value"}
_TITLES |= {task: task for task in ASKED_TASKS}


def write_report(results: QualityResults) -> list[Path]:
    """Write report.md and the pictures next to the results, and the estimates into results.json itself.

    Returns:
        The files written.
    """
    lengths = results.head["settings"]["lengths"]
    by_length = {length: _rows(results, length) for length in lengths}
    results.head["summary"] = [row.to_dict() for rows in by_length.values() for row in rows]
    results.write()
    report = results.folder / REPORT_FILE
    write_whole(report, ("\n".join(_report(results, by_length)) + "\n").encode())
    heads = "share of KV heads that keep all tokens"
    label = "KV bytes in use (of simulated formats: computed)"
    windows = draw_windows(results, by_length)
    return [
        report,
        _draw(results, by_length, BYTES_PICTURE, label, _format_bytes_in_use, logarithmic=True),
        _draw(results, by_length, RATIO_PICTURE, heads, lambda row: row.retrieval_ratio),
        *([] if windows is None else [windows]),
    ]


def _format_bytes_in_use(row: RowSummary) -> float | None:
    return row.kv_used if row.kv_computed is None else row.kv_computed


def _rows(results: QualityResults, length: int) -> list[RowSummary]:
    found = [summarize(results, [row["name"]], row["name"], length) for row in results.head["rows"]]
    return [row for row in found if row is not None]


def _report(results: QualityResults, by_length: dict[int, list[RowSummary]]) -> list[str]:
    head = results.head
    commits = ", ".join(sorted({str(record["commit"]) for record in results.records}))
    lines = [f"# Quality of {head['model']} against its own full attention", ""]
    lines += [f"**{note}**\n" for note in head["notes"]]
    lines += [
        f"{' '.join(asked(results))} Seed {head['settings']['seed']}; commit {commits}, "
        f"{head['environment']['device']}. All rows read the same documents. In brackets 95% intervals: Wilson for "
        "shares, bootstrap for means, paired bootstrap for differences to the reference (where all items are equal, "
        "3 / n to either side).",
        "",
        *(f"- {line}" for line in sentences(results)),
    ]
    for length, rows in by_length.items():
        if rows:
            lines += ["", f"## {format_tokens(length)} tokens", "", _counted(rows), "", *_overview(rows)]
            if any(row.kv_computed is not None for row in rows):
                lines += ["", SIMULATED_NOTE]
            lines += ["", "Difference to the reference on the same items, exact match in points:", ""]
            lines += [*_differences(rows), "", KEPT_NOTE, "", *_kept(rows)]
            if any(set(row.texts) - {"text"} for row in rows):
                lines += ["", "KL (nats) and top-1 by kind of text:", "", *_texts(rows)]
            lines += ["", "Exact match by depth (0 is the beginning):", "", *_depths(rows)]
    return lines


def asked(results: QualityResults) -> list[str]:
    """What was asked, a sentence for all lengths that were asked the same."""
    same: dict[str, list[str]] = {}
    for length in results.head["settings"]["lengths"]:
        own = results.settings_at(length)
        parts = []
        if set(own["tasks"]) - set(TEXT_TASKS):
            parts.append(f"{own['items']} question(s) of each task at each of {len(own['depths'])} depths a length")
        if kinds := len(set(own["tasks"]) & set(TEXT_TASKS)):
            each = f" of each of {kinds} kinds" if kinds > 1 else ""
            parts.append(f"{own['texts']} text(s){each} a length with the last {own['score_tokens']} tokens predicted")
        text = ", ".join(parts)
        same.setdefault(text, []).append(format_tokens(length))
    if len(same) == 1:
        return [f"{next(iter(same))}."]
    return [f"{', '.join(lengths)}: {text}." for text, lengths in same.items()]


def _counted(rows: list[RowSummary]) -> str:
    """How many items a row has at this length: the most that any has, as rows may be unfinished."""
    counts = [
        (max((row.tasks[task].exact.count for row in rows if task in row.tasks), default=0), title)
        for task, title in _TITLES.items()
    ]
    counts.append((max((row.text.kl.count for row in rows if row.text is not None), default=0), "text (blocks)"))
    return "Items of a row: " + ", ".join(f"{count} {title}" for count, title in counts if count) + "."


def _asked_titles(rows: list[RowSummary]) -> dict[str, str]:
    """The tasks that any of the rows has answers to, with their titles."""
    return {task: title for task, title in _TITLES.items() if any(task in row.tasks for row in rows)}


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _overview(rows: list[RowSummary]) -> list[str]:
    full = next((row.kv_used for row in rows if row.name == REFERENCE), None)
    titles = _asked_titles(rows)
    header = ["row", "heads", "tokens held", "KV planned", "KV in use", "of reference", "KV peak"]
    if simulated := any(row.kv_computed is not None for row in rows):
        header += ["format's KV, computed", "of reference"]
    header += [*titles.values(), "perplexity", "KL (nats)", "top-1", "prefill tok/s"]
    body = []
    for row in rows:
        cells = [row.name, "-" if row.retrieval_ratio is None else f"{row.retrieval_ratio:.0%}"]
        cells.append("-" if row.held is None else f"{row.held:.1%}")
        cells.append("-" if row.kv_planned is None else format_bytes(round(row.kv_planned)))
        cells += [format_bytes(round(row.kv_used or 0)), "-" if not full else f"{(row.kv_used or 0) / full:.0%}"]
        cells.append(format_bytes(round(row.kv_peak or 0)))
        if simulated:
            computed = row.kv_computed
            cells.append("-" if computed is None else format_bytes(round(computed)))
            cells.append("-" if computed is None or not full else f"{computed / full:.0%}")
        cells += [percent(row.tasks[task].exact) if task in row.tasks else "-" for task in titles]
        text = row.text
        cells.append("-" if text is None else _number(text.perplexity))
        own = text is None or row.name == REFERENCE  # nothing to compare
        cells += ["-", "-"] if own else [_number(text.kl, 4), percent(text.top1)]
        cells.append("-" if row.prefill_tokens_per_s is None else f"{row.prefill_tokens_per_s:,.0f}")
        body.append(cells)
    return _table(header, body)


def _differences(rows: list[RowSummary]) -> list[str]:
    titles = _asked_titles(rows)
    header = ["row", *titles.values(), "all tasks", "all tasks, tokens right", "perplexity, ratio"]
    body = []
    for row in rows:
        if row.name == REFERENCE:
            continue
        found = [row.tasks.get(task) for task in (*titles, ALL_TASKS)]
        cells = [
            "-" if t is None or t.exact_minus_reference is None else points(t.exact_minus_reference) for t in found
        ]
        every = found[-1]
        tokens = None if every is None else every.tokens_minus_reference
        cells.append("-" if tokens is None else points(tokens))
        cells.append(
            "-" if row.text is None or row.text.perplexity_ratio is None else _number(row.text.perplexity_ratio, 3)
        )
        body.append([row.name, *cells])
    return _table(header, body)


def _kept(rows: list[RowSummary]) -> list[str]:
    titles = _asked_titles(rows)
    body = []
    for row in rows:
        found = [row.tasks.get(task) for task in (*titles, ALL_TASKS)]
        kept = ["-" if t is None or t.kept is None else f"{percent(t.kept)} of {t.kept.count}" for t in found]
        loss = ["-" if t is None or t.loss is None else _number(t.loss, 3) for t in found[-1:]]
        if row.name != REFERENCE:
            body.append([row.name, *kept, *loss])
    return _table(["row", *titles.values(), "all tasks", "nats a token of right answers, more"], body)


def _texts(rows: list[RowSummary]) -> list[str]:
    kinds = [kind for kind in TEXT_TASKS if any(kind in row.texts for row in rows)]
    body = []
    for row in rows:
        if row.name != REFERENCE:
            found = [row.texts.get(kind) for kind in kinds]
            cells = [("-", "-") if t is None else (_number(t.kl, 4), percent(t.top1)) for t in found]
            body.append([row.name, *(cell for pair in cells for cell in pair)])
    return _table(["row", *(f"{kind}, {what}" for kind in kinds for what in ("KL", "top-1"))], body)


def _depths(rows: list[RowSummary]) -> list[str]:
    depths = sorted({depth for row in rows for task in row.tasks.values() for depth in task.by_depth})
    body = []
    for row in rows:
        for task in (*RETRIEVAL_TASKS, *ASKED_TASKS):
            if task in row.tasks:
                there = row.tasks[task].by_depth
                body.append([row.name, _TITLES[task], *(percent(there[d]) if d in there else "-" for d in depths)])
    return _table(["row", "task", *(f"{depth:g}" for depth in depths)], body)


def _number(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _draw(
    results: QualityResults,
    by_length: dict[int, list[RowSummary]],
    name: str,
    label: str,
    place: Callable[[RowSummary], float | None],
    logarithmic: bool = False,
) -> Path:
    """A column of panels a length: exact match over the retrieval tasks asked above, KL divergence below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    width = max(3.4, min(5.2, 24 / len(by_length)))  # of a column
    figure = Figure(figsize=(width * len(by_length) + 1.5, 7.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(by_length), squeeze=False)
    methods = list(dict.fromkeys(row.method for rows in by_length.values() for row in rows if place(row) is not None))
    for column, (length, rows) in enumerate(by_length.items()):
        exact, divergence = panels[0][column], panels[1][column]
        _lines(exact, rows, methods, place, lambda row: row.tasks[ALL_TASKS].exact if ALL_TASKS in row.tasks else None)
        _lines(divergence, rows, methods, place, _divergence)
        if any(place(row) is not None and _divergence(row) for row in rows):
            divergence.set_yscale("log", nonpositive="mask")  # formats and wrong maps lie three decades apart
            divergence.yaxis.set_major_formatter("{x:g}")
        exact.set_title(f"{format_tokens(length)} tokens", fontsize=10)
        exact.set_ylim(-0.03, 1.03)
        exact.set_ylabel("exact match, all tasks")
        divergence.set_ylabel("KL(reference || row), nats")
        for panel in (exact, divergence):
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
            if logarithmic and any(place(row) for row in rows):
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value)))
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.tick_params(axis="x", labelsize=8)
    shown = {
        name: handle for panel in panels.flat for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    named = [name for name in methods if name in shown]  # a method may be missing at some lengths
    figure.legend([shown[name] for name in named], named, loc="outside lower center", ncols=3, fontsize=8)
    notes = results.head["notes"]
    title = " - ".join([results.head["model"], *notes])
    figure.suptitle(wrapped(title, figure.get_figwidth(), 9), fontsize=9)
    path = results.folder / name
    write_whole(path, lambda file: canvas.print_figure(file, dpi=130, format="png"))
    return path


def _divergence(row: RowSummary) -> Estimate | None:
    """The reference's own, 0, has no place on a logarithmic axis."""
    return None if row.text is None or row.text.kl.value <= 0 else row.text.kl


def _lines(
    panel: Axes,
    rows: list[RowSummary],
    order: list[str],
    place: Callable[[RowSummary], float | None],
    value: Callable[[RowSummary], Estimate | None],
) -> None:
    """One line a method; its place in `order` decides sign and colour, the same in all panels."""
    methods: dict[str, list[tuple[float, Estimate]]] = {}
    for row in rows:
        where, found = place(row), value(row)
        if where is not None and found is not None:
            methods.setdefault(row.method, []).append((where, found))
    for method, points_ in methods.items():
        style = series_style(order.index(method))
        points_.sort(key=lambda point: point[0])
        whole = methods.get(f"full, {method.partition(', ')[2]}", []) if method.startswith("map ") else []
        x, y = [where for where, _ in points_], [one.value for _, one in points_]
        spread: Any = [[one.value - one.low for _, one in points_], [one.high - one.value for _, one in points_]]
        middle = {where: [b for a, b in zip(x, y, strict=True) if a == where] for where in x}  # seeds share a place
        middle |= {where: [one.value] for where, one in whole}  # a map that keeps all heads: the curve's end
        panel.errorbar(
            x,
            y,
            yerr=spread,
            **{**style, "linestyle": "none"},
            capsize=2,
            alpha=0.8,
        )
        panel.plot([], [], label=method, **style)  # the legend shows sign and line together
        line = {**style, "marker": ""}
        panel.plot(list(middle), [sum(found) / len(found) for found in middle.values()], alpha=0.5, **line)
