"""Page digests in torch: the ground truth that every kernel is tested against.

Sums go in pairs, element by element, so that a page's digest is the same to the last bit whichever pages stand next to
it in a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.quant.digest_format import DigestFormat
from longrun.quant.rotation import hadamard_product, rotation_scales

_LAST_HALF = 15
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16, above 0


def encode_digest(keys: Tensor, fmt: DigestFormat) -> Tensor:
    """The digests of pages.

    Args:
        keys: [..., page_size, head_dim], any float dtype, finite: keys as the page stores them, dequantized; rotated.

    Returns:
        uint8 [..., page_bytes], as `quant.digest_format` lays it out.
    """
    assert keys.shape[-2:] == (fmt.page_size, fmt.head_dim), (keys.shape, fmt)
    grouped = keys.float().unflatten(-2, (fmt.groups, fmt.group_size))
    query_scale, _ = rotation_scales(fmt.head_dim)
    low, high = (hadamard_product(grouped) * query_scale).aminmax(dim=-2)  # up to signs, which no range depends on
    centre, centre_scale = _quantize(_pairwise_sum(grouped) / fmt.group_size, fmt.last_centre)
    half, half_scale = _quantize((high - low) / 2, _LAST_HALF)
    centre_bytes = centre.view(torch.uint8) if fmt.centre_bits == 8 else _pack(centre + 8)
    scales = torch.stack((centre_scale, half_scale), dim=-1).view(torch.uint8)
    return torch.cat((centre_bytes, _pack(half), scales), dim=-1).flatten(-2)


def decode_digest(digest: Tensor, fmt: DigestFormat) -> tuple[Tensor, Tensor]:
    """What digests stand for.

    Args:
        digest: uint8 [..., page_bytes].

    Returns:
        centre: float32 [..., groups, head_dim], the mean of the group's rotated keys.
        half: float32 [..., groups, head_dim], half of each channel's range with the rotation undone.
    """
    grouped = digest.unflatten(-1, (fmt.groups, fmt.group_bytes))
    parts = (fmt.half_offset, fmt.scales_offset - fmt.half_offset, fmt.group_bytes - fmt.scales_offset)
    centre, half, scales = grouped.split(parts, dim=-1)
    codes = centre.view(torch.int8) if fmt.centre_bits == 8 else _unpack(centre).to(torch.int8) - 8
    scales = scales.contiguous().view(torch.float16).float()
    return codes * scales[..., :1], _unpack(half) * scales[..., 1:]


def _pairwise_sum(x: Tensor) -> Tensor:
    """The sum over the dimension before the last, a power of two long."""
    while x.shape[-2] > 1:
        low, high = x.chunk(2, dim=-2)
        x = low + high
    return x.squeeze(-2)


def _quantize(x: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Codes (int8 [..., channels], at most `last`) and the scale (float16 [...]) that was rounded before them."""
    # times the reciprocal: what torch on a GPU makes of a division by a number
    scale = (x.abs().amax(dim=-1) * (1 / last)).clamp(_SMALLEST, _LARGEST).half()
    codes = (x / scale[..., None].float()).round_().clamp_(-last, last)
    return codes.to(torch.int8), scale


def _pack(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1)
