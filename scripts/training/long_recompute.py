"""What the backward pass of train_long.py finds in memory, and what it computes again.

Where memory allows, everything stays. Beyond it a layer keeps its input and the output of its attention, and computes
the rest again: attention is what long texts cost, the rest is cheap in comparison.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_MEMORY_SHARE = 0.75  # of the device's memory that may hold activations
_ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
)


def _policy(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def enable(model: Any) -> None:
    """Prepare a transformers model: `recompute` then says when layers compute again what they did not keep."""
    context = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": context})


def recompute(model: Any, wanted: bool) -> None:
    """Whether the following forward passes keep little and their backward passes compute the rest again."""
    for layer in model.model.layers:
        layer.gradient_checkpointing = wanted


def activation_bytes(config: Any, rank: int, element: int) -> int:
    """Bytes a token that a Llama with LoRA of `rank` on all linears keeps for its backward pass.

    Counted from transformers' layers: both norms keep their input in float32; the linears' LoRA keeps their input, with
    A applied to it as well; attention keeps q, k, v, its output and the log sums; the MLP keeps gate, silu(gate), up
    and their product. `element`: bytes of the weights' format, 2 for bf16.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, head = config.num_attention_heads, config.head_dim
    keys = config.num_key_value_heads * head
    norms = 2 * 4 * hidden
    attention = element * (2 * heads * head + 2 * keys) + 4 * heads
    linears = element * (2 * hidden + 4 * inner + 7 * rank)
    return config.num_hidden_layers * (norms + attention + linears)


def most_kept_tokens(device: torch.device, bytes_a_token: int) -> int:
    """Tokens side by side up to which nothing is computed again: what `_MEMORY_SHARE` of a GPU holds; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory / bytes_a_token)
