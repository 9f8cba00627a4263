"""Options of scripts/needle_sweep.py, and what they decide."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any

from longrun.arguments import COUNT, SEED, SHARE
from longrun.cli import Parser
from longrun.errors import InputError
from longrun.hub.find import add_model_option, add_yarn_option
from longrun.needles.needles import make_needles
from longrun.paths import path_option
from longrun.plan.prefill import add_prefill_options
from longrun.plan.selection import SELECT_HELP, SELECT_QUESTION_HELP, parse_select
from longrun.plan.split import KEEP_HELP, KV_BYTES_HELP, parse_keep
from longrun.quant.kv_format import KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import parse_dense_tokens
from longrun.units import TOKENS, parse_tokens


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Needle x depth x length grid, scored by exact match.")
    add_model_option(parser)
    add_yarn_option(parser)
    parser.add_argument(
        "--adapter",
        type=path_option,
        metavar="DIR|none",
        help="LoRA adapter folder (default: the demo model's, for that alone)",
    )
    parser.add_argument("--lengths", required=True, metavar="1K,4K,...", help="prompt lengths in the model's tokens")
    parser.add_argument("--depths", type=COUNT, default=5, metavar="N", help="evenly spaced depths from 0 to 1")
    parser.add_argument("--needles", type=COUNT, default=3, metavar="N", help="needles a cell")
    parser.add_argument(
        "--one-document", action="store_true", help="one text a length with the needles of every depth, read once"
    )
    parser.add_argument(
        "--chunk-size", type=TOKENS, metavar="N", help="tokens of a prefill step (default: the budget's)"
    )
    parser.add_argument("--head-map", default="full", metavar="DIR|full|auto")
    parser.add_argument("--retrieval-ratio", type=SHARE, metavar="R", help="share of the map's KV heads to keep")
    parser.add_argument("--kv-bytes", metavar="SIZE", help=KV_BYTES_HELP)
    parser.add_argument("--keep", metavar="N", help=KEEP_HELP)
    parser.add_argument("--select", metavar="N|P%|off", help=SELECT_HELP)
    parser.add_argument("--select-question", action="store_true", help=SELECT_QUESTION_HELP)
    add_prefill_options(parser)
    parser.add_argument("--kv", choices=KV_FORMATS, help="KV page format (default: the budget's)")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="default: the budget's")
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--haystack", nargs="+", type=path_option, metavar="FILE", help="text files instead of generated text"
    )
    parser.add_argument("--control", choices=["full"], help="the same grid under full attention with bf16 pages")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="start over where --out holds another sweep")
    return parser.parse_args(argv)


def collect_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the results, JSON-able; a resumed run must have the same.

    Raises:
        InputError: an impossible length or number of needles, a text that --keep, --select or --prefill-dense does not
            take, or a haystack file that cannot be read.
    """
    lengths = sorted({parse_tokens(text, "--lengths") for text in arguments.lengths.split(",")})
    last = arguments.depths - 1
    depths = [round(i / last, 6) for i in range(arguments.depths)] if last else [0.5]
    make_needles(arguments.needles * (len(depths) if arguments.one_document else 1), 0)
    dense, files = arguments.prefill_dense, []
    for path in arguments.haystack or []:
        if not path.is_file():
            raise InputError(f"--haystack {path} is not a file: name text files")
        files.append({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    return {
        "lengths": lengths,
        "depths": depths,
        "needles": arguments.needles,
        "head_map": arguments.head_map,
        "retrieval_ratio": arguments.retrieval_ratio,
        "kv": arguments.kv,
        "weights": arguments.weights,
        "budget": arguments.budget,
        "device": arguments.device,
        "haystack": files or "generated",
        "control": arguments.control,
        "seed": arguments.seed,
        # None where they are not used, as in the results of sweeps that knew no such options
        "one_document": arguments.one_document or None,
        "kv_bytes": arguments.kv_bytes,
        "keep": None if arguments.keep is None else parse_keep(arguments.keep, "--keep"),
        "select": None if arguments.select is None else parse_select(arguments.select, "--select"),
        "select_question": arguments.select_question or None,
        "prefill": arguments.prefill,
        "prefill_share": arguments.prefill_share,
        "prefill_mass": arguments.prefill_mass,
        "prefill_dense": None if dense is None else parse_dense_tokens(dense, "--prefill-dense"),
        "yarn": arguments.yarn,
        "chunk_size": arguments.chunk_size,
    }
