"""Pages to bytes and back in torch: the ground truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.kv_format import PageFormat

EXACT_DTYPES = {"int4": torch.bfloat16, "k5v3": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


def exact_dtype(fmt: PageFormat) -> torch.dtype:
    """dtype of what the cache keeps unquantized (sink page, tail, rings), and of keys and values as attention sees
    them: bfloat16, or float32 for `fp32`."""
    return EXACT_DTYPES[fmt.name]


def _quantize(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric groups along `dim`: steps (uint8, below 2^bits), scale and minimum (float16, `dim` removed).

    Steps are chosen against the rounded scale and minimum, so that rounding those costs nothing twice.
    """
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    minimum = low.half()
    last = 2**bits - 1
    scale = ((high - minimum.float()) / last).clamp_min(0).half()
    step = scale.float()
    steps = ((x - minimum.float()) / torch.where(step == 0, 1.0, step)).round_().clamp_(0, last)
    return steps.to(torch.uint8), scale.squeeze(dim), minimum.squeeze(dim)


def encode_pages(k: Tensor, v: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor | None]:
    """Quantize full pages.

    Args:
        k, v: [..., page_size, head_dim], any float dtype, finite.
        fmt: the page format.

    Returns:
        payload: uint8 [..., payload_bytes] as `quant.kv_format` lays it out.
        index: float16 [..., 2, head_dim] (scales, minima), or None for the exact formats.
    """
    assert k.shape == v.shape and k.shape[-2:] == (fmt.page_size, fmt.head_dim), (k.shape, fmt)
    lead, half_page, half_dim = k.shape[:-2], fmt.page_size // 2, fmt.head_dim // 2
    if not fmt.quantized:
        both = torch.stack((k, v), dim=-3).to(exact_dtype(fmt))
        return both.reshape(*lead, -1).view(torch.uint8), None
    payload = torch.empty(*lead, fmt.payload_bytes, dtype=torch.uint8, device=k.device)
    keys, key_scale, key_min = _quantize(k, -2, fmt.key_bits)
    low, high = keys.transpose(-1, -2).split(half_page, dim=-1)
    payload[..., : fmt.values_offset] = (low & 15 | high << 4).reshape(*lead, -1)
    values, value_scale, value_min = _quantize(v, -1, fmt.value_bits)
    packed = (values[..., :half_dim] | values[..., half_dim:] << 4).reshape(*lead, -1)
    if fmt.key_bits == 5:
        packed |= ((low >> 4) << 3 | (high >> 4) << 7).reshape(*lead, -1)
    payload[..., fmt.values_offset : fmt.value_scales_offset] = packed
    payload[..., fmt.value_scales_offset :] = torch.cat((value_scale, value_min), dim=-1).view(torch.uint8)
    return payload, torch.stack((key_scale, key_min), dim=-2)


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def decode_pages(payload: Tensor, index: Tensor | None, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """The keys and values that pages stand for, float32 [..., page_size, head_dim] each.

    Args:
        payload: uint8 [..., payload_bytes]; index: float16 [..., 2, head_dim], or None for the exact formats.
    """
    lead, size, dim = payload.shape[:-1], fmt.page_size, fmt.head_dim
    if not fmt.quantized:
        both = payload.contiguous().view(exact_dtype(fmt)).reshape(*lead, 2, size, dim).float()
        return both.select(-3, 0), both.select(-3, 1)
    assert index is not None
    key_bytes, value_bytes = payload[..., : fmt.value_scales_offset].split(fmt.values_offset, dim=-1)
    keys = _unpack(key_bytes.reshape(*lead, dim, size // 2))
    values = _unpack(value_bytes.reshape(*lead, size, dim // 2))
    if fmt.key_bits == 5:
        keys |= (_unpack(value_bytes.reshape(*lead, dim, size // 2)) & 8) << 1
        values &= 7
    scale, minimum = index[..., 0, :, None].float(), index[..., 1, :, None].float()
    k = (minimum + scale * keys).transpose(-1, -2)
    scales = payload[..., fmt.value_scales_offset :].contiguous().view(torch.float16).float()
    v = scales[..., size:, None] + scales[..., :size, None] * values
    return k, v
