"""A loaded model with its plan: makes sessions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.allocation import failed_allocations
from longrun.arguments import check_text
from longrun.engine.engine import Engine
from longrun.errors import InputError, quoted, short_path
from longrun.patterns.head_map import HeadMap, HeadSplit
from longrun.plan.hot_pool import parse_hot_pool
from longrun.plan.selection import parse_select, parse_select_from
from longrun.plan.split import parse_keep
from longrun.runtime.backend import build_engine
from longrun.runtime.derive import derived
from longrun.runtime.memory_checks import check_free_memory
from longrun.runtime.setup import Setup
from longrun.session.session import Session
from longrun.session.store import SavedSession
from longrun.specs.prefill_spec import PrefillSpec
from longrun.text.encoder import TextEncoder, leading_ids
from longrun.text.json_answers import JsonAnswers, JsonRule, response_schema
from longrun.text.stream import AnswerText, text_pieces
from longrun.units import parse_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Runtime:
    """A model in memory. Made by `longrun.load`, or by `derive` from another one.

    Attributes:
        config: shape of the model.
        split: which KV heads are retrieval heads.
        parts: weights, RoPE tables and kernels, which all sessions use.
        identity: what a saved session must have been made with.
        plan: the memory plan, of the newest session or of the context asked for at load.
        tokenizer: transformers' tokenizer, or None where the folder has none.
        eos_token_ids: what ends a generation: the tokens that generation_config.json, config.json and the tokenizer
            name, and the one that the chat template puts behind an answer.
        notices: sentences that a person should be shown once.
    """

    def __init__(self, setup: Setup) -> None:
        model = setup.model
        self.model_dir, self.config, self.plan = model.path, model.config, setup.plan
        self.tokenizer, self.eos_token_ids = model.tokenizer, model.eos_token_ids
        self.split, self.parts, self.identity = setup.chosen.split, setup.parts, setup.identity
        self.notices = setup.notices
        self._setup = setup
        self._json_answers: JsonAnswers | None = None
        self._engines: weakref.WeakKeyDictionary[Session, Engine] = weakref.WeakKeyDictionary()

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
        min_p: float = 0.0,
        response_format: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Continue the session and yield the text as it comes: whole characters, without control tokens.

        Args:
            session: one of this runtime's.
            stop: the text ends before the first of these strings; the spelling of a control token is one as well.
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, min_p: see `Session.generate`.
            response_format: see `json_rule`.

        Raises:
            InputError: as `Session.generate`, for an empty stop string or one that is no text, for another runtime's
                session, or because the model has no tokenizer; at the call, not at the first piece.
            ContextFullError: the capacity is used up; what was said until then has been yielded.
        """
        self.engine(session)
        text = AnswerText(self._tokenizer_for("tokens become text"), stop)
        rule = self.json_rule(response_format)
        tokens = session.generate(
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, min_p=min_p, rule=rule
        )
        return text_pieces(tokens, self.eos_token_ids, text)

    def json_rule(self, response_format: Mapping[str, Any] | None) -> JsonRule | None:
        """What makes one answer JSON, for `Session.generate`; None for any text.

        Args:
            response_format: as in OpenAI's API: {"type": "json_schema", "json_schema": {"schema": {...}}},
                {"type": "json_object"} or {"type": "text"}.

        Raises:
            InputError: it is none of these, its schema is none or asks for what llguidance does not support, or the
                model has no tokenizer that llguidance knows.
            LongrunError: llguidance is not installed.
        """
        schema = response_schema(response_format)
        if schema is None:
            return None
        if self._json_answers is None:
            tokenizer = self._tokenizer_for("tokens become JSON")
            self._json_answers = JsonAnswers(tokenizer, self.config.vocab_size, self.eos_token_ids)
        return self._json_answers.rule(schema)

    def _tokenizer_for(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError(f"{short_path(self.model_dir)} has no tokenizer, with which {what}: add its files")
        return self.tokenizer

    def new_session(self, capacity: int | str | None = None) -> Session:
        """An empty session; its cache is allocated now, and nothing grows afterwards.

        Args:
            capacity: tokens, default the plan's context.

        Raises:
            PlanError: it does not fit in what is left of the budget by this runtime and those over the same
                weights, or in free memory.
        """
        capacity = self.plan.capacity if capacity is None else parse_tokens(capacity, "capacity")
        plan, shared, pinned = self.plan, self._setup.shared, self.parts.pinned
        if capacity != plan.capacity or any(self._setup.taken()) or any(item.name == "reserved" for item in plan.items):
            plan = self._setup.plan_session(capacity)
        check_free_memory(plan, True, shared.compiled, 0 if pinned is None else pinned.kept_bytes)
        with failed_allocations("while a session was made"):
            engine = build_engine(self.parts, plan)
        self.notices += [text for text in plan.warnings if text not in self.notices]
        self.plan, shared.compiled = plan, True
        session = Session(engine, plan, self.identity, self.eos_token_ids)
        self._engines[session] = engine
        shared.add_session(session)
        return session

    def engine(self, session: Session) -> Engine:
        """What runs the session's steps, for measuring their parts.

        Raises:
            InputError: it is another runtime's session.
        """
        if session not in self._engines:
            raise InputError(f"{quoted(session)} is no session of this runtime: make one with its new_session()")
        return self._engines[session]

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
        saved = SavedSession.open(path, self.identity)
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

    def derive(
        self,
        split: HeadMap | HeadSplit | str | Path | None = None,
        kv_format: str | None = None,
        chunk_size: int | None = None,
        *,
        ctx: int | str | None = None,
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
        device_share: float | None = None,
    ) -> Runtime:
        """Another runtime over the same weights, in a moment: what is not given stays as it is here.

        It answers as one that was loaded with these settings, and a session that either saves opens in the other. Where
        the split puts heads into another order, the q, k, v and output projections of those layers are copied; all
        other weights are shared. This runtime stays as it is; each plans with the other's sessions and copies.

        Args:
            split: which heads keep every token: `HeadMap`, folder in DuoAttention's format, or "full"; or how far
                each head reaches, a `HeadSplit`.
            kv_format: "int4", "k5v3", "bf16" or "fp32".
            chunk_size: the most tokens of one prefill step.
            ctx: tokens to plan for; default: this runtime's plan's.
            retrieval_ratio: share of the heads of `split`, or of this runtime's own head map, to keep.
            kv_bytes: instead of a ratio, bytes of keys and values that decide how far each head reaches, see
                `longrun.load`. Without it reaches stay as they are here; with a `split` or ratio every head kept keeps
                all tokens.
            keep: first tokens that no head drops, see `longrun.load`; not "system".
            select, select_from, hot_pool: pages of every retrieval head that a decode step reads, from how many on, and
                the memory for those of them that stand on the host; see `longrun.load`.
            prefill, prefill_share, prefill_mass, prefill_dense: how long documents are read, see `longrun.load`.
            device_share: the most of a retrieval head's pages that may stand in the device pool, see `longrun.load`.

        Raises:
            PlanError: what is left of the budget, or the machine's free memory, cannot hold it.
            ConfigError, HeadMapError, InputError: an argument cannot be used, or the weights are quantized and the
                split wants another order: load the model with it, or in bf16 or fp32.
        """
        capacity = self.plan.capacity if ctx is None else parse_tokens(ctx, "ctx")
        kept = None if keep is None else parse_keep(keep)
        if isinstance(kept, str):
            raise InputError(f"keep {kept} is counted while a model is loaded: give a number of tokens")
        chosen = None if select is None else parse_select(select)
        begin = None if select_from is None else parse_select_from(select_from)
        hot = None if hot_pool is None else parse_hot_pool(hot_pool)
        return Runtime(
            derived(
                self._setup, split, retrieval_ratio, kv_bytes, kv_format, chunk_size, capacity, kept, chosen, begin,
                hot, prefill, prefill_share, prefill_mass, prefill_dense, device_share,
            )
        )  # fmt: skip
