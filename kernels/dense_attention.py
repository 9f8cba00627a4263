"""Dense attention that returns its log-sum-exp, and the merge of partial results."""

from __future__ import annotations

import torch
from torch import Tensor

_CUDNN_ROWS = 1024


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention by the platform's fused kernel.

    Args:
        q: [num_heads, q_len, head_dim]; k, v: [num_kv_heads, kv_len, head_dim], the same dtype. Query heads of a KV
            head stand together: num_heads is a multiple of num_kv_heads.
        causal: query i sees keys <= i (q_len == kv_len), else every key.

    Returns:
        out: [num_heads, q_len, head_dim], dtype of q; lse: float32 [num_heads, q_len], natural log-sum-exp.

    On the CPU this is torch's FlashAttention. On a GPU, for 16-bit types, it is cuDNN's for long chunks from Hopper on
    (578 TFLOP/s on an H100, causal, where torch's FlashAttention reached 350: docs/results/h100-prefill.json) and
    torch's else; for float32 it is torch's memory-efficient attention, the one that takes float32.
    """
    assert not causal or q.shape[1] == k.shape[1]
    assert q.shape[0] % k.shape[0] == 0
    operator = dense_operator(q)
    if q.shape[0] != k.shape[0] and operator in ("cpu", "efficient"):
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    q_len, q, k, v = q.shape[1], q[None], k[None], v[None]
    aten = torch.ops.aten
    if operator == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=softmax_scale)
    elif operator == "efficient":
        found = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=softmax_scale)
        out, lse = found[0], found[1][..., :q_len]  # rows are padded to a multiple of 32
    elif operator == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=softmax_scale)
        out, lse = found[0], found[1][..., 0]
    else:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=softmax_scale)
        out, lse = found[0], found[1]
    return out[0], lse[0].float()


def dense_operator(q: Tensor) -> str:
    """Which of torch's operators serves the queries q [num_heads, q_len, head_dim]: cpu, efficient, cudnn or flash.

    cuDNN plans anew, for tenths of a second, for every pair of lengths it has not seen
    (https://github.com/modelscope/FunASR/issues/3704, torch 2.11): worth it for a long chunk, never for a question or
    a token. `torch.backends.cuda.enable_cudnn_sdp(False)` turns it off altogether.
    """
    assert q.dim() == 3
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    pays = q.shape[1] >= _CUDNN_ROWS and torch.backends.cuda.cudnn_sdp_enabled()
    if pays and torch.cuda.get_device_properties(q.device).major >= 9 and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash"


def reference_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` spelled out: the whole score matrix, in float32."""
    scores = (q.float() @ k.float().transpose(1, 2)) * softmax_scale
    if causal:
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (torch.exp(scores - lse[..., None]) @ v.float()).to(q.dtype), lse


def merge_partial(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each (log-sum-exp merge).

    Args:
        out, other_out: [..., head_dim]; lse, other_lse: float32 [...]. `out` is overwritten.
    """
    total = torch.logaddexp(lse, other_lse)
    out.mul_(torch.exp(lse - total)[..., None].to(out.dtype))
    out.addcmul_(other_out, torch.exp(other_lse - total)[..., None].to(out.dtype))
    return out, total
