"""Sparse prefill's references: scores of pages, lists of a choice, and attention to listed pages."""

import math

import pytest
import torch
from tile_case import NAN, choose, every_entry, random_scores, shares_of

from longrun.kernels.dense_attention import merge_partial, reference_attention_with_lse
from longrun.kernels.tile_attention import LOWEST, TILE, attend_tiles_reference, score_tiles_reference
from longrun.specs import prefill_spec


def chosen_by_sorting(shares, left, floor, cap, newest):
    """The entries that a choice by sorting takes: float64 shares [P]."""
    entries = len(shares)
    newest = min(newest, entries)
    order = shares[: entries - newest].argsort(descending=True).tolist()
    chosen, missing = set(range(entries - newest, entries)), shares[: entries - newest].sum().item()
    while order and len(chosen) < cap and (len(chosen) < floor or missing >= left):
        entry = order.pop(0)
        chosen.add(entry)
        missing -= shares[entry].item()
    return chosen


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("entries", [1, 5, 300])
@pytest.mark.parametrize(("left", "floor", "cap", "newest"), [(0.05, 3, 200, 2), (0.2, 0, 40, 0), (1e-3, 16, 25, 4)])
def test_a_choice_is_that_of_sorting(rows, entries, left, floor, cap, newest):
    scores, own_lse = random_scores(9, rows, entries)
    found, missed = choose(scores, own_lse, left, floor, cap, newest)
    shares = shares_of(scores, own_lse)
    for tile, entries_of in enumerate(found):
        expected = chosen_by_sorting(shares[tile], left, floor, cap, newest)
        assert expected <= entries_of or len(entries_of) == min(cap, entries)  # ties within 2^-9 may join
        assert len(entries_of) - len(expected) <= 1
        others = sorted(set(range(entries)) - entries_of)
        assert missed[tile].item() == pytest.approx(shares[tile][others].sum().item(), abs=1e-5)


def test_nothing_left_reads_everything():
    scores, own_lse = random_scores(3, 1, 50)
    scores[:, :, 7] = -65504.0  # a share of 0
    assert choose(scores, own_lse, 0.0, 0, 50, 0)[0] == [set(range(50))] * 3
    assert [len(x) for x in choose(scores, own_lse, 0.0, 0, 20, 3)[0]] == [20] * 3


def test_ties_are_cut_from_the_front_and_the_newest_never():
    scores = torch.zeros(1, 1, 40).half()
    scores[0, 0, [3, 30]] = 4.0
    own_lse = torch.zeros(1, 1)
    assert choose(scores, own_lse, 1e-3, 0, 10, 2)[0] == [{3, 30, 38, 39, *range(32, 38)}]
    # the mass asks for no more: the floor alone takes of the ties what it needs, and not all of them
    assert choose(scores, own_lse, 0.9, 6, 40, 2)[0] == [{3, 30, 36, 37, 38, 39}]
    far = scores.clone()
    far[0, 0, :30] = -60.0  # all of them below 2^LOWEST
    assert -60 * math.log2(math.e) < LOWEST
    assert choose(far, own_lse + 20, 0.5, 12, 40, 2)[0] == [set(range(28, 40))]


def test_a_choice_of_few_entries():
    scores, own_lse = random_scores(2, 1, 3)
    assert choose(scores, own_lse, 0.5, 16, 64, 4)[0] == [{0, 1, 2}] * 2
    assert choose(scores, own_lse, 1.0, 1, 1, 1)[0] == [{2}] * 2  # newest is the cap
    assert choose(scores, own_lse, 1.0, 0, 5, 0)[0] == [set()] * 2  # nothing is asked for
    found, missed = choose(scores[..., :0], own_lse, 0.1, 2, 5, 1)
    assert found == [set()] * 2 and missed.tolist() == [0.0, 0.0]
    one = torch.full((1, 1, 4), -60000.0).half()
    one[0, 0, 1] = 60000.0  # a share of 1
    assert choose(one, torch.zeros(1, 1), 0.1, 0, 2, 0)[0] == [{1}]


@pytest.mark.parametrize("page_size", [16, 64])
def test_scores_are_log_sum_exps_of_pages(page_size):
    g = torch.Generator().manual_seed(0)
    rows, k = torch.randn(2, 7, 32, generator=g), torch.randn(2, 5 * page_size, 32, generator=g)
    k[0, 0] *= 1e6
    scores = torch.full((2, 7, 9), NAN).half()
    score_tiles_reference(rows, k, scores, 3, 0.25, page_size)
    products = torch.einsum("hnd,htd->hnt", rows.double(), k.double()) * 0.25
    expected = products.unflatten(2, (5, page_size)).exp().sum(dim=3).log()
    huge = expected.isinf() | (expected.abs() > 60000)
    assert huge.any() and not huge.all()
    assert (scores[:, :, 3:8].double() - expected)[~huge].abs().max() < 0.01
    assert (scores[:, :, 3:8][expected > 70000] == 65504).all()
    assert scores[:, :, [0, 1, 2, 8]].isnan().all() and scores[:, :, 3:8].isfinite().all()


