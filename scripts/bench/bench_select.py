"""Scoring and choosing pages of one layer, alone: what selected decode adds to the pages that it reads.

Digests hold random codes (synthetic). Calls rotate over the digests of several layers, so that nothing of them is
measured from the L2 cache; scores stand in it when a choice begins, as in a decode step. Scores are compared with the
torch reference, and lists with the reference's choice from the same scores, on poisoned outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longrun.kernels.page_choose import Budget, choose_pages
from longrun.kernels.page_score import score_pages
from longrun.kernels.page_select_cuda import ChoiceWorkspace, CudaPageSelect
from longrun.kernels.page_view import PageView, view_of_all
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.units import format_tokens
from scripts.bench.gpu_timer import gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row

LENGTHS = (1_000_000, 3_300_000, 10_000_000)
HEADS, GROUP, HEAD_DIM = (4, 8), 4, 128  # Llama-3-8B with half of its KV heads kept, and with all of them
DIGEST_BYTES = 3 * 2**30  # of all layers together, more than L2 holds
PAGES, NEWEST, LAM = 512, 4, 0.25
LIMIT = 1e-4  # relative error of scores


def synthetic_digests(num_layers: int, heads: int, num_pages: int, fmt: DigestFormat) -> list[Tensor]:
    """Digests [heads, num_pages, page_bytes] of layers, of random codes."""
    layers = []
    for _ in range(num_layers):
        digest = torch.empty(heads, num_pages, fmt.page_bytes, dtype=torch.uint8, device="cuda").random_(0, 256)
        grouped = digest.view(heads, num_pages, fmt.groups, fmt.group_bytes)
        scales = torch.tensor([2.0 / fmt.last_centre, 2.0 / 15], dtype=torch.float16).view(torch.uint8)
        grouped[..., fmt.scales_offset :] = scales.to(digest.device)
        layers.append(digest)
    return layers


def listing(heads: int, num_pages: int) -> PageView:
    """All pages of every head; there is nothing in them."""
    fmt = PageFormat("k5v3", 64, HEAD_DIM)
    nothing = torch.zeros(1, fmt.payload_bytes, dtype=torch.uint8, device="cuda")
    table = torch.zeros(heads, num_pages, dtype=torch.int32, device="cuda")
    return view_of_all(nothing, table, torch.zeros(heads, 1, 2, HEAD_DIM, dtype=torch.float16, device="cuda"), fmt)


def measure(lengths: Sequence[int] = LENGTHS, digest_bytes: int = DIGEST_BYTES) -> Iterator[dict[str, Any]]:
    """Rows of both halves and of a whole selection at `lengths` tokens; without halves, and of larger centres, at the
    first."""
    for heads in HEADS:
        for tokens in lengths:
            yield from measure_shape(heads, tokens, DigestFormat(64, HEAD_DIM), LAM, digest_bytes)
    yield from measure_shape(HEADS[0], lengths[0], DigestFormat(64, HEAD_DIM), 0.0, digest_bytes)
    yield from measure_shape(HEADS[0], lengths[0], DigestFormat(64, HEAD_DIM, centre_bits=8), LAM, digest_bytes)


def measure_shape(
    heads: int, tokens: int, fmt: DigestFormat, lam: float, digest_bytes: int
) -> Iterator[dict[str, Any]]:
    """Rows of one shape: KV heads x tokens."""
    torch.manual_seed(tokens)
    num_pages = tokens // fmt.page_size
    moved = heads * num_pages * fmt.page_bytes
    digests = synthetic_digests(max(2, min(32, -(-digest_bytes // moved))), heads, num_pages, fmt)
    view, kernels = listing(heads, num_pages), CudaPageSelect(fmt)
    q = torch.randn(heads, GROUP, fmt.head_dim, device="cuda").bfloat16()
    scores = torch.full((heads, GROUP, num_pages), float("nan"), device="cuda")
    space = ChoiceWorkspace.empty(*scores.shape, scores.device)
    pages, counts = (torch.full(shape, -1, dtype=torch.int32, device="cuda") for shape in ((heads, PAGES), (heads,)))
    how = {"lam": lam, "softmax_scale": fmt.head_dim**-0.5}
    into = {"budget": Budget(PAGES), "newest": NEWEST, "pages_out": pages, "counts_out": counts}
    scoring = [partial(kernels.score_pages, q, view, digest, out=scores, **how) for digest in digests]
    choosing = partial(kernels.choose_pages, scores, view, workspace=space, **into)

    def selecting(score: partial) -> None:
        score()
        choosing()

    scored = gpu_times(*scoring)
    expected = score_pages(q, view, digests[-1], out=torch.full_like(scores, float("nan")), **how)
    error = error_of(scores, expected, LIMIT)
    chosen = gpu_times(*[choosing] * 8)
    found = pages.clone(), counts.clone()
    choose_pages(scores, view, **into)
    assert torch.equal(found[0], pages) and torch.equal(found[1], counts), "the timed kernels choose other pages"
    both = gpu_times(*(partial(selecting, score) for score in scoring))
    shape = f"{heads}x{GROUP}x{fmt.head_dim}, {format_tokens(tokens)} tokens, {fmt.centre_bits} bits, lam {lam}"
    yield kernel_row("score_pages", shape, scored, num_bytes=moved, error=error)
    yield kernel_row("choose_pages", shape, chosen, num_bytes=scores.nbytes, pages=PAGES, newest=NEWEST)
    yield kernel_row("score and choose", shape, both, num_bytes=moved)
