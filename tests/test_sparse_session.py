"""Sessions that were read sparsely: they say so for ever, open under any setting, and may be read in several calls."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.errors import InputError, SessionError
from longrun.plan.budget import Budget
from longrun.runtime.runtime import Runtime
from longrun.specs.prefill_spec import PrefillSpec

SPEC = PrefillSpec(mass=0.5, dense_tokens=256, dense_end=104, newest=1, floor=2, least=0, cap=0.3)
BUDGET = Budget(10**9, weight_format="fp32", page_size=16, chunk_size=128)
N = 1000
SPARSE = N - 256 - 104  # whole chunks of 128
IDS = torch.randint(0, 97, (N,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, "llama", max_position_embeddings=2048, **{"head_dim": 64, "hidden_size": 192})
    return longrun.load(folder, BUDGET, device="cpu", ctx=1200, prefill=SPEC)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder: Path, fields: dict) -> None:
    """With a checksum that is right."""
    fields = {name: value for name, value in fields.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**fields, "sha256": digest}))


def test_a_session_says_for_ever_that_it_was_read_sparsely(sparse, tmp_path):
    session = sparse.new_session()
    session.prefill(IDS)
    assert session.sparse_tokens == SPARSE and 0 < session.prefill_counts.read_share < 0.5
    session.save(tmp_path / "kept")
    assert manifest(tmp_path / "kept")["sparse_tokens"] == SPARSE
    written = list(session.generate(5, eos=False))
    exact = sparse.derive(prefill="exact")
    for runtime in (exact, sparse):  # what is saved opens under either, and goes on alike
        loaded = runtime.load_session(tmp_path / "kept")
        assert loaded.sparse_tokens == SPARSE and loaded.num_tokens == N
        assert list(loaded.generate(5, eos=False)) == written
        loaded.save(tmp_path / "again")
        assert manifest(tmp_path / "again")["sparse_tokens"] == SPARSE
        loaded.detach()
    exactly = exact.load_session(tmp_path / "again", 2000)
    exactly.prefill(IDS[:500])
    assert exactly.sparse_tokens == SPARSE and exactly.prefill_counts is None
    never = exact.new_session()
    never.prefill(IDS)
    never.save(tmp_path / "never")
    assert never.sparse_tokens == manifest(tmp_path / "never")["sparse_tokens"] == 0
    assert not torch.equal(never.logits, session.logits)


def test_questions_and_short_texts_are_read_exactly(sparse):
    exact = sparse.derive(prefill="exact").new_session()
    session = sparse.new_session()
    for one in (exact, session):
        one.prefill(IDS[:400], sparse=False)
        one.prefill(IDS[400:504])  # as long as the end of a text that is always read exactly
    assert session.sparse_tokens == 0 and torch.equal(session.logits, exact.logits)
    session.prefill(IDS[504:800])
    assert session.sparse_tokens == 128  # what is left is less than a tile
    session.score(IDS[:300])
    assert session.sparse_tokens == 128
    with pytest.raises(InputError, match="sparse 1 is neither True nor False"):
        session.prefill(IDS[:5], sparse=1)
    with pytest.raises(InputError, match="more -1 is too small"):
        session.prefill(IDS[:5], more=-1)


def test_a_rewind_takes_sparse_tokens_back(sparse, tmp_path):
    session = sparse.new_session()
    session.prefill(IDS[:300], sparse=False)
    mark = session.mark()
    session.prefill(IDS[300:800])
    assert session.sparse_tokens == 384
    session.attach(tmp_path / "kept")
    session.prefill(IDS[800:810], sparse=False)
    assert manifest(tmp_path / "kept")["sparse_tokens"] == 384
    session.rewind(mark)
    session.prefill(IDS[:10], sparse=False)
    assert session.sparse_tokens == manifest(tmp_path / "kept")["sparse_tokens"] == 0


def test_a_document_in_several_calls_is_one(sparse):
    """As long as they end where chunks do: the same chunks, steered on from one call to the next."""
    whole, parts, forgotten = (sparse.new_session() for _ in range(3))
    whole.prefill(IDS)
    stops = [384, 512, 640, 768, 896, 1000]
    for first, stop in zip([0, *stops], stops, strict=False):
        parts.prefill(IDS[first:stop], more=N - stop)
        forgotten.prefill(IDS[first:stop])
    assert torch.equal(whole.logits, parts.logits) and parts.sparse_tokens == SPARSE
    assert whole.prefill_counts == parts.prefill_counts
    assert forgotten.sparse_tokens == 0
    # a rewind ends the document: what is read then is steered anew
    again = sparse.new_session()
    mark = again.mark()
    again.prefill(IDS[:640], more=N - 640)
    levels = again._engine.sparse.levels.left.clone()
    again.rewind(mark)
    again.prefill(IDS[:384], more=N - 384)
    assert not torch.equal(again._engine.sparse.levels.left, levels)
    again.prefill(IDS[384:], more=0)
    assert torch.equal(again.logits, whole.logits)


def test_sessions_of_before_were_read_exactly(sparse, tmp_path):
    session = sparse.new_session()
    session.prefill(IDS[:50])
    session.save(tmp_path)
    session.detach()
    fields = manifest(tmp_path)
    del fields["sparse_tokens"]
    write_manifest(tmp_path, fields)
    assert sparse.load_session(tmp_path).sparse_tokens == 0


@pytest.mark.parametrize("wrong", [-1, 51, 1.0, "7", None, True, [], 10**30])
def test_a_count_that_no_session_has(sparse, tmp_path, wrong):
    session = sparse.new_session()
    session.prefill(IDS[:50])
    session.save(tmp_path)
    session.detach()
    write_manifest(tmp_path, manifest(tmp_path) | {"sparse_tokens": wrong})
    with pytest.raises(SessionError, match=r"is no session of longrun's .*sparse_tokens is"):
        sparse.load_session(tmp_path)


def test_memory_of_two_runtimes_over_the_same_weights(sparse):
    """The workspace of one is counted where the other plans."""

    def taken():
        return sparse._setup.shared.taken_beside(sparse.parts.decoder)[0]

    before = taken()
    session = sparse.new_session()
    spec = session.plan.attention
    assert spec.sparse_bytes() == session._engine.sparse.nbytes > 0
    held = sum(session.plan.cache.device_bytes().values()) + spec.scratch_bytes() + spec.decode_bytes()
    assert taken() - before == held + spec.sparse_bytes()
