"""INT4 weights: symmetric, a bfloat16 step for every 32 inputs of a row, chosen for the least squared error; in torch.

`weight = step * (nibble - 8)`, nibbles 0 to 15. A 4-byte word holds 8 consecutive weights of a row: byte j the weights
j (low nibble) and j + 4 (high nibble), so that `word & 0x0f0f0f0f` and `word & 0xf0f0f0f0` are four weights each, in
order, for the integer products of the GPU kernels.

The step may be negative: the largest weight of a group is near -8 steps, whatever its sign, as in ggml's Q4_0. The
search over steps, with a least-squares fit for every rounding, is ggml's `make_qx_quants` without its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.quant.weight_format import INT4_GROUP, INT4_WORD

# The largest weight is tried at 8 / SHARES steps. Twice as many lower the error by less than a hundredth of itself.
_SHARES = (1.0, *(0.62 + 0.04 * i for i in range(9)), 1.04)
# Weights that are worked on at a time: what the processor's cache holds; on a GPU, what makes launches cheap.
_PIECE = {"cpu": 2**18, "cuda": 2**21}


def quantize_int4(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quantize `weight` [out_features, in_features] (floating point), a piece at a time.

    A group that holds a NaN or an infinity has a step that is not finite.

    Returns:
        uint8 [out_features, 4 * ceil(in_features / 8)], rows filled up with weights of 0; bfloat16
        [out_features, ceil(in_features / 32)]. Both on `device`.
    """
    rows, columns = weight.shape
    groups = -(-columns // INT4_GROUP)
    data = torch.empty(rows, 4 * -(-columns // INT4_WORD), dtype=torch.uint8, device=device)
    scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=device)
    count = max(1, _PIECE.get(device.type, _PIECE["cpu"]) // columns)
    for start in range(0, rows, count):
        part = weight[start : start + count].to(device, torch.float32)
        grouped = F.pad(part, (0, groups * INT4_GROUP - columns)).view(-1, INT4_GROUP)
        step = _best_step(grouped)
        divisor = step.float()
        codes = grouped.div(divisor.masked_fill_(divisor == 0, 1)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        low, high = codes.view(part.shape[0], -1, 2, 4).unbind(2)
        data[start : start + count] = (low | high << 4).flatten(1)[:, : data.shape[1]]
        scale[start : start + count] = step.view(-1, groups)
    return data, scale


def _best_step(grouped: Tensor) -> Tensor:
    """bfloat16 [n, 1]: the step with the least squared error for each row of `grouped` (float32 [n, 32])."""
    largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True))
    unit = grouped / largest.masked_fill(largest == 0, 1)  # the largest is 1: nothing here over- or underflows
    best = (largest / -8).bfloat16()
    least = torch.full_like(largest, -torch.inf)
    for share in _SHARES:
        codes = unit.mul(-8 / share).round_().clamp_(-8, 7)
        cross, square = (codes * unit).sum(1, keepdim=True), codes.square().sum(1, keepdim=True)
        step = (cross / square * largest).bfloat16()
        ratio = step.float() / largest
        gain = ratio * (2 * cross - ratio * square)  # the squared error is that of all zeros less this
        better = gain > least
        least, best = torch.where(better, gain, least), torch.where(better, step, best)
    return best


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
