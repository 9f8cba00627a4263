"""Pages to bytes and back in torch: the ground truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.kv_format import PageFormat

EXACT_DTYPES = {"int4": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


def exact_dtype(fmt: PageFormat) -> torch.dtype:
    """dtype of what the cache keeps unquantized (sink page, tail, rings), and of keys and values as attention sees
    them: bfloat16 for `int4` and `bf16`, float32 for `fp32`."""
    return EXACT_DTYPES[fmt.name]


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 4-bit groups along `dim`: nibbles (uint8), scale and minimum (float16, `dim` removed).

    Nibbles are chosen against the rounded scale and minimum, so that rounding those costs nothing twice.
    """
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    minimum = low.half()
    scale = ((high - minimum.float()) / 15).clamp_min(0).half()
    step = scale.float()
    nibbles = ((x - minimum.float()) / torch.where(step == 0, 1.0, step)).round_().clamp_(0, 15)
    return nibbles.to(torch.uint8), scale.squeeze(dim), minimum.squeeze(dim)


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
    keys, key_scale, key_min = _quantize(k, dim=-2)
    keys = keys.transpose(-1, -2)
    packed = keys[..., :half_page] | keys[..., half_page:] << 4
    payload[..., : fmt.values_offset] = packed.reshape(*lead, -1)
    values, value_scale, value_min = _quantize(v, dim=-1)
    packed = values[..., :half_dim] | values[..., half_dim:] << 4
    payload[..., fmt.values_offset : fmt.value_scales_offset] = packed.reshape(*lead, -1)
    payload[..., fmt.value_scales_offset :] = torch.cat((value_scale, value_min), dim=-1).view(torch.uint8)
    return payload, torch.stack((key_scale, key_min), dim=-2)


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()


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
    keys = _unpack(payload[..., : fmt.values_offset].reshape(*lead, dim, size // 2))
    scale, minimum = index[..., 0, :, None].float(), index[..., 1, :, None].float()
    k = (minimum + scale * keys).transpose(-1, -2)
    values = _unpack(payload[..., fmt.values_offset : fmt.value_scales_offset].reshape(*lead, size, dim // 2))
    scales = payload[..., fmt.value_scales_offset :].contiguous().view(torch.float16).float()
    v = scales[..., size:, None] + scales[..., :size, None] * values
    return k, v
