"""The CPU's attention of tiles to listed pages, against its reference."""

import pytest
import torch
from tile_case import TOLERANCE, check_attend, every_entry, piece, queries, rms_ratio

from longrun.kernels.cpu_tiles import attend_tiles_
from longrun.kernels.tile_attention import attend_tiles_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "pages"),
    [(1, 1, 1, 64, 1), (128, 2, 1, 16, 3), (300, 3, 2, 64, 9), (257, 1, 7, 80, 5), (640, 2, 3, 128, 20)],
)
def test_it_is_the_reference(dtype, tokens, heads, group, dim, pages):
    for first_page in (0, 7):
        check_attend(tokens, heads, group, dim, pages, dtype, attend_tiles_, first_page)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages_of_any_size(page_size):
    g = torch.Generator().manual_seed(1)
    q, (k, v) = queries(200, 2, 3, 64, torch.float32, g), piece(2, 8, 64, torch.float32, g)
    lists, counts = every_entry(2, 3, 200, 8 * 64 // page_size)
    lists, counts = lists[..., ::3].contiguous(), torch.full_like(counts, lists[..., ::3].shape[3])
    found, lse = torch.zeros(2, 2, 3, 200, 64), torch.zeros(2, 2, 3, 200)
    for kernel, at in ((attend_tiles_, 0), (attend_tiles_reference, 1)):
        kernel(q, k, v, lists, counts, 0, found[at], lse[at], 0.125, page_size=page_size)
    assert rms_ratio(found[0], found[1]) < TOLERANCE[torch.float32] and lse.isfinite().all()


@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_nothing_before(nothing):
    g = torch.Generator().manual_seed(2)
    q, (k, v) = queries(130, 1, 2, 64, torch.float32, g), piece(1, 3, 64, torch.float32, g)
    total, lse = torch.full((2, 1, 2, 130, 64), float("nan")), torch.full((2, 1, 2, 130), nothing)
    for kernel, at in ((attend_tiles_, 0), (attend_tiles_reference, 1)):
        kernel(q, k, v, *every_entry(1, 2, 130, 3), 0, total[at], lse[at], 0.125)
    assert rms_ratio(total[0], total[1]) < TOLERANCE[torch.float32]
