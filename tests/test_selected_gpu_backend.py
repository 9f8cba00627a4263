"""Selected decode of the GPU backend over the torch references of its kernels: the answer is the torch backend's, no
host page is fetched, steps run ahead."""

from dataclasses import replace

import pytest
import torch
from test_gpu_backend import SHAPE, TOLERANCE, engines, rms_ratio
from tiny_models import tiny_model

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.kernels.gpu_kernels import reference_kernels
from longrun.kernels.page_select_cuda import ChoiceWorkspace
from longrun.session.session import Session
from longrun.specs.reach import ALL_TOKENS

IDS = torch.randint(0, 97, (700,), generator=torch.Generator().manual_seed(5))
REACHES = ((ALL_TOKENS, 200), (130,), ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("selecting")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    return path


def decoded(engine, *spans):
    """Logits after each token of the spans (begin, end), taken one by one; between them the text is read in chunks."""
    rows = []
    for begin, end in spans or ((520, 530), (570, 584), (634, 642)):
        engine.run(IDS[engine.cache.seq_len : begin])
        rows += [engine.run_one(token) for token in IDS[begin:end].tolist()]
    return torch.stack(rows)


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
@pytest.mark.parametrize("changes", [{}, {"reaches": REACHES}])
def test_as_long_as_all_pages_are_chosen_it_is_dense_attention(folder, kv, changes):
    dense, selecting = (engines(folder, kv=kv, select=select, **changes)[0] for select in (None, 7))
    assert selecting.attention.decode._selector is not None and dense.attention.decode._selector is None
    # 576 tokens are seven pages, the sink page and a full tail; the next one flushes it.
    spans = ((300, 322), (445, 452), (508, 516), (565, 590))
    rows = [decoded(engine, *spans) for engine in (dense, selecting)]
    same = (rows[0] == rows[1]).all(dim=1).tolist()
    assert same == [True] * (len(same) - 14) + [False] * 14


def by_number(q, view, digest, *, out, **_):
    """Scores that change from page to page, head to head and length to length, and not with a rounding of the query."""
    heads, entries = torch.arange(view.num_heads)[:, None], torch.arange(out.shape[2])
    out[:] = torch.cos(5.0 * entries + 3 * heads + view.counts[:, None])[:, None]
    return out


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("scores", ["mixed", "full"])
def test_few_pages_agree_with_the_torch_backend(folder, scores, share, monkeypatch):
    monkeypatch.setattr("longrun.runtime.backend.score_pages", by_number)
    fused, plain = engines(folder, scores, share, select=5, kernels=replace(reference_kernels(), score_pages=by_number))
    rows = [decoded(engine) for engine in (fused, plain)]
    fetched = fused.attention.decode._host_parts
    assert not any(fetched(idx, pages) for idx, (pages, _) in enumerate(fused.cache.layers) if pages is not None)
    fused.cache.check()
    assert share == 1.0 or fused.cache.spec.host_pages
    assert rms_ratio(*rows) < 8 * TOLERANCE
    dense = decoded(engines(folder, scores, share)[1])
    assert rms_ratio(rows[0], dense) > 20 * TOLERANCE


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_short_texts_are_read_whole(folder, share, ahead):
    """Up to 512 tokens heads have six pages, and steps select from seven on; host pages are fetched until then."""

    def written(engine, *spans):
        rows, selected = [], []
        for begin, end in spans:
            engine.run(IDS[engine.cache.seq_len : begin])
            for token in IDS[begin:end].tolist():
                rows.append(engine.run_one(token, ahead))
                selected.append(engine.attention.decode._selects)
        return torch.stack(rows), selected

    dense, some = (engines(folder, "full", share, select=select, select_from=7)[0] for select in (None, 5))
    (expected, _), (found, selected) = (written(engine, (400, 405), (443, 452), (500, 524)) for engine in (dense, some))
    assert torch.equal(found[:26], expected[:26]) and not torch.equal(found[26:], expected[26:])
    if not ahead:  # a step launched ahead is the one after
        assert selected == [False] * 26 + [True] * 12
    forced, some = (engines(folder, "full", share, select=5, select_from=begin)[0] for begin in (0, 7))
    (expected, _), (found, selected) = (written(engine, (520, 532), (572, 580)) for engine in (forced, some))
    assert torch.equal(found, expected) and all(selected)
    dense.run(IDS[524:525])
    assert dense.cache.seq_len == 525


def test_pages_are_read_where_they_stand(folder):
    """The same pages are chosen and read, on the device or on the host, and the digests do not leave the device."""
    resident, offloaded = (engines(folder, "full", share, select=5)[0] for share in (1.0, 0.2))
    assert torch.equal(decoded(resident), decoded(offloaded))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_greedy_steps_ahead_are_the_steps_themselves(folder, share):
    plain, ahead = (engines(folder, "mixed", share, select=5)[0] for _ in range(2))
    for engine in (plain, ahead):
        engine.run(IDS[:500])
    token = other = 5
    for _ in range(90):
        expected, found = plain.run_one(token), ahead.run_one(other, ahead=True)
        assert torch.equal(expected, found)
        token, other = int(expected.argmax()), ahead.next_token_id()
        assert token == other


def test_a_rewind_and_a_step_thrown_away_change_nothing(folder):
    engine = engines(folder, "mixed", 0.5, select=5)[0]
    session = Session(engine, None, None, frozenset())
    session.prefill(IDS[:560])
    mark = session.mark()
    answer = list(session.generate(24, eos=False))
    for _ in range(2):
        session.rewind(mark)
        assert list(session.generate(24, eos=False)) == answer
        session.rewind(mark)
        assert session.score(answer, one_by_one=True).argmax(dim=-1).tolist() == answer
    session.rewind(mark)
    one = list(session.generate(1, eos=False))
    exact = session.prefill(answer[1:2])  # the token that waits and this one, in one chunk
    session.rewind(mark)
    assert one == answer[:1] and torch.equal(session.prefill(answer[:2]), exact)


@pytest.mark.parametrize(("heads", "group", "listed"), [(1, 1, 10), (3, 2, 1000), (8, 4, 156_000)])
def test_the_scratch_of_a_choice_has_its_bytes_in_the_plan(folder, heads, group, listed):
    spec = engines(folder, select=5)[0].attention.spec
    changed = {"max_retrieval_heads": heads, "num_qo_heads": group, "num_kv_heads": 1, "listed_pages": listed}
    sizes = [replace(spec, fused=fused, **changed).selection_bytes() for fused in (True, False)]
    assert sizes[0] - sizes[1] == ChoiceWorkspace.bytes_for(heads, group, listed)
