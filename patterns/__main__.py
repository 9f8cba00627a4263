"""`python -m longrun.patterns`: measure head maps, look at them, compare them.

python -m longrun.patterns show DIR [--retrieval-ratio R | --threshold T] [--png FILE] [--json]
python -m longrun.patterns identify --model DIR --out DIR [--adapter DIR] [--method gates|reconstruction] ...
python -m longrun.patterns compare A B [--retrieval-ratio R ...] [--png FILE] [--json]
"""

from __future__ import annotations

if __name__ == "__main__":
    from longrun.interrupts import leave_at_once

    leave_at_once()  # during the imports below

import argparse
import json
import sys
from collections.abc import Sequence

from longrun.arguments import COUNT, SEED, SHARE, real, whole
from longrun.cli import EXIT_STATUS, Parser, run
from longrun.hub.find import MODEL_HELP, add_download_option, add_yarn_option, find_model
from longrun.interrupts import leaving_at_once
from longrun.patterns.compare_maps import DEFAULT_RATIOS, compare_maps, draw_comparison
from longrun.patterns.head_map import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, DEFAULT_THRESHOLD, HeadMap
from longrun.patterns.identify_settings import (
    DEFAULTS,
    DEVICES,
    DTYPES,
    LEARNING_RATE,
    METHODS,
    SHORTEST_WAY,
    IdentifySettings,
)
from longrun.units import parse_tokens


def show(options: argparse.Namespace) -> int:
    """Print one head map and its split, or one JSON object; draw it where --png is given."""
    head_map = HeadMap.load(options.folder)
    split = head_map.split(options.retrieval_ratio, options.threshold)
    notes = [*head_map.notes, *head_map.doubts(split, by_ratio=options.retrieval_ratio is not None)]
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
                    "reach_losses": None if head_map.reach_losses is None else head_map.reach_losses.to_dict(),
                    "notes": notes,
                    "png": options.png,
                }
            )
        )
        return 0
    from rich.console import Console

    from longrun.patterns.head_map_table import print_head_map

    console = Console()
    print_head_map(head_map, split, rule, options.folder, console, notes)
    if options.png:
        console.print(f"picture: {options.png}", highlight=False, markup=False, soft_wrap=True)
    return 0


def identify_command(options: argparse.Namespace) -> int:
    """Measure a model's head map, with a progress line on stderr, and say where it is."""
    from rich.console import Console

    with leaving_at_once():
        from longrun.patterns.identify import identify
    from longrun.patterns.identify_progress import ProgressLine

    given = {name: getattr(options, name) for name in IdentifySettings.__dataclass_fields__ if hasattr(options, name)}
    for name in ("context", "min_context"):
        if given[name] is not None:
            given[name] = parse_tokens(given[name], f"--{name.replace('_', '-')}")
    model_dir = str(find_model(options.model, options.download))
    settings = IdentifySettings(**given, model_dir=model_dir, text_files=tuple(options.text))
    with ProgressLine(Console(stderr=True)) as progress:
        head_map = identify(settings, progress)
    for note in head_map.notes:
        print(f"note: {note}", file=sys.stderr)
    split = head_map.split()
    heads = head_map.num_layers * head_map.num_kv_heads
    print(f"{options.out}: {split.total_retrieval} of {heads} heads score at least 0.5")
    equal = len({score for row in head_map.scores for score in row}) == 1
    for doubt in head_map.doubts(head_map.split(0.5) if equal else split, by_ratio=equal):
        print(f"warning: {doubt}", file=sys.stderr)
    print(f"look at it with: python -m longrun.patterns show {options.out}")
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """Print how alike two maps are, or one JSON object; draw them where --png is given."""
    maps = [HeadMap.load(folder) for folder in (options.a, options.b)]
    ratios = options.retrieval_ratio or DEFAULT_RATIOS
    correlation, overlaps = compare_maps(*maps, ratios)
    if options.png:
        ratio = ratios[0] if options.retrieval_ratio else 0.5
        title = f"retrieval heads at ratio {ratio:g} framed, a dot where both keep them; Spearman {correlation:.2f}"
        draw_comparison(*maps, ratio, (options.a, options.b), title, options.png)
    if options.json:
        rows = [
            {
                "retrieval_ratio": overlap.retrieval_ratio,
                "num_retrieval": overlap.num_retrieval,
                "shared": overlap.shared,
                "share": None if overlap.num_retrieval == 0 else overlap.share,
                "chance": overlap.chance,
                "chance_deviation": overlap.deviation,
            }
            for overlap in overlaps
        ]
        facts = {
            "a": options.a,
            "b": options.b,
            "num_heads": overlaps[0].num_heads,
            "spearman": None if correlation != correlation else correlation,
            "overlaps": rows,
            "png": options.png,
        }
        print(json.dumps(facts))
        return 0
    if correlation != correlation:
        print("Spearman rank correlation: none, since all scores of one map are equal")
    else:
        print(f"Spearman rank correlation over {overlaps[0].num_heads} heads: {correlation:.3f}")
    for one in overlaps:
        if one.num_retrieval:
            print(
                f"ratio {one.retrieval_ratio:g}: {one.shared} of A's {one.num_retrieval} retrieval heads are B's "
                f"({one.share:.0%}); chance gives {one.chance:.1f} +- {one.deviation:.1f} "
                f"({one.chance / one.num_retrieval:.0%})"
            )
        else:
            print(f"ratio {one.retrieval_ratio:g}: no retrieval head")
    if options.png:
        print(f"picture: {options.png}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m longrun.patterns",
        description="Measure head maps, look at them, compare them.",
        epilog=EXIT_STATUS,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_show(commands.add_parser("show", help="print and draw a head map with its split"))
    text = "measure a model's retrieval heads and write the head map"
    _add_identify(commands.add_parser("identify", help=text, description=text, epilog=_defaults_text()))
    text = "rank correlation and shared retrieval heads of two maps of one model"
    _add_compare(commands.add_parser("compare", help=text, description=text))
    return parser


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="head map folder in DuoAttention's format")
    rule = command.add_mutually_exclusive_group()
    rule.add_argument("--retrieval-ratio", type=SHARE, metavar="R", help="share of the heads to keep, best first")
    rule.add_argument("--threshold", type=SHARE, metavar="T", help="keep heads that score at least T (default: 0.5)")
    command.add_argument("--png", metavar="FILE", help="draw the map into this file")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    command.set_defaults(main=show)


