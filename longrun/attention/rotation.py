"""Rotates queries, keys and values before they go into pages, and rotates attention's output back; in place."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.kv_format import PageFormat
from longrun.quant.rotation import key_rotation

_TOKENS_AT_ONCE = 2048  # bounds the product, which is a copy of a part of q or k


class HeadRotation:
    """The rotation of `quant.rotation.key_rotation`, in the compute dtype on its device: two matrices of head_dim^2
    elements, which the plan counts among its small tensors.

    Args:
        fmt: of the pages: whether values are rotated, too, and head_dim.
        dtype: of queries, keys and values; the matrices are exact in it, products are rounded to it.
        device: theirs.
    """

    def __init__(self, fmt: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
        assert fmt.rotates_keys
        self.rotates_values = fmt.rotates_values
        self.for_queries, self.for_keys = (matrix.to(device, dtype) for matrix in key_rotation(fmt.head_dim))

    def rotate_(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
        """Rotate the first KV heads' keys and their queries after RoPE, in place: no score changes but by rounding; and
        their values, where the pages' format says so.

        Args:
            q: [T, num_qo_heads, head_dim]; k, v: [T, num_kv_heads, head_dim]; any strides with contiguous channels.
            num_heads: KV heads that are rotated, with the query heads of their groups.
        """
        _multiply_(q[:, : num_heads * (q.shape[1] // k.shape[1])], self.for_queries)
        _multiply_(k[:, :num_heads], self.for_keys)
        if self.rotates_values:
            _multiply_(v[:, :num_heads], self.for_keys)

    def unrotate_(self, out: Tensor, num_qo_heads: int) -> None:
        """Undo the values' rotation in the first query heads of out [T, heads, head_dim], in place."""
        if self.rotates_values:
            _multiply_(out[:, :num_qo_heads], self.for_queries.T)


def _multiply_(x: Tensor, matrix: Tensor) -> None:
    """x [T, heads, head_dim] @ matrix, in place."""
    if x.shape[0] == 1:  # decode pays for every small operation
        row = x[0]
        row.copy_(torch.mm(row, matrix))
        return
    for part in x.split(_TOKENS_AT_ONCE):
        heads = part.transpose(0, 1)  # a product a head, whose rows are evenly spaced: nothing is copied for it
        heads.copy_(torch.matmul(heads, matrix))
