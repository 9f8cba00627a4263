"""INT4 weights: symmetric, a bfloat16 step for every 32 inputs of a row, chosen for the least squared error; in torch.

`weight = step * (nibble - 8)`, nibbles 0 to 15. A 4-byte word holds 8 consecutive weights of a row: byte j the weights
j (low nibble) and j + 4 (high nibble), so that `word & 0x0f0f0f0f` and `word & 0xf0f0f0f0` are four weights each, in
order, for the integer products of the GPU kernels.

The step may be negative: the largest weight of a group is near -8 steps, whatever its sign, as in ggml's Q4_0. The
search over steps, with a least-squares fit for every rounding, is ggml's `make_qx_quants` without its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.quant.weight_format import INT4_GROUP, INT4_WORD

# The largest weight is tried at -FACTORS steps. Twice as many lower the error by less than a hundredth of itself.
FACTORS = tuple(-8 / share for share in (1.0, *(0.62 + 0.04 * i for i in range(9)), 1.04))
# Weights that are worked on at a time: what the processor's cache holds; on a GPU, what makes launches cheap.
_PIECE = {"cpu": 2**18, "cuda": 2**21}


def quantize_int4(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quantize `weight` [out_features, in_features] (floating point), a piece at a time.

    A group that holds a NaN or an infinity has a step that is not finite.

    Returns:
        uint8 [out_features, 4 * ceil(in_features / 8)], rows filled up with weights of 0; bfloat16
        [out_features, ceil(in_features / 32)]. Both on `device`.
    """
    data, scale = _empty(*weight.shape, device)
    quantize_int4_into(weight, data, scale)
    return data, scale


def quantize_int4_into(weight: Tensor, data: Tensor, scale: Tensor) -> None:
    """`quantize_int4` into tensors that are there."""
    check_int4(weight, data, scale)
    columns, groups = weight.shape[1], scale.shape[1]
    count = max(1, _PIECE.get(data.device.type, _PIECE["cpu"]) // columns)
    for start in range(0, len(weight), count):
        part = weight[start : start + count].to(data.device, torch.float32)
        grouped = F.pad(part, (0, groups * INT4_GROUP - columns)).view(-1, INT4_GROUP)
        step = _best_step(grouped)
        divisor = step.float()
        codes = grouped.div(divisor.masked_fill_(divisor == 0, 1)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        low, high = codes.view(part.shape[0], -1, 2, 4).unbind(2)
        data[start : start + count] = (low | high << 4).flatten(1)[:, : data.shape[1]]
        scale[start : start + count] = step.view(-1, groups)


Int4Quantizer = Callable[[Tensor, Tensor, Tensor, int | None], None]
"""`quantize_int4_into` with a number of threads: None is torch's."""


class Int4Rows:
    """Rows of an int4 weight on the CPU that are set like those of a tensor, and quantized on the way.

    Attributes:
        data, scale: see `quantize_int4`.
    """

    dtype = torch.float32

    def __init__(self, data: Tensor, scale: Tensor, quantize: Int4Quantizer) -> None:
        self.data, self.scale, self.quantize = data, scale, quantize

    @classmethod
    def empty(cls, rows: int, columns: int, quantize: Int4Quantizer) -> Int4Rows:
        return cls(*_empty(rows, columns, torch.device("cpu")), quantize)

    def __getitem__(self, rows: slice) -> Int4Rows:
        return Int4Rows(self.data[rows], self.scale[rows], self.quantize)

    def __setitem__(self, rows: slice, weight: Tensor) -> None:
        self.quantize(weight, self.data[rows], self.scale[rows], None)

    def index_copy_(self, dim: int, index: Tensor, weight: Tensor) -> None:
        data, scale = _empty(*weight.shape, weight.device)
        self.quantize(weight, data, scale, None)
        self.data.index_copy_(dim, index, data)
        self.scale.index_copy_(dim, index, scale)

    def put_rows(self, first: int, weight: Tensor) -> None:
        """Set the rows from `first` on to `weight` [n, in_features] (floating point), on this thread alone."""
        rows = slice(first, first + len(weight))
        self.quantize(weight.float(), self.data[rows], self.scale[rows], 1)


def _empty(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    data = torch.empty(rows, 4 * -(-columns // INT4_WORD), dtype=torch.uint8, device=device)
    return data, torch.empty(rows, -(-columns // INT4_GROUP), dtype=torch.bfloat16, device=device)


def check_int4(weight: Tensor, data: Tensor, scale: Tensor) -> None:
    """That `data` and `scale` are what int4 stores of a weight of this shape."""
    rows, columns = weight.shape
    assert data.dtype == torch.uint8 and data.shape == (rows, 4 * -(-columns // INT4_WORD)), data.shape
    assert scale.dtype == torch.bfloat16 and scale.shape == (rows, -(-columns // INT4_GROUP)), scale.shape


def _best_step(grouped: Tensor) -> Tensor:
    """bfloat16 [n, 1]: the step with the least squared error for each row of `grouped` (float32 [n, 32])."""
    largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True))
    unit = grouped / largest.masked_fill(largest == 0, 1)  # the largest is 1: nothing here over- or underflows
    best = (largest / -8).bfloat16()
    least = torch.full_like(largest, -torch.inf)
    for factor in FACTORS:
        codes = unit.mul(factor).round_().clamp_(-8, 7)
        cross, square = _row_sums(codes * unit), codes.square().sum(1, keepdim=True)
        step = (cross / square * largest).bfloat16()
        ratio = step.float() / largest
        gain = ratio * (2 * cross - ratio * square)  # the squared error is that of all zeros less this
        better = gain > least
        least, best = torch.where(better, gain, least), torch.where(better, step, best)
    return best


def _row_sums(values: Tensor) -> Tensor:
    """[n, 1] of [n, 32], in an order of our own: torch's differs between processors, and the compiled kernel's must
    not. Sums of whole numbers have none."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values


def dequantize_int4(data: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features] `dtype` from what `quantize_int4` returned; each value rounded once, from its exact
    product."""
    rows, groups = scale.shape
    weight = torch.empty(rows, in_features, dtype=dtype, device=data.device)
    words = data.view(torch.int32)
    count = max(1, _PIECE.get(data.device.type, _PIECE["cpu"]) // in_features)
    for start in range(0, rows, count):
        part = words[start : start + count]
        nibbles = part.new_empty(len(part), groups * INT4_GROUP // INT4_WORD, 2)  # beyond a row's words: cut off below
        torch.bitwise_and(part, 0x0F0F0F0F, out=nibbles[:, : part.shape[1], 0])
        torch.bitwise_and(part >> 4, 0x0F0F0F0F, out=nibbles[:, : part.shape[1], 1])
        codes = nibbles.view(len(part), -1).view(torch.int8).sub_(8).view(len(part), groups, INT4_GROUP)
        product = codes * scale[start : start + count, :, None].float()
        weight[start : start + count] = product.view(len(part), -1)[:, :in_features]
    return weight
