"""The compiled CPU kernels that score and choose pages, against the torch references."""

import pytest
import torch
from page_views import scattered_view
from selected_pages import CASES, Case, check_choice, make, poisoned_scores, random_scores
from test_page_select import LISTS, SCALE

from longrun.kernels.cpu_select import CpuSelect
from longrun.kernels.page_choose import Budget
from longrun.kernels.page_score import score_pages
from longrun.paths import cache_dir
from longrun.quant.kv_format import PageFormat

TINY = PageFormat("int4", 16, 16)  # choosing reads no page


@pytest.fixture(scope="module")
def kernel():
    return CpuSelect(cache_dir() / "kernels")  # compiled by whichever test comes first


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [*CASES, Case((300, 129), 6, 128), Case((128, 257), 1, 64, 8)], ids=str)
def test_scores(kernel, threads, case):
    q, view, digest = make(case)
    for given in (q, q.bfloat16()):
        expected, out = poisoned_scores(view, case.group), poisoned_scores(view, case.group)
        score_pages(given, view, digest, lam=case.lam, softmax_scale=SCALE, out=expected)
        assert kernel.score_pages(given, view, digest, lam=case.lam, softmax_scale=SCALE, out=out) is out
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("pages", "newest"), [(1, 0), (1, 1), (7, 4), (64, 0), (200, 4)])
@pytest.mark.parametrize(("counts", "part"), LISTS, ids=str)
def test_choices(kernel, counts, part, pages, newest):
    view = scattered_view(TINY, counts, **part)
    for seed, (group, ties) in enumerate([(1, False), (4, False), (3, True), (8, True)]):
        check_choice(kernel.choose_pages, view, random_scores(view, group, seed, ties), pages, newest)


@pytest.mark.parametrize("seed", range(20))
def test_choices_of_random_lists(kernel, seed):
    g = torch.Generator().manual_seed(seed)
    drawn = lambda low, high, n=(): torch.randint(low, high + 1, n, generator=g).tolist()  # noqa: E731
    view = scattered_view(TINY, drawn(0, 900, (3,)), skip=drawn(0, 3), limit=drawn(0, 1200))
    scores, pages = random_scores(view, drawn(1, 8), seed, seed % 2 == 0, 10.0 ** drawn(-4, 3)), drawn(1, 700)
    check_choice(kernel.choose_pages, view, scores, pages, drawn(0, min(5, pages)), share=drawn(0, 10_000) * (seed % 2))


def test_a_prepared_call_reads_what_stands_there(kernel):
    case = Case((40, 33), 2, 64)
    (q, view, digest), (other_q, other, other_digest) = make(case), make(case, seed=5)
    out, found = poisoned_scores(view, 2), torch.full((2, 9), -7, dtype=torch.int32)
    counts = torch.full((2,), -7, dtype=torch.int32)
    score = kernel.prepare_score(q, view, digest, lam=0.5, softmax_scale=SCALE, out=out)
    into = {"budget": Budget(9), "newest": 2, "pages_out": found, "counts_out": counts}
    choose = kernel.prepare_choose(out, view, **into)
    for to, of in ((q, other_q), (view.pages, other.pages), (view.begins, other.begins), (digest, other_digest)):
        to.copy_(of)
    view.counts.copy_(torch.tensor([40, 5]))
    assert score() == 40 and choose() is None
    expected = score_pages(q, view, digest, lam=0.5, softmax_scale=SCALE, out=poisoned_scores(view, 2))
    assert torch.allclose(out[1, :, :5], expected[1, :, :5], rtol=1e-5, atol=1e-4) and out[1, :, 5:].isnan().all()
    assert counts.tolist() == [9, 5] and found[1, 5:].tolist() == [-7] * 4


def test_a_list_longer_than_the_room_is_refused(kernel):
    q, view, digest = make(Case((9,), 2, 64))
    with pytest.raises(AssertionError, match="room for 8"):
        kernel.score_pages(q, view, digest, lam=0.5, softmax_scale=1.0, out=torch.zeros(1, 2, 8))
