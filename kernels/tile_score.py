"""What every page of a piece is worth to the tiles' rows, in Triton: the first pass of sparse prefill.

One matrix product of rows and keys whose output is reduced to one number a page before it leaves the chip. A program
serves BLOCK_M rows and a stretch of pages; programs of the same pages run side by side, so that keys come from the L2
cache but once.

Work: 2 * page_size * head_dim operations and page_size exponentials for every row and page.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.kernels.tile_attention import check_score_tiles
from longrun.kernels.tile_page import check_piece, check_served, has_copy_unit, load_page, page_descriptor
from longrun.quant.kv_format import GPU_PAGE_SIZE

_STRETCH = 32  # pages of a program


# one compilation for all pieces and chunks of a sequence
@triton.jit(do_not_specialize=["num_rows", "first_page", "pages", "score_row_stride"])
def score_tiles_kernel(
    rows, k, scores, rows_head_stride, rows_row_stride, k_head_stride, score_head_stride, score_row_stride,
    num_rows, first_page, pages, scale_log2,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, STRETCH: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, stretch of pages, KV head)."""
    head = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    from_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    at = rows + head.to(tl.int64) * rows_head_stride + from_row[:, None] * rows_row_stride
    queries = tl.load(at + tl.arange(0, HEAD_DIM)[None, :]).to(k.dtype if DESCRIBED else k.dtype.element_ty)
    begin = tl.program_id(1) * STRETCH
    to = scores + head.to(tl.int64) * score_head_stride + from_row * score_row_stride + first_page
    for at_page in range(tl.minimum(pages - begin, STRETCH)):
        page = begin + at_page
        keys = load_page(k, head, k_head_stride, page, PAGE_SIZE, HEAD_DIM, DESCRIBED)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        top = tl.max(products, 1) * scale_log2
        total = tl.sum(tl.exp2(products * scale_log2 - top[:, None]), 1)
        found = (top + tl.log2(total)) * 0.6931471805599453
        found = tl.minimum(tl.maximum(found, -65504.0), 65504.0)
        tl.store(to + page, found.to(tl.float16), mask=row < num_rows)


def score_tiles(
    rows: Tensor, k: Tensor, scores: Tensor, first_page: int, softmax_scale: float, page_size: int = GPU_PAGE_SIZE,
    num_warps: int = 4, num_stages: int = 4,
) -> None:  # fmt: skip
    """`tile_attention.score_tiles_reference`: same arguments, same result up to rounding (rows are rounded to k's
    dtype).

    Args:
        k: as `tile_page.check_piece` asks.
        num_warps, num_stages: how a program shares and overlaps its work; they do not change the answer.

    Raises:
        ConfigError: head_dim other than 64 and 128, or another page_size.
    """
    pages = check_score_tiles(rows, k, scores, first_page, page_size)
    heads, num_rows, dim = rows.shape
    check_served(dim, page_size)
    check_piece(k)
    assert softmax_scale > 0, softmax_scale  # the largest score is taken before scaling
    if min(heads, num_rows, pages) == 0:
        return
    exact = k.dtype == torch.float32
    described = has_copy_unit(k) and not exact
    block_m, num_stages = (32, 1) if exact else (128, num_stages)
    score_tiles_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(pages, _STRETCH), heads)](
        rows, page_descriptor(k, page_size) if described else k, scores, *rows.stride()[:2], k.stride(0),
        *scores.stride()[:2], num_rows, first_page, pages, softmax_scale * math.log2(math.e),
        HEAD_DIM=dim, PAGE_SIZE=page_size, BLOCK_M=block_m, STRETCH=_STRETCH, DESCRIBED=described,
        PRECISION="ieee" if exact else "tf32", num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
