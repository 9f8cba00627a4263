"""The interface between decoder and attention: one `Step` a forward pass, one `run` a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Step:
    """One forward pass over `num_tokens` consecutive tokens of the one sequence.

    Attributes:
        start: position of the first token.
        num_tokens: T, the number of tokens.
        cos, sin: [T, head_dim] float32 on the compute device, made once a step by the rotary table.
        selects: of one token: it reads the pages that are selected for it, where the cache selects any.
        sparse: of several: their tiles read chosen pages of the past alone, see `longrun.attention.sparse_past`.
    """

    start: int
    num_tokens: int
    cos: Tensor
    sin: Tensor
    selects: bool = False
    sparse: bool = False


class Attention(Protocol):
    """Attention over everything seen so far; owns the cache."""

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Append `k`, `v` to the cache of layer `layer_idx` and attend.

        Heads come in the permuted order of the layer: retrieval KV heads first, then streaming heads; the query heads
        of a group stand together in the order of their KV heads.

        Args:
            layer_idx: layer, from 0.
            q: [T, num_qo_heads, head_dim], after RoPE, compute dtype.
            k, v: [T, num_kv_heads, head_dim], k after RoPE. q, k and v may be strided views of one buffer that the
                next layer overwrites: whatever is kept must be copied. q and k may be overwritten here (with pages
                that hold rotated keys they are): callers do not read them afterwards.
            step: the forward pass they belong to.

        Returns:
            [T, num_qo_heads, head_dim], compute dtype, heads in the order of `q`.
        """
        ...


class FusedDecode(Protocol):
    """Attention for one token, from the fused projection on; on a GPU in a form that a CUDA graph can replay: nothing
    depends on host values."""

    def decode(self, layer_idx: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> Tensor:
        """Head norms, RoPE, append and attend, for the token that `begin_decode` described.

        Args:
            qkv: [1, (num_qo_heads + 2 * num_kv_heads) * head_dim] as the projection leaves it, compute dtype.
            q_norm, k_norm: [head_dim] weights of the head norms, or None; eps: theirs.

        Returns:
            [1, num_qo_heads * head_dim], compute dtype.
        """
        ...
