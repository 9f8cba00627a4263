"""What every listed page is worth to a query, by the pages' digests: the first half of selected decode, in torch.

A page's score is the log-sum-exp over its groups of what each is worth (`quant.digest_format`), an estimate of how much
of the attention's sum falls on the page (docs/selection.md). `page_select_cuda` is the GPU's kernel with this
signature; this one serves any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.kernels.page_view import PageView
from longrun.quant.digest_format import DigestFormat
from longrun.quant.page_digest import decode_digest
from longrun.quant.rotation import hadamard_product, rotation_scales

_ENTRIES_AT_ONCE = 1024  # bounds the decoded digests: 4 MB a head at head_dim 128


def digest_format_of(digest: Tensor, view: PageView) -> DigestFormat:
    """The format of digests uint8 [num_heads, max_pages, page_bytes] of the view's pages."""
    for centre_bits in (8, 4):
        fmt = DigestFormat(view.fmt.page_size, view.fmt.head_dim, centre_bits=centre_bits)
        if digest.shape[2] == fmt.page_bytes:
            return fmt
    raise AssertionError(f"digests of {digest.shape[2]} bytes belong to no page like {view.fmt}")


def check_score_shapes(q: Tensor, view: PageView, digest: Tensor, out: Tensor) -> DigestFormat:
    """Assert what `score_pages` asks of its arguments; the digests' format."""
    heads, group, dim = q.shape
    assert q.is_contiguous() and q.dtype in (torch.float32, torch.bfloat16)
    assert (view.num_heads, view.fmt.head_dim) == (heads, dim) and view.fmt.quantized
    assert digest.dtype == torch.uint8 and digest.shape[0] == heads and digest[0].is_contiguous()
    assert out.dtype == torch.float32 and out.shape[:2] == (heads, group) and out.is_contiguous()
    return digest_format_of(digest, view)


def score_pages(q: Tensor, view: PageView, digest: Tensor, *, lam: float, softmax_scale: float, out: Tensor) -> Tensor:
    """Write the score of every entry of each head's list: natural logarithms, of all query heads of the group.

    Args:
        q: bfloat16 or float32 [num_heads, group, head_dim], rotated as the pages' keys are (`quant.rotation`).
        view: the candidates. Their payloads are not read.
        digest: uint8 [num_heads, max_pages, page_bytes] by page number.
        lam: how much of a group's range counts beside its mean; with 0 nothing of it does, not even a NaN.
        softmax_scale: scores are q . k * softmax_scale.
        out: float32 [num_heads, group, max_entries], contiguous, max_entries at least the longest list. What stands
            beyond a head's own list is left alone.

    Returns:
        `out`.
    """
    fmt = check_score_shapes(q, view, digest, out)
    counts, device = view.num_entries().long(), q.device
    scaled = q.float() * softmax_scale
    against_half = (hadamard_product(scaled) * rotation_scales(fmt.head_dim)[1]).abs() * lam
    heads = torch.arange(q.shape[0], device=device)[:, None]
    longest = int(counts.max()) if len(counts) else 0
    assert longest <= out.shape[2], f"a list of {longest} pages, and room for {out.shape[2]} scores"
    for start in range(0, longest, _ENTRIES_AT_ONCE):
        entries = torch.arange(start, min(longest, start + _ENTRIES_AT_ONCE), device=device)
        meant = entries < counts[:, None]
        at = (view.begins[:, None] + view.skip + entries).where(meant, 0)
        pages = view.pages.gather(1, at).long().where(meant, 0)
        centre, half = decode_digest(digest[heads, pages], fmt)  # [heads, entries, groups, head_dim]
        scores = torch.matmul(scaled, centre.flatten(1, 2).mT)
        if lam:
            scores += torch.matmul(against_half, half.flatten(1, 2).mT)
        found = scores.unflatten(2, (-1, fmt.groups)).logsumexp(dim=3)
        part = out[:, :, start : start + len(entries)]
        part.copy_(found.where(meant[:, None], part))
    return out
