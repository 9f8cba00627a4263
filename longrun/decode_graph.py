"""One decoded token on a GPU as one CUDA graph, captured once before the first token and replayed ever after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.model.decoder import Decoder
from longrun.model.rope import RotaryTable

if TYPE_CHECKING:
    from longrun.attention.cuda_backend import CudaAttention


class DecodeGraph:
    """The decoder's step for a single token; positions and lengths are read from device memory.

    Captured when it is made, on the empty cache: what the two trial runs write there is overwritten by the first
    tokens.

    Args:
        decoder: with fused kernels.
        rotary: cos and sin in host memory.
        attention: over an empty cache.
        capture: False runs every step anew, for devices without graphs.
    """

    def __init__(self, decoder: Decoder, rotary: RotaryTable, attention: CudaAttention, capture: bool) -> None:
        assert attention.cache.seq_len == 0 and rotary.device.type == "cpu"
        self._decoder, self._rotary, self._attention = decoder, rotary, attention
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if capture:
            self._capture()

    def _capture(self) -> None:
        self._describe(0, 1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the capture
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()

    def _describe(self, token_id: int, rope_seq_len: int) -> None:
        cos, sin = self._rotary.cos_sin_of(self._attention.cache.seq_len, rope_seq_len)
        self._attention.begin_decode(token_id, cos, sin)

    def _forward(self) -> Tensor:
        token_id = self._attention.state.token_id
        return self._attention.decode_pass(lambda decode: self._decoder.forward_one(token_id, decode))

    @torch.inference_mode()
    def run(self, token_id: int, rope_seq_len: int) -> Tensor:
        """Append one token; the caller advances the cache.

        Args:
            rope_seq_len: see `RotaryTable.cos_sin`.

        Returns:
            float32 [1, vocab_size].
        """
        self._describe(token_id, rope_seq_len)
        if self._graph is None:
            return self._forward()
        self.replay()
        assert self._logits is not None
        return self._logits.clone()

    def replay(self) -> None:
        """The GPU's part of a step alone, without telling it about a new token: for timing."""
        assert self._graph is not None
        self._graph.replay()
