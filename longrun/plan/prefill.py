"""Sparse prefill as it is asked for, and the models and page formats that it serves."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from longrun.arguments import choice, real
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError, quoted
from longrun.plan.budget import Budget
from longrun.plan.placement import Placement, PlanSettings
from longrun.quant.kv_format import GPU_HEAD_DIMS, QUANTIZED_KV_FORMATS
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.prefill_spec import (
    EXACT,
    PREFILL_MODES,
    SPARSE,
    PrefillSpec,
    parse_dense_tokens,
    parse_prefill_share,
)

_HELP = "sparse: of a long document most chunks read only the pages that hold most of their attention"
_SHARE_HELP = f"with --prefill sparse: share of the pages that is read (default: {100 * PrefillSpec.cap:g}%%)"
_MASS_HELP = (
    f"with --prefill sparse: of these pages, from {100 * PrefillSpec.least:g}%% on, as few as catch this share of the "
    f"attention, below 1 (default: all of them)"
)
_DENSE_HELP = (
    f"with --prefill sparse: chunks that begin before this token read all (default: {PrefillSpec.dense_tokens:,})"
)


def add_prefill_options(parser: argparse._ActionsContainer) -> None:
    """Add --prefill, --prefill-share, --prefill-mass and --prefill-dense."""
    parser.add_argument("--prefill", choices=PREFILL_MODES, help=f"{_HELP} (default: the budget's, else {EXACT})")
    parser.add_argument("--prefill-share", metavar="SHARE", help=_SHARE_HELP)
    parser.add_argument("--prefill-mass", type=real(0, 1, above=True, below=True), metavar="MASS", help=_MASS_HELP)
    parser.add_argument("--prefill-dense", metavar="TOKENS", help=_DENSE_HELP)


def budget_with_prefill(
    budget: Budget, prefill: PrefillSpec | str | None, share: float | str | None, mass: float | None,
    dense: int | str | None,
) -> Budget:  # fmt: skip
    """The budget where what is given by hand wins over what the file says.

    Args:
        prefill: a mode, or a `PrefillSpec`, which says everything.
        share, mass, dense: `PrefillSpec.cap`, `mass` and `dense_tokens`; share and dense also as text.

    Raises:
        InputError: an unknown mode, a value out of its range, or one that exact reading has no use for.
    """
    if isinstance(prefill, PrefillSpec):
        budget = replace(
            budget, prefill_mode=SPARSE, prefill_share=None, prefill_mass=None, prefill_dense=None, prefill_base=prefill
        )  # fmt: skip
    elif prefill is not None:
        budget = replace(budget, prefill_mode=choice(prefill, "prefill", PREFILL_MODES))
    given = {"prefill_share": share, "prefill_mass": mass, "prefill_dense": dense}
    useless = [name for name, value in given.items() if value is not None]
    if useless and budget.prefill_mode != SPARSE:
        raise InputError(
            f"{useless[0]} {quoted(given[useless[0]])} is for sparse prefill, and texts are read exactly: give prefill "
            f"{SPARSE} as well, or leave it out"
        )
    if share is not None:
        budget = replace(budget, prefill_share=parse_prefill_share(share))
    if mass is not None:
        budget = replace(budget, prefill_mass=PrefillSpec(mass=mass).mass)
    if dense is not None:
        budget = replace(budget, prefill_dense=parse_dense_tokens(dense))
    return budget


def prefill_of(budget: Budget, config: ModelConfig, device_type: str) -> PrefillSpec | None:
    """How the budget reads long documents, for this model; None where it reads them exactly.

    Raises:
        InputError: a GPU's pages of exact numbers, or a head_dim without kernels there.
    """
    if budget.prefill_mode != SPARSE:
        return None
    if device_type == "cuda" and budget.kv_format not in QUANTIZED_KV_FORMATS:
        raise InputError(
            f"prefill {SPARSE} on a GPU needs quantized pages, and those of {budget.kv_format} are exact: use "
            f"kv_format {' or '.join(QUANTIZED_KV_FORMATS)}, or prefill {EXACT}"
        )
    if device_type == "cuda" and config.head_dim not in GPU_HEAD_DIMS:
        served = " or ".join(map(str, GPU_HEAD_DIMS))
        raise InputError(
            f"prefill {SPARSE} on a GPU serves a head_dim of {served}, and the model's is {config.head_dim}: use "
            f"prefill {EXACT}"
        )
    base = budget.prefill_base
    return replace(
        base,
        cap=base.cap if budget.prefill_share is None else budget.prefill_share,
        mass=base.mass if budget.prefill_mass is None else budget.prefill_mass,
        dense_tokens=base.dense_tokens if budget.prefill_dense is None else budget.prefill_dense,
    )


def prefill_notes(settings: PlanSettings, placement: Placement) -> tuple[str, ...]:
    """Why texts are read exactly although sparse prefill was asked for, where they are. A budget may ask for it for the
    contexts that use it."""
    if settings.prefill is None or placement.attention.prefill is not None:
        return ()
    if not placement.cache.keeping_heads:
        why = "no head keeps all tokens, and only those choose pages"
    else:
        spec = settings.prefill
        why = (
            f"chunks before token {spec.dense_tokens:,} and the last {spec.dense_end:,} tokens of a text read all, and "
            f"the context has {placement.capacity:,}"
        )
    return (f"prefill {SPARSE} changes nothing: {why}",)


def prefill_facts(attention: AttentionSpec) -> dict[str, Any] | None:
    """How a plan reads long documents, as results record it: JSON types, None for exactly."""
    return None if attention.prefill is None else asdict(attention.prefill)
