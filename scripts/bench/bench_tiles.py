"""Sparse prefill of one layer's chunk, alone: what choosing pages costs, and what is left of dense attention's time.

Pages hold random content (synthetic), dequantized in pieces as prefill does; every tile reads the same share of them,
and tiles choose independently of each other, so that a page is in the L2 cache no oftener than chance has it. Times
are those of the whole past, in all pieces, once a chunk. Dense attention is measured over one piece and counted as
often. Attention of a few tiles is compared with the torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longrun.kernels.dense_attention import attention_operations, attention_with_lse
from longrun.kernels.page_dequantize import dequantize_pages
from longrun.kernels.page_view import PageView
from longrun.kernels.tile_attend import AttendConfig, attend_tiles_, default_config
from longrun.kernels.tile_attention import TILE, attend_tiles_reference
from longrun.kernels.tile_choose import choose_tiles
from longrun.kernels.tile_score import score_tiles
from longrun.units import format_tokens
from scripts.bench.bench_kernels import synthetic_layers
from scripts.bench.bench_page_kernels import bytes_per_page
from scripts.bench.gpu_timer import Times, gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row

HEADS, GROUP, HEAD_DIM, PAGE = 4, 4, 128, 64  # Llama-3-8B with half of its KV heads kept
PIECE = 65_536  # tokens of each head that are dequantized at once
SHARES, NEWEST = (0.05, 0.08, 0.15, 0.25), 4
REPEATS = 5
CHECKED = 1  # tiles of every query head that the reference reads, too
LIMIT = 6e-3  # relative error of attention in bfloat16 to the reference
TUNED = (
    *(AttendConfig(num_warps=warps, num_stages=stages, described=True) for warps in (4, 8) for stages in (2, 3, 4)),
    *(AttendConfig(num_warps=warps, num_stages=stages) for warps, stages in ((4, 2), (8, 2), (8, 3))),
    *(AttendConfig(pages=2, num_stages=stages) for stages in (2, 3)),
)


class Chunk:
    """A chunk's queries, the past's pages, and everything that its attention writes.

    Args:
        past, tokens: tokens before the chunk (whole pages), and of it.
    """

    def __init__(self, past: int, tokens: int) -> None:
        torch.manual_seed(past)
        self.pages = past // PAGE
        (self.view, _), *_ = synthetic_layers(1, HEADS, self.pages, HEAD_DIM, "k5v3")
        self.scratch = torch.full((2, HEADS, PIECE, HEAD_DIM), float("nan"), device="cuda").bfloat16()
        self.q = torch.randn(HEADS, GROUP, tokens, HEAD_DIM, device="cuda").bfloat16()
        self.total, self.lse = torch.zeros(self.q.shape, device="cuda"), torch.zeros(self.q.shape[:3], device="cuda")
        self.tiles = -(-tokens // TILE)
        self.rows = torch.stack([part.mean(2) for part in self.q.split(TILE, dim=2)], dim=2).flatten(1, 2)
        self.scores = torch.full((HEADS, GROUP * self.tiles, self.pages), float("nan"), device="cuda").half()
        self.scale = HEAD_DIM**-0.5

    def pieces(self) -> Iterator[tuple[int, PageView, Tensor, Tensor]]:
        """First entry, pages, and room for their keys and values."""
        at_once = PIECE // PAGE
        for first in range(0, self.pages, at_once):
            view = self.view.part(first, min(at_once, self.pages - first))
            yield first, view, *self.scratch[:, :, : view.limit * PAGE]

    def dequantize(self) -> None:
        for _, view, k, v in self.pieces():
            dequantize_pages(view, k, v)

    def score(self) -> None:
        """Against whatever the scratch holds."""
        for first, _, k, _ in self.pieces():
            score_tiles(self.rows, k, self.scores, first, self.scale)

    def choose(self, share: float) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """Lists, counts, and what chooses `share` of the pages."""
        count, shape = round(share * self.pages), (HEADS, GROUP, self.tiles)
        lists = torch.full((*shape, count), -1, dtype=torch.int32, device="cuda")
        counts = torch.full(shape, -1, dtype=torch.int32, device="cuda")
        missed, left = torch.full((2, counts.numel()), 1e-3, device="cuda")
        own = torch.full((counts.numel(), 1), 10.0, device="cuda")
        scores = self.scores.view(len(own), 1, self.pages)
        into = lists.view(len(own), count), counts.view(-1), missed
        return lists, counts, partial(choose_tiles, scores, own, left, count, count, NEWEST, *into)

    def attend(self, lists: Tensor, counts: Tensor, config: AttendConfig | None = None) -> None:
        for first, _, k, v in self.pieces():
            attend_tiles_(self.q, k, v, lists, counts, first, self.total, self.lse, self.scale, config=config)

    def clear(self) -> None:
        self.total.zero_()
        self.lse.zero_()

    def check(self, lists: Tensor, counts: Tensor) -> float:
        """Relative error of some tiles' attention; every piece is dequantized for it."""
        found, expected = ([x[:, :, : CHECKED * TILE].clone().zero_() for x in (self.total, self.lse)] for _ in "ab")
        tiles = lists[:, :, :CHECKED], counts[:, :, :CHECKED]
        for first, view, k, v in self.pieces():
            dequantize_pages(view, k, v)
            inputs = self.q[:, :, : CHECKED * TILE], k, v, *tiles, first
            attend_tiles_(*inputs, *found, self.scale)
            attend_tiles_reference(*inputs, *expected, self.scale)
        error_of(found[1], expected[1], LIMIT)
        return error_of(found[0], expected[0], LIMIT)


