"""One decoded token on a GPU as one CUDA graph, captured once before the first token and replayed for every token.

The graph ends by finding the likeliest next token and writing it to where the next step reads its own. Greedy decoding
can therefore launch a step before the host has seen its token ("ahead"), and the GPU never waits for the host.

A token id goes to the device as an int given to `DecodeState.fill`, and comes back in a copy of `DecodeState.best`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.engine.best_token import BestToken
from longrun.model.decoder import Decoder
from longrun.model.rope import RotaryTable

if TYPE_CHECKING:
    from longrun.attention.cuda_decode import CudaDecode


class DecodeGraph:
    """The decoder's step for a single token; positions and lengths are read from device memory.

    Captured when it is made, on the empty cache: what the two trial runs write there is overwritten by the first
    tokens. In the same way a step launched ahead whose token is not the one that comes writes only where the next
    token will: its slot in the tails and in the rings (there over a token that has just left every window); and it may
    bring pages to the hot pool, where it does not count.

    Where steps select pages there are two graphs, one that selects and one that reads all: the token's position says
    which of them runs. They use the same buffers, one after the other, and share the memory of what lives only within a
    step.

    Args:
        decoder: with fused kernels.
        rotary: cos and sin in host memory.
        attention: over an empty cache.
        capture: False runs every step eagerly, for devices without graphs.
    """

    def __init__(self, decoder: Decoder, rotary: RotaryTable, attention: CudaDecode, capture: bool) -> None:
        assert attention.cache.seq_len == 0 and rotary.device.type == "cpu"
        self._decoder, self._rotary, self._attention = decoder, rotary, attention
        device = attention.cache.device
        self._best = BestToken(attention.state.best)
        self._host_best = BestToken(torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda"))
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._has_best = False
        self._ahead_at: int | None = None
        self._selects = False  # the step that was launched last
        self._captured: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._logits: Tensor | None = None
        if capture:
            self._capture()

    def _capture(self) -> None:
        self._describe(0, 0, 1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the capture
            for selects in self._attention.passes:
                for _ in range(2):
                    self._forward(selects)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for selects in self._attention.passes:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._forward(selects)
            self._captured[selects] = graph, logits

    def _describe(self, token_id: int | None, start: int, rope_seq_len: int) -> None:
        cos, sin = self._rotary.cos_sin_of(start, rope_seq_len)
        self._attention.begin_decode(token_id, start, cos, sin)

    def _forward(self, selects: bool) -> Tensor:
        token_id, attention = self._attention.state.token_id, self._attention
        logits = attention.decode_pass(lambda decode: self._decoder.forward_one(token_id, decode), selects).view(-1)
        self._best.find(logits)
        return logits

    @torch.inference_mode()
    def run(self, token_id: int, rope_seq_len: int, ahead: bool = False) -> Tensor:
        """Append one token; the caller advances the cache.

        Args:
            token_id: below vocab_size.
            rope_seq_len: see `RotaryTable.cos_sin`.
            ahead: the next token will be the likeliest one, so launch its step as well, unless a page must be flushed
                before it or the cache ends. Where another comes after all, its step is thrown away.

        Returns:
            float32 [vocab_size], a copy.

        Raises:
            CheckpointError: a step was launched ahead of this one, and the logits before it are not finite.
        """
        start = self._attention.cache.seq_len
        if self._ahead_at != start or self.next_token_id() != token_id:
            self._describe(token_id, start, rope_seq_len)
            self._launch(start)
        self._ahead_at = None
        assert self._logits is not None
        logits = self._logits.clone()
        if self._selects and self._attention.cache.hot is not None:
            self._attention.cache.hot.count_step()
        self._host_best.words.copy_(self._best.words, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._has_best = True
        if ahead and self._attention.cache.takes_in_place(start + 1):
            self._describe(None, start + 1, rope_seq_len + 1)
            self._launch(start + 1)
            self._ahead_at = start + 1
        return logits

    @torch.inference_mode()
    def try_next(self, token_id: int, rope_seq_len: int) -> None:
        """Run the next step for what it leaves in buffers, without a graph; it does not count. As one launched ahead it
        writes only where the next token will, so there must be room for that (`DualCache.takes_in_place`)."""
        self.invalidate()
        start = self._attention.cache.seq_len
        assert self._attention.cache.takes_in_place(start)
        self._describe(token_id, start, rope_seq_len)
        self._forward(self._attention.selects_at(start))

    def next_token_id(self) -> int | None:
        """The likeliest token after the last `run`, waiting for that step to end; None where unknown: before the first
        `run` and after `invalidate`.

        Raises:
            CheckpointError: its logit is NaN or infinite.
        """
        if not self._has_best:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host_best.read()

    def invalidate(self) -> None:
        """Something else changed the cache: a step launched ahead does not count, the next token is unknown."""
        self._ahead_at, self._has_best = None, False

    def _launch(self, start: int) -> None:
        self._selects = self._attention.selects_at(start)
        if self._captured:
            graph, self._logits = self._captured[self._selects]
            graph.replay()
        else:
            self._logits = self._forward(self._selects)

    def replay(self) -> None:
        """The GPU's part of the last step alone, for timing: every replay takes the token that the one before it found,
        at the same place, so the newest token's keys and values are no longer that token's."""
        assert self._captured
        self.invalidate()
        self._captured[self._selects][0].replay()
