"""The layout of a page digest and its bytes: plain arithmetic, no torch.

A digest says in a few bytes which keys a page holds, so that decoding can choose pages without reading them (digests
of ArkVale, NeurIPS 2024). It comes in groups of `group_size` consecutive tokens; of each group it keeps

* the *centre*: the mean of the keys as the page stores them, rotated (`quant.rotation`);
* the *half*: half the range of every channel of the keys with their rotation undone. RoPE stays on both.

A rotated query q is worth `softmax_scale * (q . centre + lam * |q unrotated| . half)` with a group. Both are quantized
with one scale a group, `value = code * scale`; bytes of a group, in this order (D = head_dim):

    centre  D bytes     int8, -127 to 127; or D/2 bytes of codes -7 to 7 plus 8, byte j: channel j in the low nibble,
                        channel j + D/2 in the high
    half    D/2 bytes   codes 0 to 15, the same order of nibbles
    scales  2 float16   of the centre, of the half; little-endian

A digest is a function of the stored page alone, and so never saved.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrun.errors import ConfigError

DIGEST_HEAD_DIMS = (64, 128)
_SCALES_BYTES = 4


@dataclass(frozen=True)
class DigestFormat:
    """Digest of a page of `page_size` tokens and `head_dim` channels, in groups of `group_size` tokens.

    Raises:
        ConfigError: a head_dim outside `DIGEST_HEAD_DIMS`.
    """

    page_size: int
    head_dim: int
    group_size: int = 16
    centre_bits: int = 4  # 8 lose 0.2 to 0.3 points less attention for half as many bytes more: docs/selection.md

    def __post_init__(self) -> None:
        assert self.centre_bits in (4, 8) and self.page_size % self.group_size == 0
        if self.head_dim not in DIGEST_HEAD_DIMS:
            raise ConfigError(
                f"head_dim {self.head_dim} has no page digests, and pages cannot be selected without: use a model "
                f"with {DIGEST_HEAD_DIMS[0]} or {DIGEST_HEAD_DIMS[1]}, or turn selection off"
            )

    @property
    def groups(self) -> int:
        """Groups of a page."""
        return self.page_size // self.group_size

    @property
    def last_centre(self) -> int:
        """The largest code of a centre."""
        return 2 ** (self.centre_bits - 1) - 1

    @property
    def half_offset(self) -> int:
        """Where a group's half codes begin: behind its centre's."""
        return self.head_dim * self.centre_bits // 8

    @property
    def scales_offset(self) -> int:
        """Where a group's scales begin."""
        return self.half_offset + self.head_dim // 2

    @property
    def group_bytes(self) -> int:
        return self.scales_offset + _SCALES_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's digest (528 B at head_dim 128 and page_size 64; 784 B with 8 bits a centre)."""
        return self.groups * self.group_bytes
