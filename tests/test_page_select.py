"""Scoring and choosing pages in torch: scores against loops over groups, choices against sorting by hand."""

import math
from dataclasses import replace

import pytest
import torch
from page_views import listed, scattered_view
from selected_pages import CASES, Case, check_choice, chosen_by_hand, make, poisoned_scores, random_scores

from longrun.kernels.page_choose import Budget, choose_pages, chosen_shares
from longrun.kernels.page_score import score_pages
from longrun.kernels.page_view import PageView, decode_attention, view_of_all
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.page_digest import decode_digest, encode_digest
from longrun.quant.rotation import key_rotation

SCALE = 0.3


def scores_by_hand(case, q, view, digest):
    """Page by page and group by group in float64, the rotation undone by its matrix."""
    fmt = case.digest
    found = poisoned_scores(view, case.group)
    unrotated = q.double() @ key_rotation(case.dim)[1].double().T
    for head in range(view.num_heads):
        for entry, page in enumerate(listed(view, head)):
            centre, half = (x.double() for x in decode_digest(digest[head, page], fmt))
            for n in range(case.group):
                worth = [
                    SCALE * float(q[head, n].double() @ c + case.lam * unrotated[head, n].abs() @ h)
                    for c, h in zip(centre, half, strict=True)
                ]
                found[head, n, entry] = max(worth) + math.log(sum(math.exp(x - max(worth)) for x in worth))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(case):
    q, view, digest = make(case)
    expected = scores_by_hand(case, q, view, digest)
    for given in (q, q.bfloat16()):
        out = poisoned_scores(view, case.group)
        assert score_pages(given, view, digest, lam=case.lam, softmax_scale=SCALE, out=out) is out
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_scores_of_a_list_in_several_pieces(monkeypatch):
    monkeypatch.setattr("longrun.kernels.page_score._ENTRIES_AT_ONCE", 16)
    test_scores(Case((130, 67, 0, 129), 4, 128))
    test_scores(Case((16, 33), 2, 64, 8))


@pytest.mark.parametrize(("name", "value"), [("lam", 0.6), ("softmax_scale", 0.31)])
def test_lam_and_scale_count(name, value):
    q, view, digest = make(CASES[4])
    how = {"lam": 0.5, "softmax_scale": SCALE}
    first, second = (
        score_pages(q, view, digest, out=poisoned_scores(view, 3), **{**how, **more}) for more in ({}, {name: value})
    )
    assert (first - second).nan_to_num().abs().max() > 0.01


def test_a_page_of_like_tokens_is_scored_exactly():
    """All keys of a page are one: its score is the logarithm of its share of the sum, less what encoding rounds."""
    fmt, g = PageFormat("int4", 64, 64), torch.Generator().manual_seed(0)
    keys = torch.randn(1, 6, 1, 64, generator=g).expand(-1, -1, 64, -1) @ key_rotation(64)[1]
    payload, index = encode_pages(keys, keys, fmt)
    stored = decode_pages(payload, index, fmt)[0].float()
    table = torch.arange(6, dtype=torch.int32)[None]
    view = view_of_all(payload[0], table, index, fmt)
    q = torch.randn(1, 2, 64, generator=g) @ key_rotation(64)[0]
    digest = encode_digest(stored, DigestFormat(64, 64, centre_bits=8))
    out = score_pages(q, view, digest, lam=1.0, softmax_scale=0.125, out=torch.empty(1, 2, 6))
    for page in range(6):
        alone = replace(view, pages=table[:, page:], counts=torch.tensor([1], dtype=torch.int32))
        _, lse = decode_attention(q, alone, None, softmax_scale=0.125)
        assert torch.allclose(out[..., page] - math.log(4), lse - math.log(64), atol=0.02)


LISTS = [
    ((40,), {}),
    ((0, 1, 63, 64, 131), {}),
    ((50, 2, 0, 33), {"skip": 3, "limit": 31}),
    ((33, 70, 33), {"shared": True}),
    ((0, 0), {}),
]


@pytest.mark.parametrize(("pages", "newest"), [(1, 0), (1, 1), (7, 4), (32, 4), (64, 0), (200, 4)])
@pytest.mark.parametrize(("counts", "part"), LISTS, ids=str)
def test_choices(counts, part, pages, newest):
    view = scattered_view(PageFormat("int4", 64, 64), counts, **part)
    for seed, (group, ties) in enumerate([(1, False), (4, False), (3, True), (8, True)]):
        check_choice(choose_pages, view, random_scores(view, group, seed, ties), pages, newest)