def case(tokens, heads, group, pages, dim=64, page_size=64, dtype=torch.float32, seed=0, device="cpu"):
    """q, k, v, and total, lse of other keys."""
    g = torch.Generator(device).manual_seed(seed)
    q = (2 * torch.randn(heads, group, tokens, dim, generator=g, device=device)).to(dtype)
    k, v = torch.randn(2, heads, pages * page_size, dim, generator=g, device=device).to(dtype)
    total = torch.randn(heads, group, tokens, dim, generator=g, device=device)
    return q, k, v, total, torch.randn(heads, group, tokens, generator=g, device=device) + 3


@pytest.mark.parametrize("pieces", [[6], [1, 3, 2]])
def test_every_page_listed_is_dense_attention(pieces):
    q, k, v, total, lse = case(300, 2, 3, 6)
    lists, counts = every_entry(2, 3, 300, 6)
    by_head = [x.flatten(0, 1) for x in (q, total, lse)]
    dense = reference_attention_with_lse(by_head[0], *(x.repeat_interleave(3, dim=0) for x in (k, v)), False, 0.125)
    expected, expected_lse = merge_partial(by_head[1].clone(), by_head[2], *dense)
    first = 0
    for pages in pieces:
        part = slice(first * 64, (first + pages) * 64)
        attend_tiles_reference(q, k[:, part], v[:, part], lists, counts, first, total, lse, 0.125)
        first += pages
    torch.testing.assert_close(total.flatten(0, 1), expected)
    torch.testing.assert_close(lse.flatten(0, 1), expected_lse)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_tile_reads_its_list_and_no_more(page_size):
    q, k, v, total, lse = case(150, 1, 2, 8, 32, page_size)
    before = total.clone(), lse.clone()
    lists = torch.full((1, 2, 2, 5), 10**6, dtype=torch.int32)  # behind the counts
    counts = torch.tensor([[[3, 0], [1, 2]]], dtype=torch.int32)
    lists[0, 0, 0, :3], lists[0, 1, 0, :1] = torch.tensor([1, 12, 17]), torch.tensor([9])
    lists[0, 1, 1, :2] = torch.tensor([18, 40])
    attend_tiles_reference(q, k, v, lists, counts, 10, total, lse, 0.125, page_size)  # entries 10 .. 17
    read = torch.cat([torch.arange(page_size) + page * page_size for page in (2, 7)])
    products = (q[0, 0, :128] @ k[0, read].T * 0.125).double()
    everything = torch.cat((before[1][0, 0, :128, None].double(), products), dim=1)
    expected = torch.softmax(everything, dim=1) @ torch.cat((torch.zeros(1, 32), v[0, read])).double()
    expected += torch.softmax(everything, dim=1)[:, :1] * before[0][0, 0, :128]
    torch.testing.assert_close(total[0, 0, :128].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[0, 0, :128].double(), everything.logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    for same in ((0, 0, slice(128, None)), (0, 1)):
        assert torch.equal(total[same], before[0][same]) and torch.equal(lse[same], before[1][same])


def test_an_empty_side_adds_nothing():
    q, k, v, total, lse = case(40, 1, 1, 2)
    total.fill_(NAN)
    lse[:, :, :20], lse[:, :, 20:] = -math.inf, NAN
    attend_tiles_reference(q, k, v, *every_entry(1, 1, 40, 2), 0, total, lse, 0.125)
    expected, expected_lse = reference_attention_with_lse(q[0], k, v, False, 0.125)
    torch.testing.assert_close(total[0], expected)
    torch.testing.assert_close(lse[0], expected_lse)


def test_choosing_in_parts_is_choosing_at_once(monkeypatch):
    scores, own_lse = random_scores(11, 2, 70)
    whole, missed = choose(scores, own_lse, 0.2, 3, 40, 2)
    monkeypatch.setattr("longrun.kernels.tile_attention._SCORES_AT_ONCE", 3 * 2 * 70)
    parts, missed_in_parts = choose(scores, own_lse, 0.2, 3, 40, 2)
    assert parts == whole and torch.equal(missed, missed_in_parts)


def test_tiles_of_the_spec_are_the_kernels():
    assert prefill_spec.TILE == TILE
