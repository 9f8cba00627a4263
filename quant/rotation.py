"""Rotations that spread a head's outlier channels over all of them: random signs times a Hadamard matrix.

Queries and keys are both rotated after RoPE, which leaves every score as it was, and rotated keys lose less on the grid
of a page (QuaRot, arXiv 2404.00456, for keys as KIVI, arXiv 2402.02750, quantizes them). The Hadamard matrix is
Sylvester's: H_2n = [[H_n, H_n], [H_n, -H_n]], element (i, j) the parity of the bits that i and j share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.errors import InputError

ROTATION_SEED = 0


def random_signs(head_dim: int, seed: int = ROTATION_SEED) -> Tensor:
    """float32 [head_dim] in host memory, every element 1 or -1."""
    drawn = torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(seed))
    return (drawn * 2 - 1).float()


def hadamard_rotation(head_dim: int, seed: int) -> Tensor:
    """A randomized Hadamard matrix: random signs times the Sylvester matrix over sqrt(head_dim), so orthogonal.

    Returns:
        float32 [head_dim, head_dim] in host memory; rows of tokens are rotated by `x @ matrix`.

    Raises:
        InputError: head_dim is no power of two.
    """
    if head_dim & (head_dim - 1):
        raise InputError(
            f"head_dim {head_dim} has no Hadamard matrix here, it must be a power of two: use formats without -rot"
        )
    return random_signs(head_dim, seed)[:, None] * _sylvester(head_dim) / head_dim**0.5


def key_rotation(head_dim: int) -> tuple[Tensor, Tensor]:
    """What queries and keys are multiplied with before keys go into pages, `x @ matrix`: see `rotation_of`.

    Returns:
        for_queries, for_keys: float32 [head_dim, head_dim] in host memory.
    """
    return rotation_of(random_signs(head_dim))


def rotation_of(signs: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation that these signs choose: `for_queries @ for_keys.T` is the identity, exactly.

    All elements of a matrix are one power of two or its negative (and zeros outside the blocks), so they are exact in
    bfloat16 and float16 and the scale rounds nothing. Where the Hadamard matrix has an odd power of two of rows, its
    square root is split unevenly (`rotation_scales`). A head_dim that is no power of two is rotated in blocks of the
    largest power of two that divides it.

    Args:
        signs: float32 [head_dim] of 1 and -1, on any device.

    Returns:
        for_queries, for_keys: float32 [head_dim, head_dim] on the device of `signs`.
    """
    head_dim = signs.shape[0]
    block = _block(head_dim)
    matrix = torch.block_diag(*[_sylvester(block)] * (head_dim // block)).to(signs.device) * signs[:, None]
    query_scale, key_scale = rotation_scales(head_dim)
    return matrix * query_scale, matrix * key_scale


def rotation_scales(head_dim: int) -> tuple[float, float]:
    """The powers of two by which signs times Sylvester's matrix are multiplied for queries and for keys: together one
    over the matrix's rows, and equal where that is a square."""
    power = _block(head_dim).bit_length() - 1
    return 2.0 ** -(power // 2), 2.0 ** -((power + 1) // 2)


def hadamard_product(x: Tensor) -> Tensor:
    """Rows times the matrix of `rotation_of` without its signs and scales (which is symmetric), by sums and
    differences of pairs: a row's result does not depend on the rows beside it.

    Args:
        x: float32 [..., head_dim], on any device.
    """
    block, half = _block(x.shape[-1]), 1
    while half < block:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x


def _block(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


def _sylvester(size: int) -> Tensor:
    """float32 [size, size] of 1 and -1, symmetric; size is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix
