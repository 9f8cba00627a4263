"""Runs tokens through the decoder: prefill in chunks, decode one at a time, every step whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from longrun.allocation import failed_allocations
from longrun.attention.interface import Attention, Step
from longrun.attention.look_back import LookBack, Looks
from longrun.attention.looked import LookedTokens
from longrun.attention.selected_pages import Selects
from longrun.attention.sparse_past import SparsePast
from longrun.cache.dual import CacheMark, DualCache
from longrun.engine.chunks import NOWHERE, chunk_lengths
from longrun.errors import SessionError, logits_not_finite
from longrun.interrupts import deferred_signals
from longrun.model.decoder import Decoder
from longrun.model.rope import RotaryTable

if TYPE_CHECKING:
    from longrun.engine.decode_calls import DecodeCalls
    from longrun.engine.decode_graph import DecodeGraph


class Engine:
    """Runs one sequence through the model.

    Args:
        decoder: the weights.
        rotary: cos and sin of any position.
        attention: reads and appends to `cache`.
        cache: the sequence's dual cache.
        chunk_size: the most tokens of one forward pass in prefill.
        decode_step: runs the steps of a single token; without it they are chunks of one token.
        selects_at: whether the decode step of the token at a position selects pages; without it none does. Chunks read
            all of them, so that one of a single token is no decode step where that would select.
        sparse: the attention's, where chunks may be read sparsely.
    """

    def __init__(
        self, decoder: Decoder, rotary: RotaryTable, attention: Attention, cache: DualCache, chunk_size: int,
        decode_step: DecodeGraph | DecodeCalls | None = None, selects_at: Callable[[int], bool] | None = None,
        sparse: SparsePast | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.rotary, self.attention = decoder, rotary, attention
        self.cache, self.chunk_size = cache, chunk_size
        self.decode_step, self._selects_at, self.sparse = decode_step, selects_at, sparse
        self._broken: str | None = None
        self._proven = False

    @failed_allocations("in the middle of a step")
    def run(
        self, token_ids: Tensor, all_positions: bool = False,
        on_chunk: Callable[[int, bool, Tensor], None] | None = None, one_by_one: bool = False, sparse: range = NOWHERE,
        goes_on: bool = False,
    ) -> Tensor:  # fmt: skip
        """Append tokens to the sequence, chunk by chunk.

        SIGINT and SIGTERM wait until the current chunk is finished and `on_chunk` was called with it.

        Args:
            token_ids: int64 [n] in host memory, n >= 1; the caller has checked the capacity.
            all_positions: logits of every position (they all stand in memory) instead of the last one.
            on_chunk: called after each chunk with its number of tokens, whether it was read sparsely, and its logits.
            one_by_one: every token is a decode step.
            sparse: positions at which chunks may be read sparsely, see `longrun.engine.chunks`; one document.
            goes_on: it is the one whose beginning the last call read.

        Returns:
            float32 [n, vocab_size] with all_positions, else [1, vocab_size] of the last position.

        Raises:
            SessionError: an earlier step failed half way, so that the cache cannot be trusted.
            PlanError: memory ran out.
            CheckpointError: the first step gave logits that are not finite; `on_chunk` is not called.
        """
        self.check_whole()
        start = self.cache.seq_len
        rope_seq_len = start + len(token_ids)
        if sparse:
            assert self.sparse is not None and not one_by_one
            if not goes_on:
                self.sparse.levels.begin()
        rows, done = [], 0
        for size, is_sparse in chunk_lengths(start, len(token_ids), 1 if one_by_one else self.chunk_size, sparse):
            chunk = token_ids[done : done + size]
            with deferred_signals():
                if one_by_one or (size == 1 and not self._selects_next()):
                    forward = partial(self._forward_one, int(chunk), rope_seq_len)
                else:
                    forward = partial(self._forward, chunk, rope_seq_len, all_positions, sparse=is_sparse)
                logits = self._step(size, forward)
                if on_chunk is not None:
                    on_chunk(size, is_sparse, logits)
            done += size
            rows = [*rows, logits] if all_positions else [logits]
        return torch.cat(rows)

    @failed_allocations("in the middle of a step")
    def run_one(self, token_id: int, ahead: bool = False) -> Tensor:
        """Append one token to the sequence.

        SIGINT and SIGTERM wait until the step is finished; hold them back yourself where more belongs to it.

        Args:
            token_id: below vocab_size; the caller has checked the capacity.
            ahead: see `DecodeGraph.run`; without a graph it has no effect.

        Returns:
            float32 [vocab_size].

        Raises:
            As `run`.
        """
        self.check_whole()
        with deferred_signals():
            return self._step(1, partial(self._forward_one, token_id, self.cache.seq_len + 1, ahead))[0]

    @failed_allocations("while an answer was looked through")
    @torch.inference_mode()
    def look_back(
        self, mark: CacheMark, token_ids: Tensor, tile_bytes: int, check: Callable[[], object] | None = None
    ) -> Tensor:
        """What tokens that follow a mark attend to before it; the sequence stays as it is, wherever this ends.

        Args:
            mark: a live one, of at least one token.
            token_ids: int64 [n] in host memory, at most chunk_size of them.
            tile_bytes: see `LookedTokens`.
            check: see `LookBack`.

        Returns:
            float32 [mark.seq_len] in host memory: each token's sum of squared attention weights, over these tokens and
            all retrieval heads.

        Raises:
            SessionError: as `run`.
            PlanError: memory ran out.
        """
        self.check_whole()
        assert 0 < len(token_ids) <= self.chunk_size
        if self.decode_step is not None:
            self.decode_step.invalidate()
        backend = cast(Looks, self.attention)
        start, device = mark.seq_len, self.decoder.device
        looked = LookedTokens(start, self.decoder.config.head_dim**-0.5, tile_bytes, device)
        step = Step(start, len(token_ids), *self.rotary.cos_sin(start, len(token_ids), start + len(token_ids)))
        attention = LookBack(backend, self.cache.layers_at(mark), looked, check)
        self.decoder.forward(token_ids.to(device), step, attention)
        return looked.sums.cpu()

    @failed_allocations("while it was estimated what chosen pages hold")
    @torch.inference_mode()
    def caught_mass(self, token_id: int) -> tuple[tuple[float, ...], ...] | None:
        """What the pages that the next step would choose hold of the attention; the sequence stays as it is.

        Args:
            token_id: which that step takes in.

        Returns:
            By layer and retrieval head, see `CaughtMass`; None where that step selects no pages, or where a page of the
            cache has to be closed before it.

        Raises:
            SessionError: as `run`.
            PlanError: memory ran out.
        """
        self.check_whole()
        start, selector = self.cache.seq_len, cast(Selects, self.attention).selector
        if selector is None or not self._selects_next() or not self.cache.takes_in_place(start):
            return None
        with deferred_signals(), selector.watched() as found:
            if self.decode_step is None:
                self._forward(torch.tensor([token_id]), start + 1, selects=True)
            else:
                self.decode_step.try_next(token_id, start + 1)
        shares = iter(found)
        return tuple(() if pages is None else tuple(next(shares)) for pages, _ in self.cache.layers) if found else None

    def check_whole(self) -> None:
        """Raises SessionError where a step failed half way, until the cache is brought back to an earlier state."""
        if self._broken is not None:
            raise SessionError(
                f"this session stopped in the middle of a step ({self._broken}): load it again from where it was saved"
            )

    @torch.inference_mode()
    def _step(self, num_tokens: int, forward: Callable[[], Tensor]) -> Tensor:
        """Count the tokens that `forward` appends; where it fails, the cache is not to be trusted any more."""
        try:
            logits = forward()
            if not self._proven or self.cache.seq_len == 0:  # once: it waits for the device
                self._check_finite(logits[-1])
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        self.cache.advance(num_tokens)
        return logits

    def _selects_next(self) -> bool:
        """Whether a decode step would select pages."""
        return self._selects_at is not None and self._selects_at(self.cache.seq_len)

    def _forward_one(self, token_id: int, rope_seq_len: int, ahead: bool = False) -> Tensor:
        if self.decode_step is None:
            return self._forward(torch.tensor([token_id]), rope_seq_len, selects=True)
        return self.decode_step.run(token_id, rope_seq_len, ahead)[None]

    def _forward(
        self, chunk: Tensor, rope_seq_len: int, all_positions: bool = False, selects: bool = False, sparse: bool = False
    ) -> Tensor:
        if self.decode_step is not None:
            self.decode_step.invalidate()
        start = self.cache.seq_len
        cos, sin = self.rotary.cos_sin(start, len(chunk), rope_seq_len)
        step = Step(start, len(chunk), cos, sin, selects, sparse)
        hidden = self.decoder.forward(chunk.to(self.decoder.device), step, self.attention, all_positions=all_positions)
        return self.decoder.logits(hidden.view(-1, hidden.shape[-1]))

    def _check_finite(self, logits: Tensor) -> None:
        if not logits.isfinite().all():
            raise logits_not_finite()
        self._proven = True

    def next_token_id(self) -> int | None:
        """The likeliest next token; None where unknown: see `DecodeGraph.next_token_id`, and always without a graph."""
        return None if self.decode_step is None else self.decode_step.next_token_id()

    def rewound(self) -> None:
        """The cache was brought back to an earlier, whole state: a broken step no longer matters."""
        self._broken = None
        if self.decode_step is not None:
            self.decode_step.invalidate()
