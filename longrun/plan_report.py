"""A plan as a person reads it: one table of items and a few lines around it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longrun.plan import Plan
from longrun.plan_search import MAX_CTX
from longrun.units import format_bytes, format_tokens


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan: what is planned, every item with its share, totals against the budget, the largest context."""
    cache = plan.cache
    heads = cache.num_layers * cache.num_kv_heads
    lines = [
        f"[bold]{format_tokens(plan.ctx)} tokens[/bold] on {plan.device_type}: {escape(plan.model)}",
        f"weights {plan.weight_format}, KV pages {plan.kv_format} of {plan.page_size} tokens, "
        f"prefill in chunks of {plan.chunk_size:,}; budget {escape(plan.budget_source)}",
        f"{cache.total_retrieval_heads} of {heads} KV heads keep all tokens ({escape(plan.split_note)}), split "
        f"{plan.split_hash}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_table(plan))
    console.print(_pages(plan), highlight=False, soft_wrap=True)
    if plan.max_ctx >= MAX_CTX:
        most = "no head keeps all tokens, so the cache does not grow with the context"
    else:
        most = f"largest context with this budget and these settings: [bold]{format_tokens(plan.max_ctx)} tokens[/bold]"
    console.print(most, highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)


def _table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("item")
    table.add_column("place")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("")
    for item in plan.items:
        table.add_row(item.name, item.place, f"{item.bytes:,}", f"{item.bytes / plan.total_bytes:.1%}", item.note)
    table.add_section()
    for place, used, budget in (
        ("device", plan.device_bytes, plan.device_budget),
        ("host", plan.host_bytes, plan.host_budget),
    ):
        if used or budget:
            of = f"{format_bytes(used)} of {format_bytes(budget)}"
            table.add_row("total", place, f"{used:,}", f"{used / plan.total_bytes:.1%}", of)
    return table


def _pages(plan: Plan) -> str:
    cache = plan.cache
    text = f"{cache.bytes_per_token:,.0f} bytes per token of context; cache {format_bytes(plan.cache_bytes)}"
    if cache.host_pages:
        share = cache.device_pages_per_head / cache.pages_per_head
        text += f"; {cache.device_pages:,} pages on the device ({share:.0%}), {cache.host_pages:,} on the host"
    return text
