"""A loaded model with its plan: makes sessions."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longrun.allocation import failed_allocations
from longrun.arguments import callback, check_platform, choice, flag, number
from longrun.cache.pinned_pool import PinnedMemory
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError, quoted, short_path
from longrun.kernels.cpu_pages import CpuPageKernels, KernelUnavailable
from longrun.machine.host_memory import resident_bytes
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder, model_fingerprint
from longrun.model.folder import ModelFolder, check_folder
from longrun.paths import cache_dir, user_path
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.budget import Budget
from longrun.plan.kernels import check_kernel_shapes
from longrun.plan.plan import ChosenSplit, Plan, choose_split, make_plan
from longrun.runtime import gpu_checks
from longrun.runtime.auto_head_map import DEFAULT_RATIO, AutoHeadMap, auto_head_map, kept_folder
from longrun.runtime.backend import Parts, build_engine
from longrun.runtime.head_map_check import other_model_notices
from longrun.runtime.memory_checks import check_free_memory, library_notice
from longrun.session.manifest import SessionIdentity
from longrun.session.session import Session
from longrun.session.store import SavedSession, is_session
from longrun.specs.model_bytes import TOKEN_SLICES
from longrun.text.documents import check_text
from longrun.text.encoder import TextEncoder, leading_ids
from longrun.text.stream import AnswerText, text_pieces
from longrun.units import parse_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.kernels.gpu_kernels import GpuKernels


_UNFUSED = "the GPU kernels are for int4 and k5v3 pages; this run uses plain torch there, which is slower"


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
    retrieval_ratio: float | None = None,
    chunk_size: int | None = None,
    device_share: float = 1.0,
    compiled_kernels: bool = True,
    session: str | Path | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_pin: Callable[[int, int], None] | None = None,
    on_head_map: Callable[[AutoHeadMap], None] | None = None,
    on_tokenizer: Callable[[PreTrainedTokenizerBase | None], object] | None = None,
) -> Runtime:
    """Plan, then load a checkpoint of the Llama family.

    Args:
        model_dir: Hugging Face checkpoint folder (config.json and safetensors).
        budget: name of a shipped budget, TOML file or `Budget`; default: `cpu` on the CPU, on a GPU the largest
            shipped one that the card's memory holds.
        head_map: folder in DuoAttention's format, `HeadMap`, "full" (also None): every head keeps every token, or
            "auto": the map of this model with this adapter, measured on the first call and kept (see
            `longrun.runtime.auto_head_map`). Where a map says that it was made for another model, a notice does.
        kv_format: "int4", "k5v3", "bf16" or "fp32"; default: the budget's (k5v3 where it says nothing).
        weight_format: "fp32", "bf16", "int8", "nf4" or "int4"; default: the budget's.
        device: "cpu" or "cuda"; default: cuda where there is one.
        ctx: capacity to plan for, tokens; default: the model's trained window (the adapter's, where it names one), or
            what fits of it.
        adapter: folder of a LoRA adapter in peft's format, added to the weights while they are loaded.
        retrieval_ratio: share of the heads of `head_map` to keep; default: the budget's, else scores of at least 0.5
            (with "auto" a ratio of 0.5).
        chunk_size: the most tokens of one prefill step; default: the budget's.
        device_share: the most of a retrieval head's pages that may stand in the device pool (0 to 1); below 1 the
            rest goes to the host pool although the device has room.
        compiled_kernels: use the compiled kernels of the CPU or the GPU; False runs plain torch.
        session: folder of a session that will be loaded: where it is damaged, or was saved with another model, head
            split or format, that is heard of before the first weight is read. A folder without a session is no error.
        on_plan: shown the plan before the first weight is read.
        on_pin: called with (bytes pinned, bytes in all) while a session pins its host pool, on cuda only.
        on_tokenizer: shown the tokenizer before the first weight is read; what it raises goes through.
        on_head_map: told of the map of "auto" and of the progress of measuring it; without it a notice says where the
            map is kept.

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
    ):
        callback(called, name)
    ctx = None if ctx is None else parse_tokens(ctx, "ctx")
    folder = user_path(model_dir, "model_dir")
    config = ModelConfig.from_dir(folder)
    lora = None if adapter is None else Adapter.open(user_path(adapter, "adapter"), config)
    if lora is not None:
        config = lora.adapted_config(config)
    if budget is None:
        budget = gpu_checks.default_budget(device_type)
    limits = budget if isinstance(budget, Budget) else Budget.load(budget)
    limits = limits.override(kv_format=kv_format, weight_format=weight_format, chunk_size=chunk_size)
    if device_type == "cuda":
        gpu_checks.check_budget(limits)
        if compiled_kernels:
            check_kernel_shapes(config, limits)

    def plan_for(chosen: ChosenSplit) -> Plan:
        return make_plan(
            config, limits, ctx, split=chosen, device_type=device_type, device_share=device_share,
            gpu_kernels=compiled_kernels,
        )  # fmt: skip

    checked, auto_notices = None, []
    if isinstance(head_map, str) and head_map == "auto":
        if retrieval_ratio is None:
            retrieval_ratio = DEFAULT_RATIO if limits.retrieval_ratio is None else limits.retrieval_ratio
        if not kept_folder(folder, lora).exists():  # what does not fit is refused before the map is measured
            plan_for(choose_split(config, limits, None, retrieval_ratio, assume=True))
        checked = check_folder(folder, config, lora)
        head_map = auto_head_map(folder, device_type, on_head_map, lora)
        if on_head_map is None:
            auto_notices.append(f"head map auto was measured on this model and is kept in {head_map}")
    chosen = choose_split(config, limits, head_map, retrieval_ratio)
    plan = plan_for(chosen)
    if on_plan is not None:
        on_plan(plan)
    check_free_memory(plan)
    checked = checked or check_folder(folder, config, lora)
    if on_tokenizer is not None:
        on_tokenizer(checked.tokenizer)
    identity = SessionIdentity(
        model_fingerprint(folder, lora), chosen.split.hash, plan.kv_format, plan.page_size, plan.weight_format
    )
    if session is not None and is_session(user_path(session, "session")):
        SavedSession.open(session, identity)
    given = head_map is not None and head_map != "full"
    notices = [*plan.warnings, *(chosen.notes if given else ()), *auto_notices, *checked.notices]
    return Runtime(checked, limits, chosen, plan, identity, device_share, compiled_kernels, notices, on_pin)


