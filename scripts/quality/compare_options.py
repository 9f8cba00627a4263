"""Options of scripts/compare.py, and what they decide."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrun.arguments import COUNT, SEED, whole
from longrun.cli import Parser
from longrun.errors import InputError
from longrun.hub.find import add_model_option, add_yarn_option
from longrun.lab.quality.code_source import source_facts
from longrun.lab.quality.texts import CODE_TEXT, TEXT_TASKS
from longrun.paths import path_option
from longrun.units import TOKENS, parse_tokens

GROUPS = ("single", "several", "keyvalue", "code", "rules", *TEXT_TASKS)
ASKED = ("code", "rules")  # questions about the running Python's own modules, in the words of the chat template


def parse_arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    add_yarn_option(parser)
    parser.add_argument("--adapter", type=path_option, metavar="DIR", help="LoRA adapter of every row, or none")
    parser.add_argument(
        "--settings", required=True, type=path_option, metavar="FILE", help="TOML file with [[row]] tables"
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD", help="only rows whose names hold one of these")
    parser.add_argument(
        "--head-map", nargs="+", default=[], metavar="NAME=FOLDER", help="folders in place of the rows' @NAME; rows "
        "whose @NAME has none are left out",
    )  # fmt: skip
    parser.add_argument("--lengths", required=True, metavar="4K,8K,...", help="prompt lengths in the model's tokens")
    parser.add_argument("--depths", type=COUNT, default=5, metavar="N", help="evenly spaced depths from 0 to 1")
    parser.add_argument(
        "--items",
        type=whole(),
        default=8,
        metavar="N",
        help="questions of a task, depth and length (code, rules: documents a length)",
    )
    parser.add_argument("--texts", type=whole(), default=4, metavar="N", help="texts to be predicted, a length")
    parser.add_argument(
        "--score-tokens", type=whole(), default=256, metavar="N", help="last tokens of a text, predicted"
    )
    parser.add_argument("--tasks", default="single,several,keyvalue,text", help=f"some of {','.join(GROUPS)}")
    parser.add_argument(
        "--text", nargs="+", type=path_option, metavar="FILE", help="texts to predict (default: Python's docs)"
    )
    parser.add_argument(
        "--haystack", nargs="+", type=path_option, metavar="FILE", help="text files instead of generated text"
    )
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument(
        "--chunk-size", type=TOKENS, metavar="N", help="tokens of a prefill step (default: the budget's)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument(
        "--logits", type=path_option, metavar="DIR", help="reference's distributions, large (default: in --out)"
    )
    parser.add_argument("--force", action="store_true", help="start over where --out holds another comparison")
    return parser.parse_args(argv)


def collect_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the results besides the rows, JSON-able; a resumed run must have the same.

    Raises:
        InputError: an impossible number, an unknown task, or a file that cannot be read.
    """
    lengths = sorted({parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")})
    for name in ("depths", "items", "texts", "score_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    groups = [group.strip() for group in arguments.tasks.split(",")]
    for group in groups:
        if group not in GROUPS:
            raise InputError(f"--tasks {group!r} is unknown: choose among {', '.join(GROUPS)}")
    if set(TEXT_TASKS) & set(groups) and arguments.score_tokens >= lengths[0]:
        raise InputError(
            f"--score-tokens {arguments.score_tokens} leaves nothing to read of {lengths[0]:,} tokens: give less"
        )
    last = arguments.depths - 1
    return {
        "lengths": lengths,
        "depths": [round(i / last, 6) for i in range(arguments.depths)] if last else [0.5],
        "items": arguments.items,
        "texts": arguments.texts,
        "score_tokens": arguments.score_tokens,
        "tasks": [group for group in GROUPS if group in groups],
        "text": _checksums(arguments.text) or "Python's language reference (pydoc_data)",
        "code": source_facts() if {*ASKED, CODE_TEXT} & set(groups) else None,
        "haystack": _checksums(arguments.haystack) or "generated",
        "budget": arguments.budget,
        "chunk_size": arguments.chunk_size,
        "device": arguments.device,
        "yarn": arguments.yarn,
        "seed": arguments.seed,
    }


def named_folders(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER pairs; InputError for a text that is none, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or name in found:
            raise InputError(f"--head-map {pair!r} is no NAME=FOLDER of a name of its own: write reach=maps/my-model")
        found[name] = folder
    return found


def _checksums(paths: Sequence[Path] | None) -> list[dict[str, str]]:
    for path in paths or []:
        if not path.is_file():
            raise InputError(f"{path} is not a file: name text files")
    return [{"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths or []]
