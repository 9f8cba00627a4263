"""Queries and keys turned before the keys go into pages, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.rotation import key_rotation

_TOKENS_AT_ONCE = 2048  # bounds the product that stands beside q or k


class KeyRotation:
    """The rotation of `quant.rotation.key_rotation`, in the compute dtype on its device.

    Args:
        head_dim: of queries and keys.
        dtype: theirs; the matrices are exact in it, products are rounded to it.
        device: theirs.
    """

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.for_queries, self.for_keys = (matrix.to(device, dtype) for matrix in key_rotation(head_dim))

    def turn_(self, q: Tensor, k: Tensor) -> None:
        """Turn queries and keys of the same heads after RoPE, in place: no score changes but by rounding.

        Args:
            q: [T, num_heads * group, head_dim]; k: [T, num_heads, head_dim]; any strides with contiguous channels.
        """
        if q.shape[0] == 1:
            for x, matrix in ((q[0], self.for_queries), (k[0], self.for_keys)):
                x.copy_(torch.mm(x, matrix))
            return
        for x, matrix in ((q, self.for_queries), (k, self.for_keys)):
            for part in x.split(_TOKENS_AT_ONCE):
                heads = part.transpose(0, 1)  # a product a head: across heads the rows of q and k are not evenly spaced
                heads.copy_(torch.matmul(heads, matrix))
