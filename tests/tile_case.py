"""Inputs of sparse prefill's kernels, and what they must do, for the tests of their references and of Triton's."""

import math

import torch

from longrun.kernels.tile_attention import TILE, attend_tiles_reference, choose_tiles_reference, score_tiles_reference

NAN, PAGE = float("nan"), 64
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of RMS ratios


def rms_ratio(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def shares_of(scores, own_lse):
    """float64 [T, P]: shares of a tile's attention, by their definition."""
    everything = torch.cat((own_lse[..., None], scores), dim=2).double()
    return torch.softmax(everything, dim=2)[..., 1:].mean(dim=1)


def random_scores(tiles, rows, entries, seed=0, spread=3.0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    scores = (spread * torch.randn(tiles, rows, entries, generator=g)).half()
    return scores.to(device), (math.log(max(entries, 2)) + torch.randn(tiles, rows, generator=g)).to(device)


def choose(scores, own_lse, left, floor, cap, newest, kernel=choose_tiles_reference):
    """The sets that are chosen, and what is missed; lists must be ascending, and untouched behind their entries."""
    tiles, device = len(scores), scores.device
    lists = torch.full((tiles, cap + 3), -7, dtype=torch.int32, device=device)
    counts = torch.full((tiles,), -7, dtype=torch.int32, device=device)
    missed = torch.full((tiles,), NAN, device=device)
    left = torch.as_tensor(left, device=device).float().expand(tiles).contiguous()
    kernel(scores.clone(), own_lse, left, floor, cap, newest, lists, counts, missed)
    found = [row[:n].tolist() for row, n in zip(lists, counts.tolist(), strict=True)]
    assert all((row[n:] == -7).all() for row, n in zip(lists, counts.tolist(), strict=True))
    assert all(row == sorted(row) for row in found)
    return [set(row) for row in found], missed


def check_choice(tiles, rows, entries, left, floor, cap, newest, kernel, device="cpu", seed=0):
    """The kernel's choice is the reference's; rounding may move an entry over the threshold in few tiles."""
    scores, own_lse = random_scores(tiles, rows, entries, seed, device=device)
    expected, expected_missed = choose(scores, own_lse, left, floor, cap, newest)
    found, missed = choose(scores, own_lse, left, floor, cap, newest, kernel)
    differing = [tile for tile in range(tiles) if found[tile] != expected[tile]]
    assert len(differing) <= tiles // 8, differing
    shares = shares_of(scores, own_lse)
    for tile in range(tiles):
        others = shares[tile].clone()
        others[sorted(found[tile])] = 0
        assert abs(missed[tile].item() - others.sum().item()) < 1e-5
        assert len(found[tile] ^ expected[tile]) <= max(4, len(expected[tile]) // 50)
    torch.testing.assert_close(missed, expected_missed, rtol=2e-2, atol=1e-5)


def check_scores(rows, heads, dim, pages, dtype, kernel, rows_dtype=None, first_page=3, device="cpu"):
    """Scores of a piece in the middle of others'; the scores around it stay."""
    g = torch.Generator(device).manual_seed(rows)
    means = torch.randn(heads, rows, dim, generator=g, device=device).to(rows_dtype or dtype)
    k = piece(heads, pages, dim, dtype, g, device)[0]
    found = torch.full((heads, rows, first_page + pages + 2), NAN, dtype=torch.float16, device=device)
    expected = found.clone()
    kernel(means, k, found, first_page, 3 * dim**-0.5)
    score_tiles_reference(means, k, expected, first_page, 3 * dim**-0.5)
    part = slice(first_page, first_page + pages)
    assert found[:, :, :first_page].isnan().all() and found[:, :, first_page + pages :].isnan().all()
    # a step of float16 from 16 on, as rounding falls on either side; and rows that are rounded to bfloat16
    limit = 0.016 if dtype != torch.bfloat16 and rows_dtype is None else 0.05
    assert (found[:, :, part].float() - expected[:, :, part].float()).abs().max() < limit


def piece(heads, pages, dim, dtype, g, device="cpu"):
    """k and v [heads, pages * 64, dim] in front of a larger scratch that holds NaN behind them."""
    scratch = torch.full((2, heads, (pages + 1) * PAGE, dim), NAN, dtype=dtype, device=device)
    scratch[:, :, : pages * PAGE] = torch.randn(2, heads, pages * PAGE, dim, generator=g, device=device)
    return scratch[:, :, : pages * PAGE]


def some_lists(shape, pages, first_page, g, device="cpu"):
    """Random ascending lists, some without entries in the piece, most with entries before and behind it; behind the
    counts is nonsense."""
    every = torch.arange(max(0, first_page - 5), first_page + pages + 5)
    lists = torch.full((*shape, len(every) + 2), 2**31 - 1, dtype=torch.int32)
    counts = torch.zeros(shape, dtype=torch.int32)
    for i, place in enumerate(torch.cartesian_prod(*map(torch.arange, shape)).tolist()):
        chosen = every[torch.rand(len(every), generator=g) < (0.3, 0.7, 0.0, 1.0)[i % 4]]
        if i % 5 == 1:
            chosen = chosen[(chosen < first_page) | (chosen >= first_page + pages)]
        counts[tuple(place)] = len(chosen)
        lists[(*place, slice(len(chosen)))] = chosen.int()
    return lists.to(device), counts.to(device)


def queries(tokens, heads, group, dim, dtype, g, device="cpu"):
    """[heads, group, tokens, dim], a view of tokens before heads."""
    fused = 2 * torch.randn(tokens, heads, group, dim, generator=g, device=device)
    return fused.to(dtype).permute(1, 2, 0, 3)


def check_attend(tokens, heads, group, dim, pages, dtype, kernel, first_page=7, device="cpu", before=3.0):
    """The kernel's result is the reference's, and nothing else is written. before: log-sum-exp of the attention
    found before, at about."""
    g, cpu = torch.Generator(device).manual_seed(tokens), torch.Generator().manual_seed(tokens)
    q, (k, v) = queries(tokens, heads, group, dim, dtype, g, device), piece(heads, pages, dim, dtype, g, device)
    wide = torch.full((heads, group, tokens + 3, dim), NAN, device=device)
    wide_lse = torch.full((heads, group, tokens + 3), NAN, device=device)
    total, lse = wide[:, :, :tokens], wide_lse[:, :, :tokens]
    total.copy_(torch.randn(heads, group, tokens, dim, generator=g, device=device))
    lse.copy_(before + torch.randn(heads, group, tokens, generator=g, device=device))
    lists, counts = some_lists((heads, group, -(-tokens // TILE)), pages, first_page, cpu, device)
    old, expected, expected_lse = total.clone(), total.clone(), lse.clone()
    attend_tiles_reference(q, k, v, lists, counts, first_page, expected, expected_lse, dim**-0.5)
    kernel(q, k, v, lists, counts, first_page, total, lse, dim**-0.5)
    assert wide[:, :, tokens:].isnan().all() and wide_lse[:, :, tokens:].isnan().all()
    untouched = (expected == old).all(dim=3)
    assert untouched.any() or heads * group * tokens < 3 * TILE
    assert torch.equal(total[untouched], old[untouched])
    assert rms_ratio(total, expected) < TOLERANCE[dtype]
    assert rms_ratio(lse, expected_lse) < TOLERANCE[dtype]


def every_entry(heads, group, tokens, pages, device="cpu"):
    tiles = -(-tokens // TILE)
    lists = torch.arange(pages, dtype=torch.int32, device=device).expand(heads, group, tiles, pages).contiguous()
    return lists, torch.full((heads, group, tiles), pages, dtype=torch.int32, device=device)
