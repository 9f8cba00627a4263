"""Dense attention that returns its log-sum-exp, and the merge of partial results."""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on an H100 and an H200 with torch 2.11 (docs/experiments.md, "Prefill at its speed again"): cuDNN's attention
# takes about a second for 620e12 operations, torch's FlashAttention for 350e12, and cuDNN plans 0.06 s for every shape
# that it has not seen (https://github.com/modelscope/FunASR/issues/3704).
_CUDNN_SECONDS, _FLASH_SECONDS, _PLAN_SECONDS = 1 / 620e12, 1 / 350e12, 0.06
_CUDNN_ROWS = 1024
PLAN_USES = 16
"""Calls that share a plan where a caller knows no better: some layers have as many heads, chunk after chunk."""
_LAST_PLAN_USES = 8  # of a last chunk's length


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float, plan_uses: int = PLAN_USES
) -> tuple[Tensor, Tensor]:
    """Softmax attention by the platform's fused kernel.

    Args:
        q: [num_heads, q_len, head_dim]; k, v: [num_kv_heads, kv_len, head_dim], the same dtype. Query heads of a KV
            head stand together: num_heads is a multiple of num_kv_heads.
        causal: query i sees keys <= i (q_len == kv_len), else every key.
        plan_uses: calls of this shape that are to come; decides whether a plan of cuDNN's pays.

    Returns:
        out: [num_heads, q_len, head_dim], dtype of q; lse: float32 [num_heads, q_len], natural log-sum-exp.

    On the CPU this is torch's FlashAttention. On a GPU, for 16-bit types, it is cuDNN's for long chunks from Hopper on
    (578 TFLOP/s on an H100, causal, where torch's FlashAttention reached 350: docs/results/h100-prefill.json) and
    torch's else; for float32 it is torch's memory-efficient attention, the one that takes float32.
    """
    assert not causal or q.shape[1] == k.shape[1]
    assert q.shape[0] % k.shape[0] == 0
    operator = dense_operator(q, k.shape[1], causal, plan_uses)
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


def dense_operator(q: Tensor, kv_len: int, causal: bool, plan_uses: int = PLAN_USES) -> str:
    """Which of torch's operators serves q [num_heads, q_len, head_dim] over `kv_len` keys: cpu, efficient, cudnn or
    flash. cuDNN's is the fastest, where a plan of its own pays; for a question it plans longer than it attends."""
    assert q.dim() == 3
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    operations = attention_operations(*q.shape, kv_len, causal)
    saved = operations * (_FLASH_SECONDS - _CUDNN_SECONDS) * plan_uses
    pays = q.shape[1] >= _CUDNN_ROWS and saved > _PLAN_SECONDS
    return "cudnn" if pays and cudnn_serves(q.device) else "flash"


def cudnn_serves(device: torch.device) -> bool:
    """Whether cuDNN's attention is there and faster than FlashAttention: from Hopper on.
    `torch.backends.cuda.enable_cudnn_sdp(False)` turns it off."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return torch.cuda.get_device_properties(device).major >= 9 and torch.backends.cudnn.is_available()


def attention_operations(num_heads: int, q_len: int, head_dim: int, kv_len: int, causal: bool) -> float:
    """Floating-point operations, a multiply-add counting two."""
    return 4.0 * num_heads * head_dim * q_len * kv_len / (2 if causal else 1)


def padded_rows(num_heads: int, q_len: int, head_dim: int, start: int, chunk_size: int) -> int:
    """Rows that attention of `q_len` queries at positions `start` ... should run over where cuDNN serves: `chunk_size`
    where rows of padding cost less than plans for a new shape, or than FlashAttention; else `q_len`.

    A text's last chunk is of any length; the chunks before it have brought the plans for full ones.
    """
    if start == 0 or not _CUDNN_ROWS <= q_len < chunk_size:
        return q_len
    per_row = attention_operations(num_heads, 1, head_dim, start + chunk_size // 2, False)
    plans = 3 * _PLAN_SECONDS / _LAST_PLAN_USES  # for the chunk itself and two lengths of past pieces
    others = min(q_len * per_row * (_FLASH_SECONDS - _CUDNN_SECONDS), plans)
    return chunk_size if (chunk_size - q_len) * per_row * _CUDNN_SECONDS < others else q_len


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
