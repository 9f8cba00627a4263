"""KV page formats that a comparison simulates: their names, what they quantize along, and the bytes they would take.

Plain arithmetic, no torch; `longrun.lab.quality.simulation` puts pages onto a format's grid. A name reads

    sim:k4-channel-rot/v4       our own INT4 pages: keys rotated by a randomized Hadamard matrix and quantized per
                                channel over a page's tokens, values per token
    sim:k4-channel/v4           the same with plain keys
    sim:k4-token-rot/v3-rot     keys per token, both rotated, values with 3 bits

Whatever a format says, groups are those of our own pages (`quant.kv_format`): the tokens of a page for keys per
channel, head_dim channels for keys and values per token, with a scale and a minimum in float16 a group.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from longrun.errors import InputError, quoted

PREFIX = "sim:"
KEY_BITS = (8, 5, 4, 3, 2)
VALUE_BITS = (4, 3, 2)
_GROUP_BYTES = 2 * 2  # scale and minimum, float16 each

KeysPer = Literal["channel", "token"]


@dataclass(frozen=True)
class SimulatedFormat:
    """What a simulated page quantizes, and how.

    Attributes:
        key_bits, value_bits: of one element, of `KEY_BITS` and `VALUE_BITS`.
        keys_per: keys share scale and minimum per "channel" over the tokens of a page (KIVI, arXiv 2402.02750), or
            per "token" over head_dim; values always per token.
        rotate_keys, rotate_values: quantized after a product with a randomized Hadamard matrix (QuaRot, arXiv
            2404.00456), which is undone in reading: the same scores as with rotated queries.
    """

    key_bits: int
    keys_per: KeysPer
    rotate_keys: bool
    value_bits: int
    rotate_values: bool

    @property
    def name(self) -> str:
        """As settings files write it."""
        keys = f"k{self.key_bits}-{self.keys_per}{'-rot' if self.rotate_keys else ''}"
        return f"{PREFIX}{keys}/v{self.value_bits}{'-rot' if self.rotate_values else ''}"

    @property
    def rotates(self) -> bool:
        return self.rotate_keys or self.rotate_values

    def payload_bytes(self, page_size: int, head_dim: int) -> int:
        """Bytes of a page's elements, packed without a gap."""
        return page_size * head_dim * (self.key_bits + self.value_bits) // 8

    def scale_bytes(self, page_size: int, head_dim: int) -> int:
        """Bytes of a page's scales and minima. The rotation costs none: one matrix serves all pages."""
        key_groups = head_dim if self.keys_per == "channel" else page_size
        return _GROUP_BYTES * (key_groups + page_size)

    def page_bytes(self, page_size: int, head_dim: int) -> int:
        """Payload and scales: what a page of one KV head would cost."""
        return self.payload_bytes(page_size, head_dim) + self.scale_bytes(page_size, head_dim)

    def described(self, page_size: int, head_dim: int, num_heads: int) -> dict[str, Any]:
        """JSON-able; bytes are computed, nothing of that size was held.

        Args:
            num_heads: KV heads that keep pages, over all layers.
        """
        page = self.page_bytes(page_size, head_dim)
        return {
            "format": self.name,
            "page_size": page_size,
            "payload_bytes": self.payload_bytes(page_size, head_dim),
            "scale_bytes": self.scale_bytes(page_size, head_dim),
            "page_bytes": page,
            "bytes_per_token": num_heads * page / page_size,
            "bytes_are": "computed by the format's spec, not measured: the row held bf16 pages",
        }


_FORMATS: dict[str, SimulatedFormat] = {
    fmt.name: fmt
    for fmt in (
        SimulatedFormat(key_bits, keys_per, rotate_keys, value_bits, rotate_values)
        for key_bits, keys_per, rotate_keys, value_bits, rotate_values in product(
            KEY_BITS, ("channel", "token"), (False, True), VALUE_BITS, (False, True)
        )
    )
}
SIMULATED_FORMATS = tuple(_FORMATS)


def is_simulated(name: str) -> bool:
    """Whether a row's `kv` means a simulated format, known or not."""
    return name.startswith(PREFIX)


def simulated_format(name: str) -> SimulatedFormat:
    """The simulated format of that name.

    Raises:
        InputError: there is none; the message has the nearest name.
    """
    if name not in _FORMATS:
        nearest = difflib.get_close_matches(name, SIMULATED_FORMATS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"simulated format {quoted(name)} is unknown: write {PREFIX}k4-channel/v4 with 8, 5, 4, 3 or 2 bits for "
            f"keys and "
            f"4, 3 or 2 for values, keys per channel or token, and -rot after what is rotated (nearest: {nearest})"
        )
    return _FORMATS[name]
