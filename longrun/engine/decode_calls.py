"""One decoded token on a CPU as a list of calls into compiled code, prepared once and run for every token: what a CUDA
graph is on a GPU. The rest of a step is a dozen small operations; made anew in every layer they took as long as the
compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longrun.attention.cpu_decode import CpuDecode
from longrun.model.decoder import Decoder, FewTokenLinear
from longrun.model.rope import RotaryTable


class DecodeCalls:
    """The decoder's step for a single token. Where steps select pages there are two lists of calls, one that selects
    and one that reads all: the token's position says which of them runs.

    Args:
        rotary: cos and sin in host memory.
        attention: of the sequence.
        linear: the kernel of the linears.
    """

    def __init__(self, decoder: Decoder, rotary: RotaryTable, attention: CpuDecode, linear: FewTokenLinear) -> None:
        self._decoder, self._rotary, self._attention, self._linear = decoder, rotary, attention, linear
        self._buffers: dict[int, Tensor] = {}
        self._hidden = torch.zeros(1, decoder.config.hidden_size, dtype=decoder.compute_dtype)
        self._threads = 0
        self._prepared: dict[bool, tuple[list[Callable[[], object]], Tensor]] = {}

    def _calls(self, selects: bool) -> tuple[list[Callable[[], object]], Tensor]:
        """The calls of a step, with as many threads as now, and where they leave the logits."""
        if self._threads != torch.get_num_threads():
            self._threads, self._prepared = torch.get_num_threads(), {}
        if selects not in self._prepared:
            self._prepared[selects] = self._prepare(selects)
        return self._prepared[selects]

    def _prepare(self, selects: bool) -> tuple[list[Callable[[], object]], Tensor]:
        self._attention.calls, self._attention.selects = [], selects
        logits = self._decoder.layers_of_one(self._hidden, self._prepare_linear, self._attention.decode)
        return self._attention.calls, logits

    def _prepare_linear(self, x: Tensor, linear: Any, out: Tensor | None = None, **options: Any) -> Tensor:
        """`vector_linear`, later. Layers follow each other, so that one memory serves all results of a size."""
        if out is None:
            rows = linear.out_features // (2 if options.get("gated") else 1)
            out = self._buffers.setdefault(rows, x.new_empty(1, rows))
        self._attention.calls.append(self._linear.prepare(x, linear, out, **options))
        return out

    @torch.inference_mode()
    def run(self, token_id: int, rope_seq_len: int, ahead: bool = False) -> Tensor:
        """Append one token; the caller advances the cache.

        Args:
            token_id: below vocab_size.
            rope_seq_len: see `RotaryTable.cos_sin`.
            ahead: has no effect: the next step cannot begin before its token is known.

        Returns:
            float32 [vocab_size], a copy.
        """
        start = self._attention.cache.seq_len
        calls, logits = self._calls(self._attention.selects_at(start))
        self._run(calls, token_id, rope_seq_len)
        return logits[0].to(torch.float32, copy=True)

    @torch.inference_mode()
    def try_next(self, token_id: int, rope_seq_len: int) -> None:
        """Run the next step for what it leaves in buffers, with calls of its own; see `DecodeGraph.try_next`."""
        start = self._attention.cache.seq_len
        assert self._attention.cache.takes_in_place(start)
        self._run(self._prepare(self._attention.selects_at(start))[0], token_id, rope_seq_len)

    def _run(self, calls: list[Callable[[], object]], token_id: int, rope_seq_len: int) -> None:
        start = self._attention.cache.seq_len
        self._attention.begin_decode(start, *self._rotary.cos_sin_of(start, rope_seq_len))
        self._hidden.copy_(self._decoder.embedding_of(token_id))
        for call in calls:
            call()

    def next_token_id(self) -> None:
        """The likeliest next token is not looked for."""
        return

    def invalidate(self) -> None:
        """Nothing is kept from one step to the next."""
