"""What the decoder's weights and activations cost, from the model's shape alone: plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longrun.config.model_config import ModelConfig
from longrun.quant.weight_format import compute_itemsize, is_quantized, linear_bytes, linear_tensors, table_itemsize

__all__ = [
    "HEAD_PIECE",
    "TOKEN_SLICE",
    "TOKEN_SLICES",
    "ModelWork",
    "activation_bytes",
    "compute_itemsize",
    "model_weight_bytes",
    "model_weight_tensors",
    "model_work",
]

# The decoder works on this many tokens at a time wherever tokens are independent: the MLP's intermediate of a slice
# stays in the processor's cache, and activations stay bounded however large the chunk is.
TOKEN_SLICE = 1024
# On a GPU a slice fills the matrix units: at 4,096 rows Llama-3-8B's products run at 720 to 800 TFLOP/s of an H100's
# 790 to 810 (8,192 rows), at 1,024 the smaller ones lose a fifth.
TOKEN_SLICES = {"cpu": TOKEN_SLICE, "cuda": 4096}
# Weights of a bf16 lm_head that torch multiplies as float32 at a time.
HEAD_PIECE = 2**20


def _linears(config: ModelConfig) -> tuple[tuple[int, int, bool], ...]:
    """(out_features, in_features, bias) of one layer's linears as the decoder holds them: fused qkv, out, fused
    gate and up, down."""
    return (
        (config.q_size + 2 * config.kv_size, config.hidden_size, config.qkv_bias),
        (config.hidden_size, config.q_size, config.out_bias),
        (2 * config.intermediate_size, config.hidden_size, config.mlp_bias),
        (config.hidden_size, config.intermediate_size, config.mlp_bias),
    )


def model_weight_tensors(config: ModelConfig, weight_format: str, device_type: str) -> Iterator[int]:
    """Bytes of each parameter on the compute device, in the order in which they are allocated.

    Args:
        weight_format: one of `WEIGHT_FORMATS`, for the linears of the layers; norms and biases are in the compute
            dtype, embedding and lm_head in float32 or bf16 (`table_itemsize`). A tied lm_head costs nothing.
        device_type: cpu or cuda.

    Raises:
        ConfigError: unknown weight format or device type.
    """
    itemsize = compute_itemsize(weight_format, device_type)
    table = config.vocab_size * config.hidden_size * table_itemsize(weight_format)
    norm = config.hidden_size * itemsize
    qkv, out, gate_up, down = (
        linear_tensors(rows, cols, weight_format, itemsize, bias) for rows, cols, bias in _linears(config)
    )
    head_norms = 2 * (config.head_dim * itemsize,) if config.qk_norm else ()
    yield table
    for _ in range(config.num_layers):
        yield from (norm, *qkv, *head_norms, *out, norm, *gate_up, *down)
    yield norm
    if not config.tie_word_embeddings:
        yield table


def model_weight_bytes(config: ModelConfig, weight_format: str, device_type: str) -> int:
    """Bytes of all parameters on the compute device: exactly `Decoder.weight_bytes`, the sum of
    `model_weight_tensors`. Arguments and errors as there."""
    return sum(model_weight_tensors(config, weight_format, device_type))


@dataclass(frozen=True)
class ModelWork:
    """What the weights cost a step in time.

    Attributes:
        linear_weights: number of weights in the layers' linears; each is multiplied once a token.
        linear_bytes: of them in their format.
        dense_bytes: of them in the compute dtype.
        other_bytes: of the other weights that a token reads: lm_head, norms, one row of the embedding.
    """

    linear_weights: int
    linear_bytes: int
    dense_bytes: int
    other_bytes: int


def model_work(config: ModelConfig, weight_format: str, device_type: str) -> ModelWork:
    """The work of a model. Arguments and errors as `model_weight_bytes`."""
    itemsize, linears = compute_itemsize(weight_format, device_type), _linears(config)
    count = config.num_layers * sum(rows * cols for rows, cols, _ in linears)
    size = config.num_layers * sum(linear_bytes(*linear[:2], weight_format, itemsize, linear[2]) for linear in linears)
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    others = model_weight_bytes(config, weight_format, device_type) - size - unread * table_itemsize(weight_format)
    return ModelWork(count, size, count * itemsize, others)


def activation_bytes(
    config: ModelConfig,
    chunk_size: int,
    itemsize: int,
    weight_format: str = "fp32",
    token_slice: int = TOKEN_SLICE,
    fused: bool = False,
    product_copy: int = 0,
) -> int:
    """Peak of live activations of one forward pass over `chunk_size` tokens, without attention's own scratch.

    Counted: residual stream, the fused q/k/v buffer, attention's output, rotary tables, one token slice of the norms
    and of the MLP, the logits of one position, and for quantized weights the dequantized copy of the largest
    pair of linears, or piece of the lm_head, that is in use at once.

    Args:
        chunk_size: tokens of the forward pass.
        itemsize: bytes of an activation element, see `compute_itemsize`.
        weight_format: format of the linears.
        token_slice: tokens worked on at a time where they are independent.
        fused: RoPE and head norms run as GPU kernels, in place.
        product_copy: bytes an element that a product holds besides its result, see
            `longrun.machine.processor.bf16_product_copy_bytes`.
    """
    tokens, part = chunk_size, min(chunk_size, token_slice)
    whole = tokens * (config.hidden_size + config.q_size + 2 * config.kv_size) * itemsize
    rotary = tokens * config.head_dim * 3 * 4
    attended = tokens * config.q_size * itemsize
    # Temporaries an element: torch's norm works in float32, and casts on both sides for bf16; so does RoPE.
    norm_itemsize, turn_itemsize = (8, 4) if itemsize == 4 else (12, 10)
    norm = part * config.hidden_size * norm_itemsize
    head_norm = part * config.q_size * norm_itemsize if config.qk_norm and not fused else 0
    turning = 0 if fused else part * (config.q_size + config.kv_size) * turn_itemsize
    normed = part * config.hidden_size * itemsize  # stands while it is multiplied
    product = part * (config.q_size + 2 * config.kv_size) * product_copy
    projecting = max(norm, head_norm, turning, normed + product)
    wide = part * 2 * config.intermediate_size
    mlp = wide * itemsize + max(norm, normed + wide * product_copy)
    logits = config.vocab_size * (4 if itemsize == 4 else 6)
    dense = 0
    if is_quantized(weight_format):
        qkv, out, gate_up, down = (rows * cols for rows, cols, _ in _linears(config))
        dense = max(qkv, out, gate_up + down, min(HEAD_PIECE, config.vocab_size * config.hidden_size)) * itemsize
    return whole + rotary + dense + max(projecting, attended + mlp, logits)
