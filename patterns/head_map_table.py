"""A head map as text: one row a layer, its scores as shades, its retrieval heads counted and marked."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.patterns.reach_losses import SMALL_SHARE, ReachLosses
from longrun.units import ALL_TOKENS

WIDEST_ROW = 16  # heads a row up to which scores are printed as numbers; above, one character a head
_SHADES = ".:-=+*xX#@"  # no blank: long rows must fold in step with the marks beside them


def print_head_map(
    head_map: HeadMap, split: HeadSplit, rule: str, source: str, console: Console, notes: Sequence[str]
) -> None:
    """Print the map: window, rule of the split and its hash, a row per layer with scores and retrieval heads.

    A retrieval head's score is bold and in brackets (`[0.93]`); with more than 16 heads a layer scores become shades,
    and the retrieval heads are marked next to them. `notes` follow the head lines.
    """
    heads = head_map.num_layers * head_map.num_kv_heads
    lines = [
        f"[bold]{escape(source)}[/bold]: {head_map.num_layers} layers of {head_map.num_kv_heads} KV heads; streaming "
        f"heads keep {head_map.sink_size} sinks and the last {head_map.recent_size} tokens",
        f"{split.total_retrieval} of {heads} heads are retrieval heads ({split.retrieval_ratio:.1%}) by {rule}; split "
        f"{split.hash}",
        *(f"note: {escape(note)}" for note in notes),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    narrow = head_map.num_kv_heads <= WIDEST_ROW
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column(
        "scores, retrieval heads in brackets" if narrow else f"scores, {_SHADES[0]} 0 to {_SHADES[-1]} 1",
        overflow="fold",
    )
    if not narrow:
        table.add_column("R retrieval, . streaming", overflow="fold")
    for layer, scores in enumerate(head_map.scores):
        keep = split.retrieval[layer]
        cells = [str(layer), f"{sum(keep)}", _numbers(scores, keep) if narrow else Text("".join(map(_shade, scores)))]
        if not narrow:
            cells.append("".join("R" if retrieval else "." for retrieval in keep))
        table.add_row(*cells)
    console.print(table)
    if head_map.reach_losses is not None:
        _print_reaches(head_map.reach_losses, console)


def _print_reaches(losses: ReachLosses, console: Console) -> None:
    """A row a layer: the reach that each head needs."""
    console.print(
        f"reach each head needs: the shortest from which on it loses at most {SMALL_SHARE:.0%} of its largest loss; "
        f"measured on {losses.measured_length:,} tokens with {losses.sink_size:,} sinks",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("reach in tokens by KV head", overflow="fold")
    for layer in range(losses.num_layers):
        needed = [losses.needed(layer, head) for head in range(losses.num_kv_heads)]
        table.add_row(str(layer), " ".join(f"{'all' if reach == ALL_TOKENS else reach:>6}" for reach in needed))
    console.print(table)


def _numbers(scores: tuple[float, ...], keep: tuple[bool, ...]) -> Text:
    text = Text()
    for score, retrieval in zip(scores, keep, strict=True):
        text.append(f"[{score:.2f}]" if retrieval else f" {score:.2f} ", style="bold" if retrieval else "dim")
    return text


def _shade(score: float) -> str:
    return _SHADES[min(int(score * len(_SHADES)), len(_SHADES) - 1)]
