"""Plan a checkpoint of the Llama family, then load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longrun.allocation import failed_allocations, return_freed_memory
from longrun.arguments import callback, check_platform, choice, flag, number
from longrun.cache.pinned_pool import PinnedMemory
from longrun.config.gguf_header import gguf_file
from longrun.config.key_biases import read_key_biases
from longrun.config.model_config import ModelConfig
from longrun.hub.find import find_model
from longrun.kernels.cpu_gguf import gguf_dequantizer
from longrun.kernels.cpu_kernels import load_cpu_kernels
from longrun.kernels.cpu_library import built_or_none
from longrun.machine.host_memory import resident_bytes
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder
from longrun.model.fingerprint import model_fingerprint
from longrun.model.folder import ModelFolder, check_folder
from longrun.paths import user_path
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import SYSTEM, Budget
from longrun.plan.hot_pool import parse_hot_pool
from longrun.plan.kernels import check_kernel_shapes
from longrun.plan.plan import ChosenSplit, Plan, choose_split, make_plan
from longrun.plan.prefill import budget_with_prefill
from longrun.plan.selection import parse_select, parse_select_from
from longrun.plan.split import budget_by_hand, parse_keep
from longrun.runtime import gpu_checks
from longrun.runtime.auto_head_map import DEFAULT_RATIO, AutoHeadMap, assumed_losses, auto_head_map, kept_folder
from longrun.runtime.backend import Parts
from longrun.runtime.head_map_check import other_model_notices
from longrun.runtime.memory_checks import check_free_memory, library_notice
from longrun.runtime.runtime import Runtime
from longrun.runtime.setup import Setup
from longrun.runtime.shared import Shared
from longrun.session.manifest import SessionIdentity
from longrun.session.store import SavedSession, is_session, saved_keep, saved_reaches
from longrun.specs.cache_spec import MARKS
from longrun.specs.model_bytes import TOKEN_SLICES
from longrun.specs.prefill_spec import PrefillSpec
from longrun.units import parse_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@failed_allocations("while the model was loaded")
def load(
    model_dir: str | Path,
    budget: Budget | str | Path | None = None,
    head_map: HeadMap | str | Path | None = "full",
    kv_format: str | None = None,
    weight_format: str | None = None,
    device: str | None = None,
    *,
    ctx: int | str | None = None,
    adapter: str | Path | None = None,
    yarn: float | None = None,
    retrieval_ratio: float | None = None,
    kv_bytes: int | str | None = None,
    keep: int | str | None = None,
    select: int | str | None = None,
    select_from: int | None = None,
    hot_pool: int | str | None = None,
    prefill: PrefillSpec | str | None = None,
    prefill_share: float | str | None = None,
    prefill_mass: float | None = None,
    prefill_dense: int | str | None = None,
    chunk_size: int | None = None,
    device_share: float = 1.0,
    compiled_kernels: bool = True,
    marks: int = MARKS,
    serves: bool = False,
    session: str | Path | None = None,
    download: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_pin: Callable[[int, int], None] | None = None,
    on_head_map: Callable[[AutoHeadMap], None] | None = None,
    on_tokenizer: Callable[[PreTrainedTokenizerBase | None], object] | None = None,
    system_size: Callable[[PreTrainedTokenizerBase | None], int] | None = None,
) -> Runtime:
    """Plan, then load a checkpoint of the Llama family.

    Args:
        model_dir: Hugging Face checkpoint folder (config.json and safetensors), a GGUF file, or a name on the hub,
            like `user/repo`: found in the local cache, or fetched with `download`.
        budget: name of a shipped budget, TOML file or `Budget`; default: `cpu` on the CPU, on a GPU the largest
            shipped one that the card's memory holds.
        head_map: folder in DuoAttention's format, `HeadMap`, "full" (also None): every head keeps every token, or
            "auto": the map of this model with this adapter, measured on the first call and kept (see
            `longrun.runtime.auto_head_map`), with `kv_bytes` one that has reach losses. A notice says so where a map
            was made for another model.
        kv_format: "int4", "k5v3", "bf16" or "fp32"; default: the budget's (k5v3 where it says nothing).
        weight_format: "fp32", "bf16", "int8", "nf4" or "int4"; default: the budget's.
        device: "cpu" or "cuda"; default: cuda where there is one.
        ctx: tokens to plan for; default: the model's trained window (the adapter's, where it names one), or
            what fits of it.
        adapter: folder of a LoRA adapter in peft's format, added to the weights while they are loaded.
        yarn: factor above 1 by which YaRN stretches the trained window of a model without RoPE scaling of its own, as
            if its config.json said so. Head map "auto" is measured without it.
        retrieval_ratio: share of the heads of `head_map` to keep; default: the budget's, else scores of at least 0.5
            (with "auto" a ratio of 0.5).
        kv_bytes: instead of a ratio, the bytes (or a text like "8 GB", or "25%" of full attention's) that keys and
            values may take at `ctx` tokens, from which follows how far each head reaches; needs `ctx` and a head map
            with reach losses, such as "auto". Default: the budget's.
        keep: first tokens of the text that no head drops, whatever its window or reach; 0 for the head map's sinks
            alone. "system" is what `system_size` says. Default: the budget's.
        select: pages of every retrieval head that a decode step reads, at most, or a share of those that it holds then,
            like "25%" (no fewer than 64): those that fit its query; "off" for all. It changes nothing of how texts are
            read. Default: the budget's (off where it says nothing).
        select_from: pages that a head which keeps all tokens must hold for steps to select; below so many all are read.
            0: always. Default: the budget's, else from where selecting saves time.
        hot_pool: bytes (or a text like "2 GB") of a GPU's memory that keep the host pages which `select` chose lately;
            "off": they are read in place, as they are elsewhere. Changes no answer. Default: the budget's, else off.
        prefill: "sparse", or a `PrefillSpec`: of a long document most chunks read only the pages of the past that hold
            most of their attention; "exact": all. Default: the budget's (exact where it says nothing).
        prefill_share, prefill_mass, prefill_dense: with "sparse", `PrefillSpec.cap` (also a text like "25%"), `mass`
            and `dense_tokens` (also a text like "64K"). Default: the budget's.
        chunk_size: the most tokens of one prefill step; default: the budget's.
        device_share: the most of a retrieval head's pages that may stand in the device pool (0 to 1); below 1 the
            rest goes to the host pool although the device has room.
        compiled_kernels: use the compiled kernels of the CPU or the GPU; False runs plain torch.
        download: fetch a model of the Hugging Face hub that is not in the local cache.
        marks: points of a session to come back to (`Session.mark`) that get memory of their own; with `kv_bytes`
            always 2, as each of them holds pages back.
        serves: for `longrun.server`: the plan counts what a server holds besides.
        session: folder of a session that will be loaded: where it is damaged, or was saved with another model, head
            split or format, it is refused before the first weight is read. A folder without a session is no error.
            With `kv_bytes` its reaches are kept, whatever the bytes and `ctx`; and always its `keep`.
        on_plan: shown the plan before the first weight is read.
        on_pin: called with (bytes pinned, bytes in all) while a session pins its host pool, on cuda only.
        on_tokenizer: shown the tokenizer before the first weight is read; what it raises goes through.
        on_head_map: called with the map of "auto" and the progress of measuring it; without it a notice says where the
            map is kept.
        system_size: tokens before the first message of a chat; called with the tokenizer where `keep` is "system".

    Raises:
        PlanError: the budget or the machine's free memory cannot hold it; nothing has been loaded.
        CheckpointError, ConfigError, HeadMapError, InputError, SessionError: a file, an argument or the GPU cannot be
            used.
    """
    check_platform()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = choice(device, "device", ("cpu", "cuda"))
    if device_type == "cuda":
        gpu_checks.check_gpu()
    device_share = number(device_share, "device_share", 0, 1)
    flag(compiled_kernels, "compiled_kernels")
    for name, called in (
        ("on_plan", on_plan),
        ("on_pin", on_pin),
        ("on_tokenizer", on_tokenizer),
        ("on_head_map", on_head_map),
        ("system_size", system_size),
    ):
        callback(called, name)
    capacity = None if ctx is None else parse_tokens(ctx, "ctx")
    flag(download, "download")
    folder = find_model(model_dir, download, what="model_dir", consent="download=True", ask=False)
    config = ModelConfig.from_dir(folder).stretched(yarn)
    key_biases = read_key_biases(folder, config)
    lora = None if adapter is None else Adapter.open(user_path(adapter, "adapter"), config)
    if lora is not None:
        config = lora.adapted_config(config)
    if budget is None:
        budget = gpu_checks.default_budget(device_type)
    limits = budget if isinstance(budget, Budget) else Budget.load(budget)
    limits = limits.override(kv_format=kv_format, weight_format=weight_format, chunk_size=chunk_size)
    limits = budget_by_hand(limits, retrieval_ratio, kv_bytes)
    limits = limits.override(
        keep=None if keep is None else parse_keep(keep),
        pages_per_head=None if select is None else parse_select(select),
        select_from=None if select_from is None else parse_select_from(select_from),
        hot_pool=None if hot_pool is None else parse_hot_pool(hot_pool),
    )
    limits = budget_with_prefill(limits, prefill, prefill_share, prefill_mass, prefill_dense)
    limits, session_notices = _with_keep_of(session, limits)
    if limits.kv_bytes is not None:
        marks = MARKS
    if device_type == "cuda":
        gpu_checks.check_budget(limits)
        if compiled_kernels:
            check_kernel_shapes(config, limits)

    def plan_for(chosen: ChosenSplit) -> Plan:
        return make_plan(
            config, limits, capacity, split=chosen, device_type=device_type, device_share=device_share,
            gpu_kernels=compiled_kernels, key_biases=key_biases, marks=marks, serves=serves,
        )  # fmt: skip

    checked, auto_notices = None, []
    if limits.keep == SYSTEM and system_size is not None:
        checked = check_folder(folder, config, lora)
        limits = replace(limits, keep=system_size(checked.tokenizer))
    reaches = None
    if limits.kv_bytes is not None and session is not None:
        reaches = saved_reaches(user_path(session, "session"))
    if isinstance(head_map, str) and head_map == "auto":
        method = "reconstruction" if limits.kv_bytes is None else "reach"
        if retrieval_ratio is None and limits.kv_bytes is None:
            retrieval_ratio = DEFAULT_RATIO if limits.retrieval_ratio is None else limits.retrieval_ratio
        if not kept_folder(folder, lora, method, device_type).exists():  # what does not fit is refused before measuring
            assumed = None if limits.kv_bytes is None else assumed_losses(config, device_type)
            plan_for(
                choose_split(
                    config, limits, assumed, retrieval_ratio, assume=True, capacity=capacity, session_reaches=reaches
                )
            )
        checked = checked or check_folder(folder, config, lora)
        head_map = auto_head_map(folder, device_type, on_head_map, lora, method)
        if on_head_map is None:
            auto_notices.append(f"head map auto was measured on this model and is kept in {head_map}")
    chosen = choose_split(config, limits, head_map, retrieval_ratio, capacity=capacity, session_reaches=reaches)
    plan = plan_for(chosen)
    if on_plan is not None:
        on_plan(plan)
    check_free_memory(plan)
    checked = checked or check_folder(folder, config, lora)
    if on_tokenizer is not None:
        on_tokenizer(checked.tokenizer)
    identity = SessionIdentity(
        model_fingerprint(folder, lora), chosen.split.hash, plan.kv_format, plan.page_size, plan.weight_format,
        None if limits.kv_bytes is None else chosen.split.all_reaches, config.yarn, chosen.keep,
        plan.attention.selection,
    )  # fmt: skip
    if session is not None and is_session(user_path(session, "session")):
        SavedSession.open(session, identity)
    parts, shared, model_notices = load_parts(checked, chosen.split, plan, compiled_kernels, on_pin)
    given = head_map is not None and head_map != "full"
    origin = other_model_notices(chosen.head_map, identity.model, folder, lora and lora.folder)
    return Runtime(
        Setup(
            checked, limits, chosen, plan, identity, parts, shared, device_share, compiled_kernels,
            model_notices=(*checked.notices, *model_notices),
            split_notices=(*(chosen.notes if given else ()), *session_notices, *auto_notices, *origin),
            key_biases=key_biases, marks=marks, serves=serves,
        )
    )  # fmt: skip


def _with_keep_of(session: str | Path | None, budget: Budget) -> tuple[Budget, tuple[str, ...]]:
    """The budget with the `keep` of a saved session, where there is one, and what a person should know of that."""
    if session is None or not is_session(user_path(session, "session")):
        return budget, ()
    saved = saved_keep(user_path(session, "session"))
    said: tuple[str, ...] = ()
    if budget.keep not in (None, saved, SYSTEM):
        made = "no first tokens but the sinks" if saved is None else f"the first {saved:,} tokens"
        said = (f"the session keeps {made}, as it was made: keep {budget.keep:,} changes nothing in it",)
    return replace(budget, keep=saved), said


def load_parts(
    checked: ModelFolder, split: HeadSplit, plan: Plan, compiled_kernels: bool,
    on_pin: Callable[[int, int], None] | None = None,
) -> tuple[Parts, Shared, list[str]]:  # fmt: skip
    """Read the weights, heads in the order of `split`, and compile the kernels that go with them.

    Args:
        compiled_kernels, on_pin: see `load`.

    Returns:
        What all sessions use, what runtimes over these weights share, and sentences for a person.

    Raises:
        CheckpointError, ConfigError: a weight cannot be read, or a GPU kernel not be compiled.
    """
    before, config, device = resident_bytes(), checked.config, torch.device(plan.device_type)
    notices: list[str] = []
    cpu_kernels = gguf_kernel = None
    if compiled_kernels and plan.device_type == "cpu":
        cpu_kernels = built_or_none(load_cpu_kernels, "plain torch is used, which decodes slower", notices)
    if compiled_kernels and gguf_file(checked.path) is not None:
        gguf_kernel = gguf_dequantizer(notices)
    shared = Shared()
    gpu_kernels = shared.gpu_kernels(plan) if plan.attention.fused else None
    decoder = load_decoder(
        checked.path, config, [split.permutation(layer_idx) for layer_idx in range(config.num_layers)],
        plan.weight_format, device, TOKEN_SLICES[plan.device_type], gpu_kernels, checked.adapter,
        *((None, None) if cpu_kernels is None else (cpu_kernels.linear, cpu_kernels.int4.quantize)),
        dequantize_gguf=gguf_kernel and gguf_kernel.by_type,
    )  # fmt: skip
    shared.add_decoder(decoder)
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    notices += library_notice(plan, before)
    if checked.tokenizer is None:
        notices.append(f"{checked.path} has no tokenizer: only token ids can be used")
    rotary = checked.rotary if plan.device_type == "cpu" else checked.rotary.to(device)
    pinned = PinnedMemory(on_pin) if plan.device_type == "cuda" else None
    return Parts(decoder, rotary, checked.rotary, cpu_kernels, gpu_kernels, pinned), shared, notices