@pytest.mark.parametrize("seed", range(20))
def test_choices_of_random_lists(seed):
    g = torch.Generator().manual_seed(seed)
    drawn = lambda low, high, n=(): torch.randint(low, high + 1, n, generator=g).tolist()  # noqa: E731
    view = scattered_view(PageFormat("int4", 64, 64), drawn(0, 150, (3,)), skip=drawn(0, 3), limit=drawn(0, 200))
    pages = drawn(1, 120)
    scores = random_scores(view, drawn(1, 8), seed, seed % 2 == 0)
    check_choice(choose_pages, view, scores, pages, drawn(0, min(5, pages)), share=drawn(0, 10_000) * (seed // 2 % 2))


@pytest.mark.parametrize(
    ("entries", "share", "expected"), [(100, 2500, 25), (101, 2500, 26), (19, 2500, 5), (3, 10_000, 3), (10**5, 1, 10)]
)
def test_a_share_of_a_list(entries, share, expected):
    assert Budget(5, share).most(entries) == expected
    scores = torch.randn(1, 2, entries, generator=torch.Generator().manual_seed(0))
    assert len(check_choice(choose_pages, plain_view(entries), scores, 5, 4, share=share)[0]) == expected


def chosen(view, scores, pages, newest=0) -> list[list[int]]:
    return check_choice(choose_pages, view, scores, pages, newest)


def plain_view(count, heads=1) -> PageView:
    table = torch.arange(count, dtype=torch.int32).expand(heads, -1)
    fmt = PageFormat("int4", 64, 64)
    index = torch.zeros(heads, count, 2, 64, dtype=torch.float16)
    return view_of_all(torch.zeros(count, fmt.payload_bytes, dtype=torch.uint8), table, index, fmt)


def test_a_query_head_of_large_scores_does_not_decide_alone():
    """One query head's scores lie 100 higher and are all alike; the other knows what it wants."""
    scores = torch.zeros(1, 2, 10)
    scores[0, 0] += 100
    scores[0, 1, 7] = 8
    assert chosen(plain_view(10), scores, 1) == [[7]]


def test_ties_go_to_the_lower_entry_and_newest_pages_are_always_there():
    scores = torch.zeros(1, 1, 10)
    assert chosen(plain_view(10), scores, 3) == [[0, 1, 2]]
    assert chosen(plain_view(10), scores, 5, newest=2) == [[0, 1, 2, 8, 9]]
    scores[0, 0, 8:] = -1000
    scores[0, 0, 4] = 1
    assert chosen(plain_view(10), scores, 3, newest=2) == [[4, 8, 9]]
    assert chosen(plain_view(10), scores, 2, newest=2) == [[8, 9]]


def test_a_better_page_is_never_left_out():
    """Raising one page's score keeps it chosen, and a larger budget only adds pages."""
    view = plain_view(60, heads=2)
    scores = random_scores(view, 4, seed=5)[:, :, :60].contiguous()
    before = [set()] * 2
    for pages in (1, 5, 6, 20, 59, 60):
        found = [set(numbers) for numbers in chosen(view, scores, pages)]
        assert all(map(set.issubset, before, found))
        before = found
    raised = scores.clone()
    raised[0, 2, 33] += 6
    assert 33 in chosen(view, raised, 5)[0]


def test_everything_chosen_reads_the_list_itself():
    view = scattered_view(PageFormat("k5v3", 64, 64), (9, 3))
    pages_out, counts_out = torch.full((2, 12), -7, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    scores = random_scores(view, 2)
    choose_pages(scores, view, budget=Budget(9), newest=2, pages_out=pages_out, counts_out=counts_out)
    made = replace(view, pages=pages_out, begins=torch.zeros_like(view.begins), counts=counts_out)
    q = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, decode_attention(q, made, None), decode_attention(q, view, None)))


@pytest.mark.parametrize("part", [{}, {"skip": 3, "limit": 40}, {"shared": True}])
def test_the_share_of_what_was_chosen(part):
    """By hand, query by query; scores of other entries are NaN."""
    view = scattered_view(PageFormat("int4", 64, 64), (60, 0, 7), **part)
    scores = random_scores(view, 3)
    pages, counts = torch.full((3, 12), -7, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    choose_pages(scores, view, budget=Budget(9), newest=2, pages_out=pages, counts_out=counts)
    shares = chosen_shares(scores, view, pages, counts)
    for head, numbers in enumerate(chosen_by_hand(view, scores, 9, 2)):
        mass = scores[head, :, : len(every := listed(view, head))].double().exp()
        read = [every.index(page) for page in numbers]
        expected = (mass[:, read].sum(1) / mass.sum(1)).mean() if every else 1.0
        assert shares[head].item() == pytest.approx(float(expected), rel=1e-5)
    assert shares[0] < 0.95 and (shares[1] == 1 or part.get("shared"))


def test_wrong_arguments_are_refused():
    view = plain_view(10)
    out = {"pages_out": torch.zeros(1, 4, dtype=torch.int32), "counts_out": torch.zeros(1, dtype=torch.int32)}
    for pages, newest in ((5, 0), (3, 4)):
        with pytest.raises(AssertionError):
            choose_pages(torch.zeros(1, 1, 10), view, budget=Budget(pages), newest=newest, **out)
    with pytest.raises(AssertionError):
        choose_pages(torch.zeros(1, 1, 10), view, budget=Budget(3, 5_000), newest=0, **out)
    for budget in ((0,), (1, -1), (1, 10_001)):
        with pytest.raises(AssertionError):
            Budget(*budget)
    q, view, digest = make(CASES[1])
    with pytest.raises(AssertionError, match="room for 2"):
        score_pages(q, view, digest, lam=0.5, softmax_scale=1.0, out=torch.zeros(1, 2, 2))
    with pytest.raises(AssertionError, match="527 bytes"):
        score_pages(q, view, digest[:, :, 1:].contiguous(), lam=0.5, softmax_scale=1.0, out=torch.zeros(1, 2, 3))
