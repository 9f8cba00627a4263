"""Pages of a dequantized piece as the Triton kernels of sparse prefill read them, and which of them they serve."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longrun.errors import ConfigError
from longrun.quant.kv_format import GPU_HEAD_DIMS, GPU_PAGE_SIZE


@triton.jit
def load_page(x, head, head_stride, page, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DESCRIBED: tl.constexpr):
    """[PAGE_SIZE, HEAD_DIM] of a head; `x` is a pointer, or with DESCRIBED what `page_descriptor` made."""
    if DESCRIBED:
        found = x.load([head * (head_stride // HEAD_DIM) + page * PAGE_SIZE, 0])
    else:
        in_page = tl.arange(0, PAGE_SIZE)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        place = x + head.to(tl.int64) * head_stride + page.to(tl.int64) * (PAGE_SIZE * HEAD_DIM)
        found = tl.load(place + in_page)
    return found


def check_piece(x: Tensor) -> None:
    """Assert that a piece's keys or values [num_kv_heads, tokens, head_dim] are as the kernels read them: the tokens of
    a head one behind the other, less than 2^31 elements."""
    assert x.stride()[1:] == (x.shape[2], 1) and x.shape[1] * x.shape[2] < 2**31, (x.shape, x.stride())


def page_descriptor(x: Tensor, page_size: int) -> TensorDescriptor:
    """Pages of a piece for Hopper's copy unit: all heads as one list of tokens."""
    heads, tokens, dim = x.shape
    assert x.stride(0) % dim == 0, x.stride()
    rows = (heads - 1) * (x.stride(0) // dim) + tokens
    assert rows < 2**31, rows
    return TensorDescriptor(x, [rows, dim], [dim, 1], [page_size, dim])


def has_copy_unit(x: Tensor) -> bool:
    """Whether the tensor's device copies by descriptor: Hopper, and what came after it."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (9, 0)


def check_served(head_dim: int, page_size: int) -> None:
    """Raises ConfigError where the kernels do not serve pages of this shape."""
    if head_dim not in GPU_HEAD_DIMS:
        raise ConfigError(
            f"head_dim {head_dim} has no Triton kernels of sparse prefill: use a model with {GPU_HEAD_DIMS[0]} or "
            f"{GPU_HEAD_DIMS[1]}, or prefill exact"
        )
    if page_size != GPU_PAGE_SIZE:
        raise ConfigError(
            f"page_size {page_size} has no Triton kernels of sparse prefill: use {GPU_PAGE_SIZE}, or prefill exact"
        )
