"""A plan as a person reads it: one table of items and a few lines around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from longrun.machine.speeds import Speeds
from longrun.plan.plan import Plan
from longrun.plan.search import MAX_CAPACITY
from longrun.plan.times import predict
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.selection_spec import select_from_text
from longrun.units import ALL_TOKENS, format_bytes, format_tokens

_NOTE_WIDTH = 17  # with its padding; what is longer is wrapped


def print_plan(plan: Plan, console: Console, speeds: Speeds | None = None) -> None:
    """Print the plan: what is planned, every item with its share, totals against the budget, the largest capacity,
    and with a machine's speeds how long it takes."""
    lines = [
        f"[bold]{format_tokens(plan.capacity)} tokens[/bold] on {plan.device_type}: {escape(plan.model)}",
        f"weights {plan.weight_format}, KV pages {plan.kv_format} of {plan.page_size} tokens, "
        f"prefill in chunks of {plan.chunk_size:,}; budget {escape(plan.budget_source)}",
        f"{heads_line(plan.cache)} ({escape(plan.split_note)})",
        *selection_lines(plan.attention),
        *prefill_lines(plan.attention),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    columns = _fitting_columns(plan, console)
    if columns:
        console.print(_table_of(plan, columns, console.is_dumb_terminal))
    for name, place, size, note in _rows(plan):
        if columns == 0 or (columns < 5 and name == "total"):
            text = f"{name} ({place}): {note if name == 'total' else format_bytes(size)}"
            console.print(text, highlight=False, soft_wrap=True)
    console.print(_pages(plan), highlight=False, soft_wrap=True)
    if plan.max_capacity >= MAX_CAPACITY:
        most = "no head keeps all tokens, so the cache does not grow with the context"
    else:
        tokens = format_tokens(plan.max_capacity)
        kept = "reaches" if plan.cache.reaches or plan.kv_bytes_given else "settings"
        most = f"largest context with this budget and these {kept}: [bold]{tokens} tokens[/bold]"
    console.print(most, highlight=False, soft_wrap=True)
    times = predict(plan, speeds)
    if times is not None:
        console.print(escape(times.line()), highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)


def heads_line(cache: CacheSpec) -> str:
    """How many heads keep what."""
    heads = cache.num_layers * cache.num_kv_heads
    others, window = cache.total_streaming_heads, f"{cache.sink_size:,} + {cache.recent_size:,}"
    if not cache.reaches:
        rings = f", the others {window}" if others else ""
        return f"{cache.total_retrieval_heads} of {heads} KV heads keep all tokens{rings}"
    counts = Counter(reach for row in cache.reaches for reach in row)
    parts = [
        f"{counts[reach]} of {heads} KV heads all" if reach == ALL_TOKENS else f"{counts[reach]} of {reach:,}"
        for reach in sorted(counts | {ALL_TOKENS: 0}, reverse=True)
    ]
    ring = f"; {window} for the {others} others" if others else ""
    return f"reaches: {', '.join(parts)}{ring}"


def selection_lines(attention: AttentionSpec) -> list[str]:
    """What a decode step reads of the pages, where that was asked for."""
    if attention.selection is None:
        return []
    selection, listed, most = attention.selection, attention.listed_pages, attention.most_read_pages
    least = f" (at least {selection.pages_per_head:,} pages)" if selection.share else ""
    if selection.pages_of(listed) == listed:
        return [
            f"a decoded token reads all pages: no head has more than {listed:,}, and select {selection.asked}{least} "
            f"allows so many"
        ]
    if not attention.selects:
        return []  # a note of the plan says why
    begin = f"; {select_from_text(selection)}" if selection.select_from else ""
    share = f"{selection.asked} of the pages that a head holds then{least}, " if selection.share else ""
    return [
        f"a decoded token reads {share}at most {most:,} of each retrieval head's {listed:,} pages, chosen by their "
        f"digests{begin}"
    ]


def prefill_lines(attention: AttentionSpec) -> list[str]:
    """How long documents are read, where that is not exactly."""
    spec = attention.prefill
    if spec is None:
        return []
    from_token = f"from token {spec.dense_tokens:,} on" if spec.dense_tokens else "throughout"
    read = f"the {100 * spec.cap:.3g}% of the pages that hold most"
    if spec.mass is not None:
        least = min(spec.least, spec.cap)
        read = f"{100 * least:.3g}% to {100 * spec.cap:.3g}% of the pages, as many as hold {100 * spec.mass:.4g}%"
    return [
        f"documents are read sparsely {from_token}, the last {spec.dense_end:,} tokens excepted: heads that keep all "
        f"tokens read {read} of the attention{', corrected by each middle query' if spec.correct else ''}"
    ]


def _fitting_columns(plan: Plan, console: Console) -> int:
    """Columns of the widest table that the terminal holds without cutting a word; 0 without room for any."""
    for columns, more in ((5, _NOTE_WIDTH), (4, 0), (3, 0), (2, 0)):
        table = _table_of(plan, min(columns, 4), console.is_dumb_terminal)
        if Measurement.get(console, console.options.update(width=1000), table).maximum + more <= console.width:
            return columns
    return 0


def _table_of(plan: Plan, columns: int, plain: bool) -> Table:
    """Item, place and bytes, from 4 columns on the share, with 5 a note; with 2 bytes are short and the place goes."""
    table = Table(box=None if plain else SIMPLE_HEAD)
    for heading, justify in (("item", "left"), ("place", "left"), ("bytes", "right"), ("share", "right"), ("", "left")):
        if heading != "place" or columns > 2:
            table.add_column(heading, justify=justify, no_wrap=heading != "")
        if len(table.columns) == columns:
            break
    for name, place, size, note in _rows(plan):
        if name == "total" and place == "device":
            table.add_section()
        if columns == 2:
            table.add_row(f"{name} ({place})" if name == "total" else name, format_bytes(size))
        else:
            table.add_row(*(name, place, f"{size:,}", f"{size / plan.total_bytes:.1%}", note)[:columns])
    return table


def _rows(plan: Plan) -> Iterator[tuple[str, str, int, str]]:
    """(name, place, bytes, note) of every item, and of the totals."""
    for item in plan.items:
        yield item.name, item.place, item.bytes, item.note
    for place, used, budget in (
        ("device", plan.device_bytes, plan.device_budget),
        ("host", plan.host_bytes, plan.host_budget),
    ):
        if used or budget:
            yield "total", place, used, f"{format_bytes(used)} of {format_bytes(budget)}"


def _pages(plan: Plan) -> str:
    cache = plan.cache
    text = f"{cache.bytes_per_token:,.0f} bytes per token of context; cache {format_bytes(plan.cache_bytes)}"
    if plan.kv_bytes_given is not None:
        text += f"; keys and values {format_bytes(cache.kv_bytes)} of {format_bytes(plan.kv_bytes_given)} given"
    if cache.host_pages:
        share = cache.device_pages_per_head / cache.pages_per_head
        text += f"; {cache.device_pages:,} pages on the device ({share:.0%}), {cache.host_pages:,} on the host"
    return text
