"""Queries and keys turned before the keys go into pages, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.rotation import key_rotation

_TOKENS_AT_ONCE = 2048  # bounds the product that stands beside q or k


class KeyRotation:
    """The rotation of `quant.rotation.key_rotation`, in the compute dtype on its device: two matrices of head_dim^2
    elements, which the plan counts among its small tensors.

    Args:
        head_dim: of queries and keys.
        dtype: theirs; the matrices are exact in it, products are rounded to it.
        device: theirs.
    """

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.for_queries, self.for_keys = (matrix.to(device, dtype) for matrix in key_rotation(head_dim))

    def turn_(self, q: Tensor, k: Tensor, num_heads: int) -> None:
        """Turn the first KV heads' keys and their queries after RoPE, in place: no score changes but by rounding.

        Args:
            q: [T, num_qo_heads, head_dim]; k: [T, num_kv_heads, head_dim]; any strides with contiguous channels.
            num_heads: KV heads that are turned, with the query heads of their groups.
        """
        group = q.shape[1] // k.shape[1]
        for x, count, matrix in ((q, num_heads * group, self.for_queries), (k, num_heads, self.for_keys)):
            if x.shape[0] == 1:  # decode pays for every small operation
                row = x[0, :count]
                row.copy_(torch.mm(row, matrix))
                continue
            for part in x[:, :count].split(_TOKENS_AT_ONCE):
                heads = part.transpose(0, 1)  # a product a head, whose rows are evenly spaced: nothing is copied for it
                heads.copy_(torch.matmul(heads, matrix))
