"""Selected decode on a real GPU, within the captured graph: `pytest -m gpu`. Collected only where there is one."""

import pytest
import torch
from test_gpu import load, rms_ratio
from tiny_models import tiny_model

from longrun.cache.spans import HOST
from longrun.kernels import page_choose, page_score

pytestmark = pytest.mark.gpu

IDS = torch.randint(0, 97, (880,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[64, 128])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("selecting")
    shape = {"head_dim": request.param, "hidden_size": 6 * request.param, "intermediate_size": 320}
    tiny_model("llama", **shape, num_attention_heads=6).save_pretrained(path)
    return path


def after(folder, select, count=560, **options):
    options.setdefault("select_from", None if select is None else 0)
    runtime = load(folder, "cuda", select=select, **{"kv": "k5v3", **options})
    session = runtime.new_session()
    session.prefill(IDS[:count])
    return runtime, session


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
def test_as_long_as_all_pages_are_chosen_it_is_dense_attention(folder, kv):
    rows = [after(folder, select, 300, kv=kv, device_share=1.0)[1].score(IDS[300:620], True) for select in (None, 7)]
    same = (rows[0] == rows[1]).all(dim=1).tolist()
    flushes = 9 * 64 - 300 + 1  # the row after the token that finds a sink page, seven pages and a full tail
    assert all(same[:flushes]) and not any(same[flushes:])


@pytest.mark.parametrize("device_share", [1.0, 0.4])
def test_short_texts_are_read_whole_by_a_graph_of_their_own(folder, device_share):
    """Up to 512 tokens heads have six pages; steps select from seven on. A rewind goes back to the other graph."""
    sessions = [after(folder, n, 460, select_from=f, device_share=device_share)[1] for n, f in ((None, None), (5, 7))]
    marks = [session.mark() for session in sessions]
    for _ in range(2):
        rows = [session.score(IDS[460:600], one_by_one=True) for session in sessions]
        assert torch.equal(rows[0][: 512 - 460], rows[1][: 512 - 460])
        assert not torch.equal(rows[0][-1], rows[1][-1])
        for session, mark in zip(sessions, marks, strict=True):
            session.rewind(mark)
    answers = [list(session.generate(50, eos=False)) for session in sessions]  # ahead
    assert answers[0] == answers[1]
    forced = after(folder, 5, 560, device_share=device_share)[1]
    some = after(folder, 5, 560, select_from=7, device_share=device_share)[1]
    assert torch.equal(*(session.score(IDS[560:600], one_by_one=True) for session in (forced, some)))


def test_an_estimate_of_what_pages_hold_changes_no_answer(folder):
    asked, other = (after(folder, 5, 500, device_share=0.4)[1] for _ in range(2))
    for token in IDS[500:570]:
        caught = asked.caught_mass()
        assert (caught is None) == (asked.seq_len % 64 == 0) and (caught is None or 0 < caught.share < 1)
        assert torch.equal(*(session.prefill(token[None], one_by_one=True) for session in (asked, other)))
    asked.cache.check()


@pytest.mark.parametrize("device_share", [1.0, 0.4, 0.0])
def test_the_graph_chooses_what_the_references_choose(folder, device_share):
    """Of the last layer with pages, whose queries and buffers a step leaves behind."""
    runtime, session = after(folder, 5, device_share=device_share)
    decode = runtime.engine(session).attention.decode
    selector, cache, layer_idx = decode._selector, session.cache, 2
    for count in (1, 70, 64):
        start = session.seq_len
        session.prefill(IDS[start : start + count], one_by_one=True)
        torch.cuda.synchronize()
        pages, view = cache.layers[layer_idx][0], cache.view(layer_idx)
        assert (pages.num_pages(HOST) > 0) == (device_share < 1)
        heads, room = view.num_heads, selector._scores.shape[2]
        q = decode._q[: heads * decode._spec.group].view(heads, -1, decode._spec.head_dim)
        counts, scores = view.counts.tolist(), selector._scores[:heads]
        expected = page_score.score_pages(
            q, view, pages.digest, lam=0.25, softmax_scale=q.shape[2] ** -0.5, out=torch.zeros_like(scores)
        )
        for head, listed in enumerate(counts):
            assert 5 < listed <= room
            assert rms_ratio(scores[head, :, :listed], expected[head, :, :listed]) < 2e-3
        chosen, lengths = torch.zeros_like(selector._pages[:heads]), torch.zeros_like(selector._counts[:heads])
        page_choose.choose_pages(
            scores.contiguous(), view, budget=page_choose.Budget(5), newest=4, pages_out=chosen, counts_out=lengths
        )
        assert lengths.tolist() == selector._counts[:heads].tolist() == [5] * heads
        assert torch.equal(chosen, selector._pages[:heads])


def test_pages_are_read_where_they_stand(folder):
    """The same session, its oldest pages on the device moved to the host between two readings of one token; lists stay
    ascending, as selection takes the newest pages from their end."""
    session = after(folder, 6, 700, device_share=0.4)[1]
    mark = session.mark()
    expected = session.prefill(IDS[700:701], one_by_one=True)
    session.rewind(mark)
    for pages, _ in session.cache.layers:
        if pages is not None:
            on_host = pages.num_pages(HOST) // pages.num_heads
            for head in range(pages.num_heads):
                pages.places.move(head, [on_host, on_host + 1], to_host=True)
            assert pages.num_pages(HOST) == (on_host + 2) * pages.num_heads
    assert rms_ratio(session.prefill(IDS[700:701], one_by_one=True), expected) < 5e-3
    session.cache.check()


@pytest.mark.parametrize("device_share", [1.0, 0.3])
def test_greedy_answers_are_those_read_one_by_one(folder, device_share):
    """`generate` launches steps ahead; reading its tokens again does not."""
    session = after(folder, 5, device_share=device_share)[1]
    mark = session.mark()
    answer = list(session.generate(200, eos=False))
    session.rewind(mark)
    assert session.score(answer, one_by_one=True).argmax(dim=-1).tolist() == answer
    session.rewind(mark)
    assert list(session.generate(200, eos=False)) == answer


def test_reading_is_exact(folder):
    """Chunks, also of one token, see all pages: the logits are those without selection but for rounding."""
    rows = []
    for select in (None, 5):
        session = after(folder, select, 500, device_share=0.5)[1]
        rows.append(torch.stack([session.prefill(piece) for piece in IDS[500:660].split([1, 1, 100, 1, 57])]))
    assert rms_ratio(*rows) < 1e-2  # a chunk of one token takes other kernels than the graph does: 0.0064


def test_saved_under_one_selection_and_opened_under_another(folder, tmp_path):
    after(folder, 5)[1].save(tmp_path / "session")
    for select in (None, 6):
        runtime, fresh = after(folder, select)
        loaded = runtime.load_session(tmp_path / "session")
        rows = [session.score(IDS[560:600], one_by_one=True) for session in (loaded, fresh)]
        assert torch.equal(*rows)
        del runtime, fresh, loaded
