"""One sequence: its tokens, its cache, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longrun.arguments import MAX_SEED, callback, flag, integer
from longrun.cache.dual import DualCache
from longrun.engine.engine import Engine
from longrun.engine.sampling import SamplingParams, TokenScore
from longrun.engine.token_ids import token_id_tensor
from longrun.engine.token_rule import TokenRule
from longrun.errors import InputError, logits_not_finite
from longrun.interrupts import deferred_signals
from longrun.plan.plan import Plan
from longrun.session.generation import generate, generate_scored
from longrun.session.keeper import SessionKeeper
from longrun.session.look_back import looked_at
from longrun.session.marks import SessionMark, SessionMarks
from longrun.session.passages import Passage
from longrun.session.sequence import TokenSequence
from longrun.specs.caught_mass import CaughtMass
from longrun.specs.hot_counts import HotCounts
from longrun.specs.prefill_counts import PrefillCounts

if TYPE_CHECKING:
    from longrun.session.manifest import SessionIdentity
    from longrun.session.store import SessionStore

Progress = Callable[[int, int], None]


class Session:
    """One sequence of up to `capacity` tokens. Made by `Runtime.new_session` or `Runtime.load_session`.

    Attributes:
        plan: the memory plan this session was allocated by.
        extra: JSON-able dictionary saved with the session; the chat keeps its turns there.
    """

    def __init__(self, engine: Engine, plan: Plan, identity: SessionIdentity, eos_token_ids: frozenset[int]) -> None:
        self._engine, self.plan, self.identity, self._eos = engine, plan, identity, eos_token_ids
        self._sequence = TokenSequence(engine)
        self._marks = SessionMarks(self._sequence)
        self._keeper = SessionKeeper()
        self.extra: dict[str, Any] = {}

    @property
    def cache(self) -> DualCache:
        return self._engine.cache

    @property
    def token_ids(self) -> list[int]:
        """Every token so far; the last one may be sampled but not yet in the cache."""
        return self._sequence.ids.tolist()

    @property
    def num_tokens(self) -> int:
        return self._sequence.num_tokens

    @property
    def seq_len(self) -> int:
        """Tokens in the cache: `num_tokens`, or one less while a sampled token waits."""
        return self.cache.seq_len

    @property
    def capacity(self) -> int:
        return self.cache.spec.capacity

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows: below this number."""
        return self._engine.decoder.config.vocab_size

    @property
    def cache_bytes(self) -> int:
        """Bytes the cache holds, measured from its tensors; equal to the plan's."""
        return self.cache.total_bytes

    @property
    def hot_counts(self) -> HotCounts | None:
        """What the decode steps of this session chose of host pages; None without a hot pool. Waits for the device."""
        return None if self.cache.hot is None else self.cache.hot.counts()

    def caught_mass(self) -> CaughtMass | None:
        """How much of the attention to pages those hold that the next decode step would choose, as their digests
        estimate it: the step is run once more than it counts, for the token that waits or else for the likeliest. None
        before the first token, where that step selects nothing, and at the one length in page_size at which it closes a
        page.

        Raises:
            SessionError, PlanError: as `score`.
        """
        token_id = self._sequence.next_token_id()
        found = None if token_id is None else self._engine.caught_mass(token_id)
        return None if found is None else CaughtMass(found)

    @property
    def sparse_tokens(self) -> int:
        """Tokens of the session that were read sparsely; for ever, also where the session is loaded to read exactly."""
        return self._sequence.sparse_tokens

    @property
    def prefill_counts(self) -> PrefillCounts | None:
        """What this session read of the past where it read sparsely, and the attention caught; None where it reads all.
        Rewinding does not take anything back. Waits for the device."""
        sparse = self._engine.sparse
        return None if sparse is None else sparse.levels.counts()

    @property
    def logits(self) -> Tensor | None:
        """float32 [vocab_size] that predict the next token; None before the first prefill."""
        self._sequence.take_waiting()
        return self._sequence.logits

    def common_prefix(self, token_ids: Sequence[int] | Tensor) -> int:
        """How many tokens at the beginning of the session and of `token_ids` are the same.

        Raises:
            InputError: as `prefill` does for token ids that are none.
        """
        return self._sequence.common_prefix(token_id_tensor(token_ids, self.vocab_size))

    def prefill(
        self, token_ids: Sequence[int] | Tensor, progress: Progress | None = None, one_by_one: bool = False,
        sparse: bool = True, more: int = 0,
    ) -> Tensor:  # fmt: skip
        """Append tokens, chunk by chunk; a session that is attached to a folder is saved after each.

        Args:
            token_ids: at least one token id, as `longrun.engine.token_ids` takes them.
            progress: called with (tokens done, tokens in all) after every chunk.
            one_by_one: take each token in as `generate` does, slower: with `select` it reads the pages selected for it,
                where a chunk reads all. A session that is attached is saved at the end.
            sparse: the tokens are a document, which is read as `prefill` of the runtime says. False reads them exactly,
                which questions about a document should be; without sparse prefill there is no difference.
            more: tokens of the same document that later calls append: of a document its last tokens are read exactly,
                and those are then not this call's.

        Returns:
            float32 [vocab_size], logits of the last position.

        Raises:
            InputError: no token, something else than integers in one dimension, or an id outside the vocabulary.
            ContextFullError: more tokens than the capacity has room for; nothing was appended.
            SessionError: a checkpoint could not be written, or an earlier step broke off.
        """
        callback(progress, "progress")
        flag(one_by_one, "one_by_one")
        flag(sparse, "sparse")
        more = integer(more, "more")
        new = token_id_tensor(token_ids, self.vocab_size)

        def after_chunk(done: int, total: int) -> None:
            if self._keeper.attached and (done == total or not one_by_one):
                self._check_savable()
                self._keeper.update(self)
            if progress is not None:
                progress(done, total)

        return self._sequence.append(new, after_chunk=after_chunk, one_by_one=one_by_one, sparse=sparse, more=more)[-1]

    def score(self, token_ids: Sequence[int] | Tensor, one_by_one: bool = False) -> Tensor:
        """Append known tokens and return how they were predicted (teacher forcing).

        Args:
            token_ids, one_by_one: see `prefill`.

        Returns:
            float32 [n, vocab_size]: row i are the logits that predict token_ids[i].

        Raises:
            As `prefill`; InputError also for a session without any token yet.
        """
        flag(one_by_one, "one_by_one")
        new = token_id_tensor(token_ids, self.vocab_size)
        self._sequence.check_room(len(new))
        before = self.logits
        if before is None:
            raise InputError("nothing precedes these tokens: prefill at least one token before scoring")
        rows = self._sequence.append(new, all_positions=True, one_by_one=one_by_one)
        return torch.cat((before[None], rows[:-1]))

    def generate(
        self,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos: bool = True,
        min_p: float = 0.0,
        rule: TokenRule | None = None,
    ) -> Iterator[int]:
        """Continue the sequence token by token.

        A token is yielded as soon as it is sampled and enters the cache when the next one is asked for, so a consumer
        may stop at any point. Without `seed`, random draws go on from where the session (also a loaded one) stood; a
        new session begins with a seed of its own, so that two runs differ.

        Args:
            max_new_tokens: at most so many.
            temperature, top_k, top_p, repetition_penalty, min_p: see `SamplingParams`.
            eos: stop after an end-of-sequence token of the generation config (it is yielded last).
            rule: which tokens may come, such as those of JSON (`Runtime.json_rule`); good for one answer, which ends
                where nothing may follow. A GPU then does not begin with a token before the last one is known.

        Raises:
            InputError: impossible parameters, or a session without any token (at the call, not at the first token).
            ContextFullError: the capacity is used up; every token yielded so far is part of the session.
        """
        params = SamplingParams(temperature, top_k, top_p, repetition_penalty, min_p)
        count, ends = self._ready_to_generate(max_new_tokens, seed, eos)
        return generate(self._sequence, count, params, ends, rule=rule)

    def generate_scored(
        self, max_new_tokens: int, params: SamplingParams, seed: int | None = None, eos: bool = True, top: int = 0,
        rule: TokenRule | None = None,
    ) -> Iterator[TokenScore]:  # fmt: skip
        """`generate`, with every token's log-probability and the `top` likeliest tokens in its place: the model's own,
        whatever a rule allows.

        Raises:
            As `generate`.
        """
        count, ends = self._ready_to_generate(max_new_tokens, seed, eos)
        return generate_scored(self._sequence, count, params, ends, integer(top, "top", 0, self.vocab_size), rule)

    def _ready_to_generate(self, max_new_tokens: int, seed: int | None, eos: bool) -> tuple[int, frozenset[int]]:
        """Check what `generate` is called with and begin at the seed; returns how many tokens, and what ends them."""
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", 1)
        seed = None if seed is None else integer(seed, "seed", 0, MAX_SEED)
        flag(eos, "eos")
        if not self.num_tokens:
            raise InputError("there is nothing to continue: prefill at least one token before generating")
        if seed is not None:
            self._sequence.generator.manual_seed(seed)
        return max_new_tokens, self._eos if eos else frozenset()

    def mark(self) -> SessionMark:
        """Remember this point. Costs a copy of tails and rings, on the cache's own device for the first marks alive.

        A mark lives until it is released or nothing refers to it.

        Raises:
            SessionError: a step broke off, so that there is nothing whole to come back to; or heads drop pages, and
                the marks alive hold back all that the plan has room for.
            ContextFullError: the token that waits to be taken in has no room.
        """
        return self._marks.take()

    def release(self, mark: SessionMark) -> None:
        """Give a mark back: the memory and the pages it holds are free for others. It cannot be rewound to any more.

        Raises:
            InputError: `mark` is not a mark of a session.
        """
        self._marks.release(mark)

    def rewind(self, mark: SessionMark) -> None:
        """Back to `mark`, as if nothing had been appended since: many questions over one document, for example.

        Raises:
            InputError: `mark` is of another session, or its tokens were dropped by a rewind to an earlier mark;
                nothing was changed.
        """
        self._marks.check(mark)
        with deferred_signals():
            self._keeper.rewound(self.cache.spec, mark.cache.seq_len)
            self._marks.rewind(mark)

    def looked_at(
        self, mark: SessionMark, stop: int | None = None, before: int | None = None, most: int = 5,
        check: Callable[[], object] | None = None,
    ) -> list[Passage]:  # fmt: skip
        """The passages of the text before `mark` that the tokens after it attended to most.

        The tokens after the mark are read once more, without appending anything: the session stays as it is. What the
        retrieval heads see counts, so that a head of finite reach tells only of its newest tokens, and one that
        streams of none. Of a very long answer the first tokens are read, as many as the planned memory has room for,
        a little less than chunk_size.

        Args:
            mark: where the answer begins.
            stop: where it ends, a number of tokens of the session; default: the session's end.
            before: tokens from this position on are not shown, such as those of the question; default: the mark.
            most: at most so many passages.
            check: called before every layer; what it raises ends this and goes through.

        Returns:
            Passages, the most looked at first: none where nothing stands before the mark beside the first page, which
            never counts.

        Raises:
            InputError: `mark` is of another session or ended; nothing follows it; another number is out of range.
            SessionError: an earlier step broke off.
            PlanError: the planned chunks are too short for it.
        """
        callback(check, "check")
        return looked_at(self._sequence, self._marks, self.plan, mark, stop, before, most, check)

    def attach(self, path: str | Path) -> None:
        """Own the folder `path` and keep it up to date from now on: prefill saves into it after every chunk.

        Raises:
            SessionError: the folder holds something that is not a session, another session owns it, or it cannot be
                written.
        """
        self._keeper.attach(path)

    def detach(self) -> None:
        """Leave the folder this session was attached or saved to as it is: another session may own it."""
        self._keeper.detach()

    def save(self, path: str | Path) -> None:
        """Write the session to the folder `path`, atomically: a crash or a full disk leaves what was there before.

        The session owns the folder from then on, until `detach`, a save to another folder, or its end; saving there
        again writes only what is new. A session that is attached keeps its folder and leaves a copy in `path`.

        Raises:
            SessionError: the folder holds something else, another session owns it, `extra` holds what JSON does not
                keep, a step broke off, or writing failed.
            CheckpointError: the logits are not finite.
        """
        self._check_savable()
        self._keeper.save(self, path)

    def snapshot(self) -> dict[str, Tensor]:
        """What makes the session besides its cache: int32 token ids, logits if there are any, random state."""
        sequence = self._sequence
        found = {"token_ids": sequence.id_tensor(), "generator": sequence.generator.get_state()}
        if sequence.logits is not None:
            found["logits"] = sequence.logits.cpu()
        return found

    def restore(
        self, token_ids: Tensor, logits: Tensor | None, generator_state: Tensor, extra: dict[str, Any],
        sparse_tokens: int = 0,
    ) -> None:  # fmt: skip
        """Restore what `snapshot` gave; the cache has been filled already."""
        sequence = self._sequence
        assert not sequence.ids
        assert self.seq_len <= len(token_ids) <= self.seq_len + 1
        with deferred_signals():
            sequence.ids.extend(token_ids.tolist())
            sequence.logits = None if logits is None else logits.to(self.cache.device)
            sequence.generator.set_state(generator_state)
            sequence.sparse_tokens = sparse_tokens
            self.extra = extra

    def adopt_store(self, store: SessionStore) -> None:
        """The session was loaded from this store: saving there again writes only what is new."""
        self._keeper.adopt(store)

    def forbid_saving(self, why: str) -> None:
        """From now on `save` and `attach` raise SessionError with `why`, a clause; a session attached is detached."""
        self._keeper.forbid(why)

    def _check_savable(self) -> None:
        self._engine.check_whole()
        logits = self._sequence.logits
        if logits is not None and not logits.isfinite().all():
            raise logits_not_finite()
