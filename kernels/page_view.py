"""Reading pages of one layer in torch: dequantize a run of pages, and decode attention over it.

These are the references that the compiled kernels share their signatures with; they also serve where no compiled
kernel can (the exact formats, or a machine without a compiler).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages


@dataclass(frozen=True)
class PageRun:
    """Pages [first, first + count) of every retrieval head of one layer, all in one memory.

    Attributes:
        storage: uint8 [num_slots, payload_bytes], the pool (or fetch buffer) that holds the payloads.
        table: int32 [num_heads, max_pages]; page p of head h is `storage[table[h, p] - slot_offset]`.
        index: float16 [num_heads, max_pages, 2, head_dim], or None for the exact formats.
        first, count: the pages meant, in `table` and `index` alike.
        slot_offset: number of the first slot of `storage` (the host pool's slots come after the device pool's).
    """

    storage: Tensor
    table: Tensor
    index: Tensor | None
    first: int
    count: int
    fmt: PageFormat
    slot_offset: int = 0

    def part(self, first: int, count: int) -> PageRun:
        """The `count` pages from `first` on (counted from this run's own first page)."""
        assert first >= 0 and first + count <= self.count
        return PageRun(self.storage, self.table, self.index, self.first + first, count, self.fmt, self.slot_offset)


@dataclass(frozen=True)
class ExactRun:
    """Tokens kept unquantized: k, v [num_heads, >= num_tokens, head_dim], bf16 or float32, first `num_tokens` valid."""

    k: Tensor
    v: Tensor
    num_tokens: int


def dequantize_run(run: PageRun, k_out: Tensor, v_out: Tensor) -> None:
    """Write the run's keys and values, in token order, to k_out, v_out [num_heads, count * page_size, head_dim]."""
    stop = run.first + run.count
    slots = run.table[:, run.first : stop].long() - run.slot_offset
    index = None if run.index is None else run.index[:, run.first : stop]
    k, v = decode_pages(run.storage[slots], index, run.fmt)
    k_out.copy_(k.flatten(1, 2))
    v_out.copy_(v.flatten(1, 2))


def decode_attention(q: Tensor, pages: PageRun | None, exact: tuple[ExactRun, ...]) -> tuple[Tensor, Tensor]:
    """One token's attention over a run of pages and up to two runs of exact tokens.

    Args:
        q: float32 [num_heads, group, head_dim], already multiplied by softmax_scale.

    Returns:
        out: float32 [num_heads, group, head_dim]; lse: float32 [num_heads, group], natural log-sum-exp of the scores.
    """
    keys = [run.k[:, : run.num_tokens].float() for run in exact]
    values = [run.v[:, : run.num_tokens].float() for run in exact]
    if pages is not None and pages.count:
        shape = (q.shape[0], pages.count * pages.fmt.page_size, q.shape[2])
        keys.append(q.new_empty(shape))
        values.append(q.new_empty(shape))
        dequantize_run(pages, keys[-1], values[-1])
    scores = q @ torch.cat(keys, dim=1).transpose(1, 2)
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - lse[..., None]) @ torch.cat(values, dim=1), lse
