"""What attention needs beside the cache: scratch for dequantized pages and the live tensors of one chunk.

Plain arithmetic without torch, so that the planner can add it.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_SCRATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class AttentionSpec:
    """Buffers of the attention backend.

    Attributes:
        scratch_tokens: past tokens dequantized at a time in prefill (design: blockwise, merged by log-sum-exp).
        max_retrieval_heads: the most retrieval heads that any layer has.
        num_qo_heads, num_kv_heads, head_dim: shape of one layer's attention.
        compute_itemsize: bytes of an activation element (4 for float32, 2 for bf16).
        chunk_size: the most tokens of one forward pass.
        recent_size, sink_size: the streaming heads' window.
    """

    scratch_tokens: int
    max_retrieval_heads: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    compute_itemsize: int
    chunk_size: int
    sink_size: int
    recent_size: int

    def scratch_bytes(self) -> int:
        """Keys and values of `scratch_tokens` tokens of the retrieval heads, allocated once."""
        return 2 * self.max_retrieval_heads * self.scratch_tokens * self.head_dim * self.compute_itemsize

    def activation_bytes(self) -> int:
        """Upper estimate of the live tensors of one chunk: contiguous q, k, v, two partial outputs with their
        log-sum-exp, keys and values repeated over the query group, and the streaming heads' band."""
        row = self.num_qo_heads * self.head_dim * self.compute_itemsize
        lse = self.num_qo_heads * 8
        band = 2 * self.num_kv_heads * (self.sink_size + self.recent_size) * self.head_dim * self.compute_itemsize
        return self.chunk_size * (5 * row + 2 * lse) + band
