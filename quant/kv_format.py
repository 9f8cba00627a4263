"""The KV page formats and their bytes: plain arithmetic, no torch.

A page holds `page_size` consecutive tokens of one KV head of one layer. Its bytes are in two parts that may live in
different memories:

* the *payload* (quantized keys, quantized values, value scales), which may be offloaded to host memory;
* the *index* (key scales and minima, one pair a channel), which stays on the device: the minimum and the minimum plus
  a scale for every further step are exact channel-wise bounds of the page's dequantized keys, so it doubles as the
  page-selection index of Quest (arXiv 2406.10774) and LServe (arXiv 2502.14866) at no extra byte.

Payload of the quantized formats, in this order (P = page_size, D = head_dim; all little-endian):

    keys    D x P/2 bytes   channel-major; byte j of a channel: token j in the low nibble, token j + P/2 in the high
    values  P x D/2 bytes   token-major; byte j of a token: channel j in the low nibble, channel j + D/2 in the high
    scales  P float16       value scale a token
    minima  P float16       value minimum a token

and the index: D float16 key scales, then D float16 key minima. Keys are quantized per channel over the tokens of the
page (KIVI, arXiv 2402.02750), values per token over the channels; `value = minimum + scale * step`, of 16 steps with
`int4`.

`k5v3` has the same bytes with 32 steps for a key and 8 for a value: keys lose more on a grid than values do
(arXiv 2502.15075). A key's low four bits stand in its nibble of the keys, and its fifth bit is the highest bit of the
values' nibble at the same place: byte n of the values holds in bits 3 and 7 the fifth bits of the low and of the high
nibble of byte n of the keys. The index's upper bound is `min + 31 * scale` here.

Keys of quantized pages are rotated: after RoPE queries and keys are multiplied with the matrices of `quant.rotation`
(signs times Hadamard; QuaRot, arXiv 2404.00456), which leaves the scores as they are. So are the keys of the sink page
and of the tail of the same head, which stand with the pages and become pages. Rings of streaming heads hold keys as
RoPE left them. The index therefore bounds rotated keys, and is to be used with rotated queries. With `k5v3` the values
of the same heads are rotated as well, and their attention's output is rotated back. Rotating is attention's work:
`quant.page_codec` and everything that moves pages take keys and values as they come.

The exact formats (`bf16`, `fp32`) store keys [P, D] and then values [P, D], and have no index.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrun.errors import ConfigError, quoted

KV_FORMATS = ("int4", "k5v3", "bf16", "fp32")
DEFAULT_KV_FORMAT = "k5v3"  # why: docs/experiments.md, "Pages of five-bit keys are the default"
_BITS = {"int4": (4, 4), "k5v3": (5, 3)}  # of a key's and of a value's element
QUANTIZED_KV_FORMATS = tuple(_BITS)
KV_HELP = "format of KV pages; k5v3: keys with 5 bits, values with 3, in int4's bytes"
# What the GPU's kernels over quantized pages serve: head_dims, page_size, and query heads of a KV head at most.
GPU_HEAD_DIMS, GPU_PAGE_SIZE, GPU_MAX_GROUP = (64, 128), 64, 8
PAGE_SIZES = (16, 32, 64, 128, 256)
_EXACT_ITEMSIZE = {"int4": 2, "k5v3": 2, "bf16": 2, "fp32": 4}
_SCALE_ITEMSIZE = 2


@dataclass(frozen=True)
class PageFormat:
    """Layout of one page: `name` of `KV_FORMATS`, `page_size` tokens, `head_dim` channels.

    Raises:
        ConfigError: unknown format name, a page size outside `PAGE_SIZES`, or a head_dim that is not a positive
            multiple of 16.
    """

    name: str
    page_size: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.name not in KV_FORMATS:
            raise ConfigError(f"KV format {quoted(self.name)} is unknown: use one of {', '.join(KV_FORMATS)}")
        if self.page_size not in PAGE_SIZES:
            raise ConfigError(f"page_size {self.page_size} is not supported: use one of {PAGE_SIZES}")
        if self.head_dim <= 0 or self.head_dim % 16:
            raise ConfigError(f"head_dim {self.head_dim} is not supported: it must be a positive multiple of 16")

    @property
    def quantized(self) -> bool:
        return self.name in _BITS

    @property
    def key_bits(self) -> int:
        """Bits of a key's element (quantized formats only): 2^key_bits steps."""
        return _BITS[self.name][0]

    @property
    def value_bits(self) -> int:
        """Bits of a value's element (quantized formats only)."""
        return _BITS[self.name][1]

    @property
    def rotates_keys(self) -> bool:
        """Whether retrieval heads keep rotated keys: pages, sink page and tail, but no ring."""
        return self.quantized

    @property
    def rotates_values(self) -> bool:
        """Whether retrieval heads keep rotated values, too, and attention's output is rotated back: worth it
        with three bits, hardly with four."""
        return self.name == "k5v3"

    @property
    def exact_itemsize(self) -> int:
        """Bytes of an element where the cache keeps exact values: sink page, tail, rings (bf16, or fp32)."""
        return _EXACT_ITEMSIZE[self.name]

    @property
    def keys_bytes(self) -> int:
        if self.quantized:
            return self.page_size * self.head_dim // 2
        return self.page_size * self.head_dim * self.exact_itemsize

    @property
    def values_offset(self) -> int:
        return self.keys_bytes

    @property
    def value_scales_offset(self) -> int:
        """Offset of the value scales (quantized formats only); the minima follow them."""
        assert self.quantized
        return 2 * self.keys_bytes

    @property
    def payload_bytes(self) -> int:
        scales = 2 * self.page_size * _SCALE_ITEMSIZE if self.quantized else 0
        return 2 * self.keys_bytes + scales

    @property
    def index_bytes(self) -> int:
        return 2 * self.head_dim * _SCALE_ITEMSIZE if self.quantized else 0

    @property
    def page_bytes(self) -> int:
        """Payload and index together: what one page costs (8,960 B quantized at head_dim 128, page_size 64)."""
        return self.payload_bytes + self.index_bytes

    @property
    def exact_page_bytes(self) -> int:
        """Keys and values of one page kept exact: the sink page of quantized caches, and the tail of every cache."""
        return 2 * self.page_size * self.head_dim * self.exact_itemsize

    @property
    def sink_pages(self) -> int:
        """How many leading pages a retrieval head keeps exact outside the pools: one where pages are quantized, none
        otherwise."""
        return 1 if self.quantized else 0

    def closed_pages(self, seq_len: int) -> int:
        """Pages of a head that have left the tail at `seq_len` tokens, the sink page counted in.

        The tail is flushed when the next token needs its room, so a full page may still stand in it.
        """
        return max(0, -(-seq_len // self.page_size) - 1)

    def tail_tokens(self, seq_len: int) -> int:
        """Tokens of a head that stand in the tail at `seq_len` tokens."""
        return seq_len - self.closed_pages(seq_len) * self.page_size

    def pooled_pages(self, seq_len: int) -> int:
        """Pages of a head that stand in a pool at `seq_len` tokens: closed pages less the sink page."""
        return max(0, self.closed_pages(seq_len) - self.sink_pages)
