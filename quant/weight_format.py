"""Weight formats of linear layers and their bytes: plain arithmetic, no torch.

* `fp32`, `bf16`: the weight as it is.
* `int8`: weight-only, symmetric, one float32 scale an output row (`weight = scale / 127 * int8`).
* `nf4`: 4-bit NormalFloat of QLoRA (arXiv 2305.14314), two values a byte, one float32 maximum for every 64 values in
  row-major order, as bitsandbytes stores it.
* `int4`: 4-bit, symmetric, one bfloat16 step for every 32 inputs of a row; a row is filled up to whole words of 8
  weights. See `longrun.quant.int4_weight`. Nothing but the number of bits in common with the page format of that name.

Biases stay in the compute dtype. Embedding and lm_head are float32 with `fp32` and bf16 with all others: a CPU that
computes in float32 would read twice the bytes for nothing that quantized linears leave to be seen.
"""

from __future__ import annotations

from longrun.errors import ConfigError, quoted

WEIGHT_FORMATS = ("fp32", "bf16", "int8", "nf4", "int4")
NF4_GROUP = 64
INT4_GROUP = 32
INT4_WORD = 8  # weights of 4 bytes
_SCALE_ITEMSIZE = 4
_INT4_SCALE_ITEMSIZE = 2


def check_weight_format(weight_format: str) -> None:
    """Raise `ConfigError` for a name outside `WEIGHT_FORMATS`."""
    if weight_format not in WEIGHT_FORMATS:
        raise ConfigError(f"weight format {quoted(weight_format)} is unknown: use one of {', '.join(WEIGHT_FORMATS)}")


def is_quantized(weight_format: str) -> bool:
    """Whether a product of many rows works on a dequantized copy of the weight."""
    check_weight_format(weight_format)
    return weight_format not in ("fp32", "bf16")


def compute_itemsize(weight_format: str, device_type: str) -> int:
    """Bytes of an element of activations, embeddings and norms: 4 (float32) or 2 (bf16).

    `fp32` and `bf16` compute in their own dtype everywhere; the quantized formats compute in bf16 on a GPU and in
    float32 on a CPU, where it is the faster of the two.

    Raises:
        ConfigError: unknown weight format or device type.
    """
    check_weight_format(weight_format)
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"device type {quoted(device_type)} is not supported: use cpu or cuda")
    if weight_format == "fp32":
        return 4
    if weight_format == "bf16":
        return 2
    return 4 if device_type == "cpu" else 2


def table_itemsize(weight_format: str) -> int:
    """Bytes of an element of the embedding and the lm_head: 4 for `fp32`, else 2 (bf16), also where a CPU computes in
    float32.

    Raises:
        ConfigError: unknown weight format.
    """
    check_weight_format(weight_format)
    return 4 if weight_format == "fp32" else 2


def linear_tensors(
    out_features: int, in_features: int, weight_format: str, compute_itemsize: int, bias: bool
) -> tuple[int, ...]:
    """Bytes of each tensor of one linear layer of weight [out_features, in_features]: the bias where there is one,
    the weight, and its scales where the format has them.

    Raises:
        ConfigError: unknown weight format.
    """
    check_weight_format(weight_format)
    count = out_features * in_features
    weight: tuple[int, ...] = (count * (4 if weight_format == "fp32" else 2),)
    if weight_format == "int8":
        weight = (count, _SCALE_ITEMSIZE * out_features)
    elif weight_format == "nf4":
        weight = (-(-count // 2), _SCALE_ITEMSIZE * -(-count // NF4_GROUP))
    elif weight_format == "int4":
        words, groups = -(-in_features // INT4_WORD), -(-in_features // INT4_GROUP)
        weight = (out_features * 4 * words, out_features * _INT4_SCALE_ITEMSIZE * groups)
    return (compute_itemsize * out_features, *weight) if bias else weight


def linear_bytes(out_features: int, in_features: int, weight_format: str, compute_itemsize: int, bias: bool) -> int:
    """The sum of `linear_tensors`. Raises the same."""
    return sum(linear_tensors(out_features, in_features, weight_format, compute_itemsize, bias))
