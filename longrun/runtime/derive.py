"""A runtime made from another one: other heads, pages or chunks over weights that are in memory already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longrun.allocation import failed_allocations
from longrun.arguments import number
from longrun.errors import InputError
from longrun.model.reorder import reordered, reordered_bytes
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.kernels import check_kernel_shapes
from longrun.plan.plan import choose_split
from longrun.plan.prefill import budget_with_prefill
from longrun.plan.split import budget_by_hand
from longrun.runtime.head_map_check import other_model_notices
from longrun.runtime.memory_checks import check_free_memory
from longrun.runtime.setup import Setup
from longrun.specs.prefill_spec import PrefillSpec


@failed_allocations("while a runtime was derived")
def derived(
    setup: Setup, head_map: HeadMap | HeadSplit | str | Path | None, retrieval_ratio: float | None,
    kv_bytes: int | str | None, kv_format: str | None, chunk_size: int | None, capacity: int, keep: int | None,
    select: int | str | None, select_from: int | None, hot_pool: int | str | None, prefill: PrefillSpec | str | None,
    prefill_share: float | str | None, prefill_mass: float | None, prefill_dense: int | str | None,
    device_share: float | None,
) -> Setup:  # fmt: skip
    """`setup` with what is given in place of its own; see `Runtime.derive`.

    Raises:
        ConfigError, HeadMapError, InputError, PlanError: as `Runtime.derive`; nothing has been copied.
    """
    config, decoder = setup.model.config, setup.parts.decoder
    budget = setup.budget.override(
        kv_format=kv_format, chunk_size=chunk_size, keep=keep, pages_per_head=select, select_from=select_from,
        hot_pool=hot_pool,
    )  # fmt: skip
    budget = budget_with_prefill(budget, prefill, prefill_share, prefill_mass, prefill_dense)
    if setup.plan.device_type == "cuda" and setup.compiled_kernels:
        check_kernel_shapes(config, budget)
    share = setup.device_share if device_share is None else number(device_share, "device_share", 0, 1)
    wanted = setup = replace(setup, budget=budget, device_share=share)
    if head_map is not None or retrieval_ratio is not None or kv_bytes is not None:
        budget = budget_by_hand(replace(budget, kv_bytes=None), retrieval_ratio, kv_bytes)
        wanted = _with_split(replace(setup, budget=budget), head_map, retrieval_ratio, capacity)
    elif keep is not None:
        wanted = replace(wanted, chosen=setup.chosen.keeping(keep))
    split = wanted.chosen.split
    orders = [split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
    copied = reordered_bytes(decoder, orders)
    plan = wanted.plan_session(capacity, copied)
    pinned = setup.parts.pinned
    check_free_memory(plan, True, setup.shared.compiled, 0 if pinned is None else pinned.kept_bytes, copied)
    kernels = setup.shared.gpu_kernels(plan) if plan.attention.fused else None
    decoder = reordered(decoder, orders, kernels)
    setup.shared.add_decoder(decoder)
    return replace(
        wanted,
        plan=plan,
        identity=replace(
            setup.identity,
            head_split=split.hash,
            kv_format=plan.kv_format,
            reaches=None if budget.kv_bytes is None and not split.reaches else split.all_reaches,
            keep=wanted.chosen.keep,
            selection=plan.attention.selection,
        ),
        parts=replace(setup.parts, decoder=decoder, gpu_kernels=kernels),
    )


def _with_split(
    setup: Setup, head_map: HeadMap | HeadSplit | str | Path | None, retrieval_ratio: float | None, capacity: int
) -> Setup:
    """With the split of `head_map`, or else with another ratio or bytes of its own map; and notices about it."""
    if isinstance(head_map, str) and head_map == "auto":
        raise InputError(
            "head map auto is measured before a model is loaded: give it to longrun.load, or give the folder in which "
            "its map is kept"
        )
    own = setup.chosen
    if head_map is None:
        head_map = "full" if own.even else own.head_map
    model = setup.model
    chosen = choose_split(model.config, setup.budget, head_map, retrieval_ratio, capacity=capacity)
    notes = () if head_map == "full" else chosen.notes
    folder = model.adapter and model.adapter.folder
    origin = other_model_notices(chosen.head_map, setup.identity.model, model.path, folder)
    return replace(setup, chosen=chosen, split_notices=(*notes, *origin))
