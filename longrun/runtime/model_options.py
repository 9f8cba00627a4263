"""The command-line options that say which model runs and in how much memory, and what to load by them: one reading for
every program that answers. Nothing heavy is imported before `load_model`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from longrun.arguments import SHARE
from longrun.hub.find import MODEL_HELP, add_download_option, add_yarn_option
from longrun.plan.hot_pool import HOT_POOL_HELP, parse_hot_pool
from longrun.plan.prefill import add_prefill_options
from longrun.plan.selection import SELECT_FROM_HELP, SELECT_HELP, parse_select, parse_select_from
from longrun.plan.split import KEEP_HELP, KV_BYTES_HELP, parse_keep
from longrun.quant.kv_format import DEFAULT_KV_FORMAT, KV_FORMATS, KV_HELP
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.cache_spec import MARKS
from longrun.specs.prefill_spec import parse_dense_tokens, parse_prefill_share
from longrun.units import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.model.choice import ModelChoice
    from longrun.plan.plan import Plan
    from longrun.runtime.auto_head_map import AutoHeadMap
    from longrun.runtime.runtime import Runtime


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the group "model and memory"."""
    model = parser.add_argument_group("model and memory")
    model.add_argument("--model", metavar="DIR|NAME", help=f"{MODEL_HELP} (default: a demo model of 135M)")
    add_download_option(model)
    add_yarn_option(model)
    model.add_argument(
        "--adapter",
        metavar="DIR|none",
        help="LoRA adapter folder, added to the weights (default: for the demo model the one that comes with it)",
    )
    model.add_argument(
        "--ctx",
        metavar="TOKENS",
        help="capacity, like 128K or 3.3M (default: the trained window; 32K for the demo model with its adapter)",
    )
    model.add_argument("--budget", metavar="NAME_OR_FILE", help="memory budget (default: cpu, or h100-80g on a GPU)")
    model.add_argument(
        "--head-map",
        default="full",
        metavar="DIR|full|auto",
        help="head map folder; auto measures the model once and keeps its map (default: full)",
    )
    model.add_argument("--retrieval-ratio", type=SHARE, metavar="R", help="share of KV heads that keep all tokens")
    model.add_argument("--kv-bytes", metavar="SIZE", help=KV_BYTES_HELP)
    model.add_argument(
        "--keep", metavar="N|system", help=f"{KEEP_HELP}; system: as many as the system prompt has (default: the "
        "budget's, else the head map's sinks)",
    )  # fmt: skip
    model.add_argument("--select", metavar="N|P%|off", help=f"{SELECT_HELP} (default: the budget's, else off)")
    model.add_argument("--select-from", metavar="N", help=SELECT_FROM_HELP)
    model.add_argument("--hot-pool", metavar="SIZE|off", help=f"{HOT_POOL_HELP} (default: the budget's, else off)")
    add_prefill_options(model)
    model.add_argument("--kv", choices=KV_FORMATS, help=f"{KV_HELP} (default: the budget's, else {DEFAULT_KV_FORMAT})")
    model.add_argument("--weights", choices=WEIGHT_FORMATS, help="format of weights (default: the budget's)")
    model.add_argument(
        "--chunk-size", type=TOKENS, metavar="N", help="tokens of a prefill step, like 32K (default: the budget's)"
    )
    model.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def load_model(
    args: argparse.Namespace,
    choice: ModelChoice,
    capacity: int | None,
    *,
    marks: int = MARKS,
    serves: bool = False,
    session: Path | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_pin: Callable[[int, int], None] | None = None,
    on_head_map: Callable[[AutoHeadMap], None] | None = None,
    on_tokenizer: Callable[[PreTrainedTokenizerBase | None], object] | None = None,
    system_size: Callable[[PreTrainedTokenizerBase | None], int] | None = None,
) -> Runtime:
    """`longrun.load` with the options of `add_model_options`.

    Args:
        args: the parsed options.
        choice: what --model and --adapter mean.
        capacity: tokens of --ctx, or None.
        marks, serves, session, on_plan, on_pin, on_head_map, on_tokenizer, system_size: see `longrun.load`.

    Raises:
        LongrunError: as `longrun.load`.
    """
    from longrun.model.choice import DEMO_CONTEXT
    from longrun.runtime.load import load

    dense = args.prefill_dense
    if capacity is None and choice.notice is not None:
        capacity = DEMO_CONTEXT
    return load(
        choice.model_dir,
        args.budget,
        args.head_map,
        args.kv,
        args.weights,
        args.device,
        ctx=capacity,
        adapter=choice.adapter,
        yarn=args.yarn,
        retrieval_ratio=args.retrieval_ratio,
        kv_bytes=args.kv_bytes,
        keep=None if args.keep is None else parse_keep(args.keep, "--keep"),
        select=None if args.select is None else parse_select(args.select, "--select"),
        select_from=None if args.select_from is None else parse_select_from(args.select_from, "--select-from"),
        hot_pool=None if args.hot_pool is None else parse_hot_pool(args.hot_pool, "--hot-pool"),
        prefill=args.prefill,
        prefill_share=None
        if args.prefill_share is None
        else parse_prefill_share(args.prefill_share, "--prefill-share"),
        prefill_mass=args.prefill_mass,
        prefill_dense=None if dense is None else parse_dense_tokens(dense, "--prefill-dense"),
        chunk_size=args.chunk_size,
        marks=marks,
        serves=serves,
        session=session,
        on_plan=on_plan,
        on_pin=on_pin,
        on_head_map=on_head_map,
        on_tokenizer=on_tokenizer,
        system_size=system_size,
    )
