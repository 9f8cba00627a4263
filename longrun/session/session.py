"""One sequence: its tokens, its cache, and what to do with them."""

from __future__ import annotations

import secrets
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longrun.arguments import MAX_SEED, callback, flag, integer
from longrun.cache.dual import CacheMark, DualCache
from longrun.engine.engine import Engine
from longrun.engine.sampling import SamplingParams, sample, seen_tokens
from longrun.engine.token_ids import token_id_tensor
from longrun.errors import ContextFullError, InputError, logits_not_finite
from longrun.interrupts import deferred_signals
from longrun.plan.plan import Plan
from longrun.session.keeper import SessionKeeper
from longrun.units import format_tokens

if TYPE_CHECKING:
    from longrun.session.manifest import SessionIdentity
    from longrun.session.store import SessionStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class SessionMark:
    """A point of a session to come back to with `Session.rewind`; of no use to another session."""

    cache: CacheMark
    num_tokens: int
    logits: Tensor | None
    generator_state: Tensor


class Session:
    """One sequence of up to `capacity` tokens. Made by `Runtime.new_session` or `Runtime.load_session`.

    Attributes:
        plan: the memory plan this session was allocated by.
        extra: JSON-able dictionary saved with the session; the chat keeps its turns there.
    """

    def __init__(self, engine: Engine, plan: Plan, identity: SessionIdentity, eos_token_ids: frozenset[int]) -> None:
        self._engine, self.plan, self.identity, self._eos = engine, plan, identity, eos_token_ids
        self._ids = array("i")
        self._logits: Tensor | None = None
        self._generator = torch.Generator().manual_seed(secrets.randbits(63))
        self._keeper = SessionKeeper()
        self._marks: weakref.WeakSet[SessionMark] = weakref.WeakSet()  # those whose tokens still stand here
        self.extra: dict[str, Any] = {}

    @property
    def cache(self) -> DualCache:
        return self._engine.cache

    @property
    def token_ids(self) -> list[int]:
        """Every token so far; the last one may be sampled but not yet in the cache."""
        return self._ids.tolist()

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

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
    def logits(self) -> Tensor | None:
        """float32 [vocab_size] that predict the next token; None before the first prefill."""
        self._catch_up()
        return self._logits

    def prefill(self, token_ids: Sequence[int] | Tensor, progress: Progress | None = None) -> Tensor:
        """Append tokens, chunk by chunk; a session that is attached to a folder is saved after each.

        Args:
            token_ids: at least one token id, as `longrun.engine.token_ids` takes them.
            progress: called with (tokens done, tokens in all) after every chunk.

        Returns:
            float32 [vocab_size], logits of the last position.

        Raises:
            InputError: no token, something else than integers in one dimension, or an id outside the vocabulary.
            ContextFullError: more tokens than the capacity has room for; nothing was appended.
            SessionError: a checkpoint could not be written, or an earlier step broke off.
        """
        callback(progress, "progress")
        new = token_id_tensor(token_ids, self.vocab_size)
        waiting = self._ids[self.seq_len :]
        self._check_room(len(waiting) + len(new))
        todo = torch.cat((torch.tensor(waiting, dtype=torch.int64), new)) if waiting else new
        note, done = self._note_chunk(todo, len(waiting)), 0

        def on_chunk(count: int, logits: Tensor) -> None:
            nonlocal done
            note(count, logits)
            done += count
            if self._keeper.attached:
                self._check_savable()
                self._keeper.update(self)
            if progress is not None:
                progress(done, len(todo))

        self._engine.run(todo, on_chunk=on_chunk)
        assert self._logits is not None
        return self._logits

    def score(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Append known tokens and tell how they were predicted (teacher forcing).

        Returns:
            float32 [n, vocab_size]: row i are the logits that predict token_ids[i].

        Raises:
            As `prefill`; InputError also for a session without any token yet.
        """
        new = token_id_tensor(token_ids, self.vocab_size)
        self._check_room(len(new) + self.num_tokens - self.seq_len)
        before = self.logits
        if before is None:
            raise InputError("nothing precedes these tokens: prefill at least one token before scoring")
        rows = self._engine.run(new, all_positions=True, on_chunk=self._note_chunk(new))
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
    ) -> Iterator[int]:
        """Continue the sequence token by token.

        A token is yielded as soon as it is sampled and enters the cache when the next one is asked for, so a consumer
        may stop at any point. Without `seed`, random draws go on from where the session (also a loaded one) stood; a
        new session begins with a seed of its own, so that two runs differ.

        Args:
            max_new_tokens: at most so many; temperature, top_k, top_p, repetition_penalty: see `SamplingParams`.
            eos: stop after an end-of-sequence token of the generation config (it is yielded last).

        Raises:
            InputError: impossible parameters, or a session without any token (at the call, not at the first token).
            ContextFullError: the capacity is used up; every token yielded so far is part of the session.
        """
        params = SamplingParams(temperature, top_k, top_p, repetition_penalty)
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", 1)
        seed = None if seed is None else integer(seed, "seed", 0, MAX_SEED)
        flag(eos, "eos")
        if not self._ids:
            raise InputError("there is nothing to continue: prefill at least one token before generating")
        if seed is not None:
            self._generator.manual_seed(seed)
        return self._generate(max_new_tokens, params, eos)

    def _generate(self, max_new_tokens: int, params: SamplingParams, eos: bool) -> Iterator[int]:
        seen: Tensor | tuple[()] = ()
        if params.repetition_penalty != 1:
            seen = seen_tokens(self._id_tensor(), self.vocab_size, self.cache.device)
        for left in range(max_new_tokens, 0, -1):
            token_id = self._next_token(params, seen, left > 1)
            yield token_id
            if eos and token_id in self._eos:
                return

    def _next_token(self, params: SamplingParams, seen: Tensor | tuple[()], more: bool) -> int:
        """Take in the token that waits and choose the next one, which then waits. Whoever asked must get it: where a
        signal came meanwhile, that is heard first, with nothing chosen."""
        greedy = params.temperature == 0 and params.repetition_penalty == 1
        while True:
            with deferred_signals() as signals:
                self._catch_up(ahead=greedy and more)
                assert self._logits is not None
                before = self._generator.get_state()
                token_id = self._engine.choice() if greedy else None
                if token_id is None:
                    token_id = sample(self._logits, params, self._generator, seen)
                if not signals.waiting:
                    self._ids.append(token_id)
                    if isinstance(seen, Tensor):
                        seen[token_id] = True
                    return token_id
                self._generator.set_state(before)

    def _catch_up(self, ahead: bool = False) -> None:
        """Take the sampled token that waits into the cache. With `ahead` the likeliest token is taken next."""
        if self.num_tokens > self.seq_len:
            waiting = torch.tensor(self._ids[self.seq_len :], dtype=torch.int64)
            self._check_room(len(waiting))
            self._engine.run(waiting, on_chunk=self._note_chunk(waiting, len(waiting)), ahead=ahead)

    def _note_chunk(self, todo: Tensor, num_known: int = 0) -> Callable[[int, Tensor], None]:
        """What `Engine.run` calls after a chunk, before any signal is heard: the chunk's tokens count, and its logits
        are the session's. The first `num_known` of `todo` stand in the session already."""
        done = 0

        def on_chunk(count: int, logits: Tensor) -> None:
            nonlocal done
            self._ids.extend(todo[max(done, num_known) : done + count].tolist())
            self._logits = logits[-1]
            done += count

        return on_chunk

    def _check_room(self, count: int) -> None:
        if self.seq_len + count > self.capacity:
            raise ContextFullError(
                f"the context is full: {count:,} more tokens after {self.seq_len:,} exceed this session's capacity of "
                f"{format_tokens(self.capacity)}; nothing was dropped: save the session and load it with "
                f"a larger context"
            )

    def mark(self) -> SessionMark:
        """Remember this point; costs a copy of tails and rings in host memory, no page.

        Raises:
            SessionError: a step broke off, so that there is nothing whole to come back to.
            ContextFullError: the token that waits to be taken in has no room.
        """
        self._catch_up()
        self._engine.check_whole()
        logits = None if self._logits is None else self._logits.clone()
        mark = SessionMark(self.cache.mark(), self.num_tokens, logits, self._generator.get_state())
        self._marks.add(mark)
        return mark

    def rewind(self, mark: SessionMark) -> None:
        """Back to `mark`, as if nothing had been appended since: many questions over one document, for example.

        Raises:
            InputError: `mark` is of another session, or its tokens were dropped by a rewind to an earlier mark;
                nothing was changed.
        """
        if not isinstance(mark, SessionMark):
            raise InputError(f"rewind needs a mark that this session's mark() gave, not {type(mark).__name__}")
        if mark not in self._marks:
            raise InputError(
                f"this mark at token {mark.num_tokens:,} is of another session, or its tokens were dropped by a rewind "
                f"to an earlier mark: take a new one with mark()"
            )
        with deferred_signals():
            self._keeper.rewound(mark.cache)
            self.cache.rewind(mark.cache)
            self._engine.rewound()
            del self._ids[mark.num_tokens :]
            self._logits = None if mark.logits is None else mark.logits.clone()
            self._generator.set_state(mark.generator_state)
            for later in [other for other in self._marks if other.num_tokens > mark.num_tokens]:
                self._marks.discard(later)

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
        """What beside the cache makes the session: int32 token ids, logits if there are any, random state."""
        found = {"token_ids": self._id_tensor(), "generator": self._generator.get_state()}
        if self._logits is not None:
            found["logits"] = self._logits.cpu()
        return found

    def _id_tensor(self) -> Tensor:
        """int32 [num_tokens], a copy made without a Python object a token."""
        return (
            torch.frombuffer(self._ids, dtype=torch.int32).clone() if self._ids else torch.empty(0, dtype=torch.int32)
        )

    def restore(self, token_ids: Tensor, logits: Tensor | None, generator_state: Tensor, extra: dict[str, Any]) -> None:
        """Take over what `snapshot` gave; the cache has been filled already."""
        assert not self._ids
        assert self.seq_len <= len(token_ids)
        with deferred_signals():
            self._ids.extend(token_ids.tolist())
            self._logits = None if logits is None else logits.to(self.cache.device)
            self._generator.set_state(generator_state)
            self.extra = extra

    def adopt_store(self, store: SessionStore) -> None:
        """The session was loaded from this store: saving there again writes only what is new."""
        self._keeper.adopt(store)

    def forbid_saving(self, why: str) -> None:
        """From now on `save` and `attach` raise SessionError with `why`, a clause; a session attached is detached."""
        self._keeper.forbid(why)

    def _check_savable(self) -> None:
        self._engine.check_whole()
        if self._logits is not None and not self._logits.isfinite().all():
            raise logits_not_finite()