def measure(past: int = 2**20, tokens: int = 32_768, tune: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a chunk of `tokens` behind `past` tokens; with `tune`, of attention in other cuts of the work as well."""
    chunk = Chunk(past, tokens)
    timed = partial(gpu_times, captured=False, repeats=REPEATS)
    shape = f"{HEADS}x{GROUP}x{HEAD_DIM}, {format_tokens(tokens)} after {format_tokens(past)}"
    dequantized = timed(chunk.dequantize)
    moved = HEADS * chunk.pages * bytes_per_page(chunk.view.fmt, 2)
    yield kernel_row("dequantize", shape, dequantized, num_bytes=moved)

    scored = timed(chunk.score)
    flops = 2.0 * HEADS * chunk.rows.shape[1] * chunk.pages * PAGE * HEAD_DIM
    yield kernel_row("score_tiles", shape, scored, flops=flops, ceiling="matrix product")

    dense = dense_times(chunk)
    flops = attention_operations(HEADS * GROUP, tokens, HEAD_DIM, chunk.pages * PAGE, False)
    dense_row = kernel_row("dense attention", shape, dense, flops=flops, ceiling="matrix product")
    yield dense_row

    for share in SHARES:
        lists, counts, choosing = chunk.choose(share)
        chosen = timed(choosing)
        yield kernel_row("choose_tiles", shape, chosen, num_bytes=chunk.scores.nbytes, settings={"share": share})
        read = int(counts.sum())
        flops = 4.0 * TILE * PAGE * HEAD_DIM * read  # of a shorter last tile, too, as the kernel computes it
        error = chunk.check(lists, counts)
        add = partial(kernel_row, shape=shape, flops=flops, ceiling="matrix product", relative_error=error)
        configs = [None, *(TUNED if tune and share == SHARES[1] else ())]
        for config in configs:
            try:
                times = timed(partial(chunk.attend, lists, counts, config), prepare=chunk.clear)
            except Exception as problem:  # some cuts ask for more than this GPU has
                if config is None:
                    raise
                print(f"{config}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
                continue
            settings = {"share": share, **asdict(config or default_config(chunk.q))}
            row = add(
                kernel="attend_tiles_" if config is None else "attend_tiles_ tuning", times=times, settings=settings
            )
            row["details"]["of_dense_rate"] = row["per_second"] / dense_row["per_second"]
            whole = 2 * dequantized.seconds + scored.seconds + chosen.seconds + times.seconds
            row["details"]["whole_of_dense_time"] = whole / (dense.seconds + dequantized.seconds)
            print(
                f"{row['kernel']} {settings}: {row['per_second'] / 1e12:,.0f} TFLOP/s, "
                f"{row['details']['of_dense_rate']:.0%} of dense attention's; all of the past in {1e3 * whole:.1f} ms, "
                f"{row['details']['whole_of_dense_time']:.0%} of the dense time", flush=True,
            )  # fmt: skip
            yield row


def dense_times(chunk: Chunk) -> Times:
    """Of the whole past, from the first piece."""
    _, view, k, v = next(chunk.pieces())
    q = chunk.q.flatten(0, 1)
    times = gpu_times(partial(attention_with_lse, q, k, v, False, chunk.scale), captured=False, repeats=REPEATS)
    return Times(*(seconds * chunk.pages / view.limit for seconds in times))
