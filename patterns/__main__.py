"""`python -m longrun.patterns`: look at head maps.

python -m longrun.patterns show DIR [--retrieval-ratio R | --threshold T] [--png FILE] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from longrun.cli import run
from longrun.patterns.head_map import DEFAULT_THRESHOLD, HeadMap


def show(options: argparse.Namespace) -> int:
    """Print one head map and its split, or one JSON object; draw it where --png is given."""
    head_map = HeadMap.load(options.folder)
    split = head_map.split(options.retrieval_ratio, options.threshold)
    if options.retrieval_ratio is not None:
        rule = f"retrieval ratio {options.retrieval_ratio:g}"
    else:
        threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
        rule = f"a score of at least {threshold:g}"
    if options.png:
        from longrun.patterns.head_map_picture import draw_head_map

        title = f"{options.folder}\n{split.total_retrieval} retrieval heads ({rule}), split {split.hash}"
        draw_head_map(head_map, split, title, options.png)
    if options.json:
        print(
            json.dumps(
                {
                    "source": options.folder,
                    "num_layers": head_map.num_layers,
                    "num_kv_heads": head_map.num_kv_heads,
                    "sink_size": head_map.sink_size,
                    "recent_size": head_map.recent_size,
                    "rule": rule,
                    "retrieval_ratio": split.retrieval_ratio,
                    "num_retrieval": list(split.num_retrieval),
                    "retrieval_heads": [split.retrieval_heads(layer) for layer in range(split.num_layers)],
                    "hash": split.hash,
                    "scores": head_map.scores,
                    "notes": list(head_map.notes),
                    "png": options.png,
                }
            )
        )
        return 0
    from rich.console import Console

    from longrun.patterns.head_map_table import print_head_map

    console = Console()
    print_head_map(head_map, split, rule, options.folder, console)
    if options.png:
        console.print(f"picture: {options.png}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m longrun.patterns", description="Look at head maps.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("show", help="print and draw a head map with its split")
    command.add_argument("folder", metavar="DIR", help="head map folder in DuoAttention's format")
    rule = command.add_mutually_exclusive_group()
    rule.add_argument("--retrieval-ratio", type=float, metavar="R", help="share of the heads to keep, best first")
    rule.add_argument("--threshold", type=float, metavar="T", help="keep heads that score at least T (default: 0.5)")
    command.add_argument("--png", metavar="FILE", help="draw the map into this file")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    command.set_defaults(main=show)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    return options.main(options)


if __name__ == "__main__":
    run(main)