def _add_identify(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, metavar="DIR|NAME", help=f"{MODEL_HELP}, with its tokenizer")
    add_download_option(command)
    add_yarn_option(command)
    add("--adapter", metavar="DIR", help="LoRA adapter folder: the model is measured with it (default: none)")
    add(
        "--out", required=True, metavar="DIR", help="folder for the map; DIR.partial keeps an unfinished run's progress"
    )
    add(
        "--method",
        choices=METHODS,
        default="gates",
        help="gates: trained; reconstruction: scored; reach: scored, with the loss at every reach (default: gates)",
    )
    add("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 text to use (default: Python's help texts, mixed "
        "with generated sentences)")  # fmt: skip
    add("--context", metavar="TOKENS", help="of the longest text, like 4096 or 32K")
    add("--min-context", metavar="TOKENS", help="gates: of the shortest text")
    add("--steps", type=COUNT, metavar="N", help="training steps, or texts to score")
    add("--seed", type=SEED, default=0, metavar="N", help="decides texts and all that is drawn (default: 0)")
    add("--sink-size", type=whole(), default=DEFAULT_SINK_SIZE, metavar="N",
        help="first tokens that a streaming head keeps (default: %(default)s)")  # fmt: skip
    add("--recent-size", type=COUNT, default=DEFAULT_RECENT_SIZE, metavar="N",
        help="last tokens that a streaming head keeps (default: %(default)s)")  # fmt: skip
    add("--device", choices=DEVICES, help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, bfloat16 on cuda)")
    defaults = {name: field.default for name, field in IdentifySettings.__dataclass_fields__.items()}
    rate = f"{LEARNING_RATE}, or {SHORTEST_WAY} / steps in shorter runs"
    add("--learning-rate", type=real(0, above=True), metavar="X", help=f"gates: AdamW's highest rate (default: {rate})")
    add("--regularization", type=real(0), default=defaults["regularization"], metavar="X",
        help="gates: weight of mean |gate|, higher pushes more heads to 0 (default: %(default)s)")  # fmt: skip
    add("--num-keys", type=COUNT, default=defaults["num_keys"], metavar="N",
        help="gates: pass keys a text (default: %(default)s)")  # fmt: skip
    add("--save-every", type=COUNT, default=defaults["save_every"], metavar="N",
        help="steps between two writings of the progress (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true", help="overwrite another map, drop another run's progress")
    command.set_defaults(main=identify_command)


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="head map folder")
    command.add_argument("b", metavar="B", help="head map folder of the same model")
    shown = " ".join(f"{ratio:g}" for ratio in DEFAULT_RATIOS)
    command.add_argument("--retrieval-ratio", type=SHARE, nargs="+", metavar="R",
                         help=f"shares of the heads to keep (default: {shown})")  # fmt: skip
    command.add_argument("--png", metavar="FILE", help="draw both maps into this file")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(main=compare_command)


def _defaults_text() -> str:
    parts = []
    for (method, device), values in DEFAULTS.items():
        texts = f"{values['context']:,} tokens"
        if values["min_context"] != values["context"]:
            texts = f"{values['min_context']:,} to {texts}"
        parts.append(f"{method} on {device}: {values['steps']} steps of {texts}")
    return "Defaults by method and device: " + "; ".join(parts) + ". An interrupted run goes on when started again."


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    return options.main(options)


if __name__ == "__main__":
    run(main)
