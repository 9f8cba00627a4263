"""What a session knows of its tokens besides the cache, and the steps that change both together."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from longrun.cache.dual import DualCache
from longrun.engine.chunks import NOWHERE, sparse_positions
from longrun.engine.engine import Engine
from longrun.errors import ContextFullError
from longrun.interrupts import deferred_signals
from longrun.units import format_tokens


class TokenSequence:
    """Token ids, logits and random state of one sequence, and the engine that holds its cache.

    Attributes:
        ids: array of int32, every token so far. The last one may have been chosen but not yet run: it *waits*.
        logits: float32 [vocab_size], of the last token in the cache; None before the first one.
        sparse_tokens: how many of the tokens were read sparsely.
        unread_stop: position at which the document ends of which the last call said that more is to come; otherwise
            None.
        generator: where chance comes from; it starts with a seed of its own.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ids = array("i")
        self.logits: Tensor | None = None
        self.sparse_tokens = 0
        self.unread_stop: int | None = None
        self.generator = torch.Generator().manual_seed(secrets.randbits(63))

    @property
    def cache(self) -> DualCache:
        return self.engine.cache

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_waiting(self) -> int:
        """0 or 1: whether the last token is not in the cache yet."""
        return len(self.ids) - self.cache.seq_len

    def id_tensor(self) -> Tensor:
        """int32 [num_tokens], a copy made without a Python object a token."""
        return torch.frombuffer(self.ids, dtype=torch.int32).clone() if self.ids else torch.empty(0, dtype=torch.int32)

    def common_prefix(self, token_ids: Tensor) -> int:
        """Leading tokens that are those of `token_ids`, int64 [n] in host memory."""
        count = min(len(self.ids), len(token_ids))
        if not count:
            return 0
        differ = (torch.frombuffer(self.ids, dtype=torch.int32)[:count] != token_ids[:count]).nonzero()
        return int(differ[0]) if len(differ) else count

    def append(
        self, token_ids: Tensor, all_positions: bool = False, after_chunk: Callable[[int, int], None] | None = None,
        one_by_one: bool = False, sparse: bool = False, more: int = 0,
    ) -> Tensor:  # fmt: skip
        """Run the token that waits and `token_ids`, chunk by chunk; each chunk counts before any signal takes effect.

        Args:
            token_ids: int64 [n] in host memory, n >= 1.
            all_positions, one_by_one: see `Engine.run`.
            after_chunk: called after every chunk with (tokens done, tokens in all).
            sparse: the tokens are a document, which may be read sparsely where the engine does that.
            more: tokens of the document that later calls append.

        Returns:
            The logits of `Engine.run`.

        Raises:
            ContextFullError: no room for all of them; nothing was appended.
            As `Engine.run`.
        """
        num_waiting = self.num_waiting
        self.check_room(len(token_ids))
        if num_waiting:
            token_ids = torch.cat((torch.tensor(self.ids[-1:], dtype=torch.int64), token_ids))
        done, where, goes_on = 0, NOWHERE, False
        if sparse and not one_by_one and self.engine.sparse is not None:
            stop = self.cache.seq_len + len(token_ids) + more
            where, goes_on = sparse_positions(self.engine.sparse.prefill, stop), self.unread_stop == stop
            self.unread_stop = stop if more else None

        def on_chunk(count: int, is_sparse: bool, logits: Tensor) -> None:
            nonlocal done
            self.ids.extend(token_ids[max(done, num_waiting) : done + count].tolist())
            self.logits = logits[-1]
            self.sparse_tokens += count if is_sparse else 0
            done += count
            if after_chunk is not None:
                after_chunk(done, len(token_ids))

        return self.engine.run(token_ids, all_positions, on_chunk, one_by_one, where, goes_on)

    def take_waiting(self, ahead: bool = False) -> None:
        """Run the token that waits, if one does.

        Args:
            ahead: see `Engine.run_one`.

        Raises:
            As `append`.
        """
        if self.num_waiting:
            self.check_room(0)
            with deferred_signals():
                self.logits = self.engine.run_one(self.ids[-1], ahead)

    def next_token_id(self) -> int | None:
        """The token that waits, or else the likeliest; None before the first one."""
        if self.num_waiting:
            return self.ids[-1]
        return None if self.logits is None else int(self.logits.argmax())

    def check_room(self, count: int) -> None:
        """Raises ContextFullError where the cache has no room for the token that waits and `count` more."""
        count, seq_len, capacity = count + self.num_waiting, self.cache.seq_len, self.cache.spec.capacity
        if seq_len + count > capacity:
            raise ContextFullError(
                f"the context is full: {count:,} more tokens after {seq_len:,} exceed this session's capacity of "
                f"{format_tokens(capacity)}; nothing was dropped: save the session and load it with a larger context"
            )
