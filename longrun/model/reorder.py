"""A loaded decoder with its KV heads in another order.

A head split changes no weight: it only orders the rows of q, k and v (and of their biases) and the columns of the
output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from longrun.errors import InputError
from longrun.model.decoder import Decoder, DecoderKernels, DecoderLayer
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import is_quantized


def reordered_bytes(decoder: Decoder, permutation: Sequence[Sequence[int]]) -> int:
    """Bytes that `reordered` would copy; 0 where no head moves.

    Raises:
        InputError: heads of quantized weights would have to move.
    """
    found = 0
    for layer, old, new in zip(decoder.layers, decoder.permutation, permutation, strict=True):
        if _move(old, new) is None:
            continue
        if is_quantized(layer.qkv.weight_format):
            raise InputError(
                f"{layer.qkv.weight_format} weights cannot be put into the order of another head split once they are "
                f"loaded: load the model with this head map, or load it with weight_format bf16 or fp32"
            )
        found += sum(tensor.nbytes for tensor in layer.qkv.tensors()) + layer.out.data.nbytes
    return found


def reordered(decoder: Decoder, permutation: Sequence[Sequence[int]], kernels: DecoderKernels | None) -> Decoder:
    """The decoder with its KV heads in the order of `permutation`; whatever does not move is shared.

    Args:
        decoder: its weights are fp32 or bf16, unless nothing moves.
        permutation: per layer, the checkpoint's index of each KV head in its new place.
        kernels: fused kernels for it, or None for plain torch.
    """
    moves = [_move(old, new) for old, new in zip(decoder.permutation, permutation, strict=True)]
    layers = [_moved(layer, move, decoder) for layer, move in zip(decoder.layers, moves, strict=True)]
    return decoder.with_layers(permutation, layers, kernels)


def _move(old: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """Where the head of each new place stands now; None where all stay."""
    return None if list(old) == list(new) else [list(old).index(head) for head in new]


def _moved(layer: DecoderLayer, move: list[int] | None, decoder: Decoder) -> DecoderLayer:
    if move is None:
        return layer
    config, device = decoder.config, decoder.device
    heads = torch.tensor(move, device=device)

    def channels(width: int) -> torch.Tensor:
        return (heads[:, None] * width + torch.arange(width, device=device)).flatten()

    q, kv = channels(config.head_dim * config.group_size), channels(config.head_dim)
    rows = torch.cat((q, config.q_size + kv, config.q_size + config.kv_size + kv))
    return replace(layer, qkv=_taken(layer.qkv, 0, rows), out=_taken(layer.out, 1, q))


def _taken(linear: QuantLinear, dim: int, order: torch.Tensor) -> QuantLinear:
    assert not is_quantized(linear.weight_format)
    bias = linear.bias if linear.bias is None or dim == 1 else linear.bias[order]
    return QuantLinear(linear.data.index_select(dim, order), linear.weight_format, bias, linear.compute_dtype)