class Runtime:
    """A model in memory. Made by `load`.

    Attributes:
        config: shape of the model.
        split: which KV heads are retrieval heads.
        plan: the memory plan, of the newest session or of the context asked for at load.
        tokenizer: transformers' tokenizer, or None where the folder has none.
        eos_token_ids: what ends a generation: the tokens that generation_config.json, config.json and the tokenizer
            name, and the one that the chat template puts behind an answer.
        notices: sentences that a person should be shown once.
    """

    def __init__(
        self, checked: ModelFolder, budget: Budget, chosen: ChosenSplit, plan: Plan, identity: SessionIdentity,
        device_share: float, compiled_kernels: bool, notices: list[str],
        on_pin: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        before = resident_bytes()
        folder, config, adapter = checked.path, checked.config, checked.adapter
        self.model_dir, self.config, self.plan = folder, config, plan
        self.tokenizer, self.eos_token_ids = checked.tokenizer, checked.eos_token_ids
        self.split: HeadSplit = chosen.split
        self.notices = notices
        self._budget, self._chosen, self._device_share = budget, chosen, device_share
        self._compiled_kernels = compiled_kernels
        self._compiled = False  # until the first session is made
        self._device = torch.device(plan.device_type)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        cpu_kernels = self._build_cpu_kernels() if compiled_kernels and plan.device_type == "cpu" else None
        gpu_kernels = self._build_gpu_kernels() if plan.attention.fused else None
        if plan.device_type == "cuda" and not plan.attention.fused:
            self.notices.append(_UNFUSED)
        permutation = [self.split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
        decoder = load_decoder(
            folder, config, permutation, plan.weight_format, self._device, TOKEN_SLICES[plan.device_type], gpu_kernels,
            adapter,
        )  # fmt: skip
        _return_freed_memory(self._device)
        self.notices += library_notice(plan, before)
        rotary_host = checked.rotary
        rotary = rotary_host if plan.device_type == "cpu" else rotary_host.to(self._device)
        pinned = PinnedMemory(on_pin) if plan.device_type == "cuda" else None
        self._parts = Parts(decoder, rotary, rotary_host, cpu_kernels, gpu_kernels, pinned)
        if self.tokenizer is None:
            self.notices.append(f"{folder} has no tokenizer: only token ids can be used")
        self.notices += other_model_notices(chosen.head_map, identity.model, folder, adapter and adapter.folder)
        self._identity = identity

    def _build_gpu_kernels(self) -> GpuKernels:
        from longrun.kernels.gpu_kernels import load_gpu_kernels

        return load_gpu_kernels(self.config.head_dim, self.plan.kv_format)

    def _build_cpu_kernels(self) -> CpuPageKernels | None:
        try:
            folder = cache_dir() / "kernels"
        except InputError as error:
            self.notices.append(f"{error}: until then the CPU kernels are compiled at every start")
            folder = None
        try:
            kernels = CpuPageKernels(folder)
        except KernelUnavailable as error:
            self.notices.append(f"compiled CPU kernels are off ({error}): plain torch is used, which decodes slower")
            return None
        self.notices += kernels.notices
        return kernels

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids of a text, in which a control token's spelling is only text.

        Args:
            begins: it stands at the beginning of the sequence and gets what the tokenizer puts there (many put a
                begin-of-sequence token).

        Raises:
            InputError: the model has no tokenizer, or `text` is no str, or holds lone surrogates.
        """
        if not isinstance(text, str):
            raise InputError(f"text {quoted(text)} is not a str: give one")
        check_text(text, "text")
        tokenizer = self._tokenizer_for("text becomes tokens")
        return (leading_ids(tokenizer) if begins else []) + TextEncoder(tokenizer).ids(text)

    def stream(
        self,
        session: Session,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue the session and yield the text as it comes: whole characters, without control tokens.

        Args:
            session: one of this runtime's.
            stop: the text ends before the first of these strings; the spelling of a control token is one as well.
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed: see `Session.generate`.

        Raises:
            InputError: as `Session.generate`, for an empty stop string or one that is no text, for another runtime's
                session, or because the model has no tokenizer; at the call, not at the first piece.
            ContextFullError: the capacity is used up; what was said until then has been yielded.
        """
        if session not in self._sessions:
            raise InputError(f"{quoted(session)} is no session of this runtime: make one with its new_session()")
        text = AnswerText(self._tokenizer_for("tokens become text"), stop)
        tokens = session.generate(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
        return text_pieces(tokens, self.eos_token_ids, text)

    def _tokenizer_for(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError(f"{short_path(self.model_dir)} has no tokenizer, with which {what}: add its files")
        return self.tokenizer

    def new_session(self, capacity: int | str | None = None) -> Session:
        """An empty session; its cache is allocated now, and nothing grows afterwards.

        Args:
            capacity: tokens, default the plan's context.

        Raises:
            PlanError: it does not fit in the budget beside the sessions that are alive, or in free memory.
        """
        capacity = self.plan.ctx if capacity is None else parse_tokens(capacity, "capacity")
        plan = self.plan
        if capacity != plan.ctx or self._sessions or any(item.name == "reserved" for item in plan.items):
            alive = [session.plan for session in self._sessions]
            on_device = sum(
                sum(p.cache.device_bytes().values()) + p.attention.scratch_bytes() + p.attention.decode_bytes()
                for p in alive
            )
            on_host = sum(sum(p.cache.host_bytes().values()) for p in alive)
            budget = self._budget.override(host_bytes=max(0, self._budget.host_bytes - on_host))
            plan = make_plan(
                self.config, budget, capacity, split=self._chosen, device_type=self._device.type,
                reserved_bytes=on_device, device_share=self._device_share, gpu_kernels=self._compiled_kernels,
            )  # fmt: skip
        pinned = self._parts.pinned
        check_free_memory(plan, True, self._compiled, 0 if pinned is None else pinned.kept_bytes)
        with failed_allocations("while a session was made"):
            engine = build_engine(self._parts, plan)
        self.notices += [text for text in plan.warnings if text not in self.notices]
        self.plan, self._compiled = plan, True
        session = Session(engine, plan, self._identity, self.eos_token_ids)
        self._sessions.add(session)
        return session

    def load_session(self, path: str | Path, capacity: int | str | None = None) -> Session:
        """A session saved by `Session.save`, ready for the very next token.

        Args:
            path: its folder; later saves to the same folder write only what is new. Another session may own it: then
                this one is a copy that can be saved elsewhere.
            capacity: tokens; default as it was saved.

        Raises:
            SessionError: no session there, damaged files, or one of another model, head split or format.
            PlanError: it does not fit in the budget, or in free memory.
        """
        saved = SavedSession.open(path, self._identity)
        capacity = saved.capacity if capacity is None else parse_tokens(capacity, "capacity")
        if capacity < saved.seq_len:
            raise InputError(
                f"session {path} holds {saved.seq_len:,} tokens, more than the {capacity:,} asked for: give a larger "
                f"context"
            )
        session = self.new_session(capacity)
        with failed_allocations("while a session was loaded"):
            session.adopt_store(saved.restore(session))
        return session


def _return_freed_memory(device: torch.device) -> None:
    """Give the loader's freed temporaries back to the system: glibc keeps them (200 MB were seen with nf4), and the
    plan does not count them. Other C libraries have no such call and no such habit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
