"""Documents that a server reads sparsely: as it was started or as each is put, told by their status, and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_case import NAME, Served, save_chat_model, serve, user, wait_for
from test_server_documents import TEXT, ask, status

from longrun.session.session import Session
from longrun.specs.prefill_spec import PrefillSpec
from scripts import put_document

SPEC = PrefillSpec(mass=0.5, dense_tokens=256, dense_end=200, newest=1, floor=2, least=0, cap=0.3)
SETTINGS: dict[str, Any] = {"kv_format": "k5v3", "chunk_size": 128}
SPARSE = {"prefill": SPEC, **SETTINGS}
EXACTLY = {"prefill": "exact", "sparse_tokens": 0, "read_share": None, "caught_share": None}
QUESTION = user("who was it?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "wide", head_dim=64, hidden_size=192)


@pytest.fixture
def sparse(model: Path, tmp_path: Path) -> Iterator[Served]:
    with serve(model, documents=tmp_path / "kept", **SPARSE) as running:
        yield running


def put(served: Served, name: str, text: str, prefill: str | None = None) -> httpx.Response:
    params = {} if prefill is None else {"prefill": prefill}
    headers = {"Content-Type": "text/plain"}
    return httpx.put(f"{served.root}/documents/{name}", content=text, headers=headers, params=params, timeout=60)


def put_and_wait(served: Served, name: str, text: str, prefill: str | None = None) -> dict[str, Any]:
    assert put(served, name, text, prefill).status_code == 202
    wait_for(lambda: status(served, name)["state"] not in ("queued", "reading"))
    told = status(served, name)
    assert told["state"] == "ready", told
    return told


def check_sparse(told: dict[str, Any]) -> None:
    reading, tokens = told["reading"], told["tokens"]
    assert reading["prefill"] == "sparse" and tokens - 256 - 200 - 128 < reading["sparse_tokens"] <= tokens - 256 - 200
    assert 0 < reading["read_share"] < 0.5 and 0 < reading["caught_share"] < 1


def test_a_document_is_read_as_the_server_reads_or_as_it_is_put(sparse: Served, tmp_path: Path, model: Path) -> None:
    told = put_and_wait(sparse, "one", TEXT)
    check_sparse(told)
    exact = put_and_wait(sparse, "two", TEXT, "exact")  # the same text, which stands in memory: it is read again
    assert exact["reading"] == EXACTLY
    check_sparse(put_and_wait(sparse, "three", f"Hear: {TEXT}", "sparse"))
    now = httpx.get(f"{sparse.root}/status").json()
    assert (
        now["prefill"]["mass"] == 0.5
        and now["context"]["sparse_tokens"] == status(sparse, "three")["reading"]["sparse_tokens"]
    )
    # a question reads the session that belongs to its document, whatever stands in memory
    answers = [ask(sparse, name, QUESTION)[0] for name in ("one", "two", "one", "two")]
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
    with serve(model, documents=tmp_path / "exact", **SETTINGS) as served:
        assert put_and_wait(served, "two", TEXT)["reading"] == EXACTLY
        assert ask(served, "two", QUESTION)[0] == answers[1]


def test_it_is_read_again_only_where_it_must_be_exact(sparse: Served) -> None:
    sparse_told = put_and_wait(sparse, "one", TEXT)
    assert put(sparse, "one", TEXT).status_code == 200 == put(sparse, "one", TEXT, "sparse").status_code
    assert status(sparse, "one") == sparse_told
    assert put_and_wait(sparse, "one", TEXT, "exact")["reading"] == EXACTLY
    for prefill in (None, "exact", "sparse"):
        assert put(sparse, "one", TEXT, prefill).status_code == 200
    assert status(sparse, "one")["reading"] == EXACTLY
    longer = put_and_wait(sparse, "one", TEXT + "It ends here. " * 20)  # as it was read before
    assert longer["reading"] == EXACTLY
    longer = put_and_wait(sparse, "one", TEXT + "It ends here. " * 50, "sparse")  # only what is new
    assert longer["reading"]["prefill"] == "sparse"
    assert 0 < longer["reading"]["sparse_tokens"] < 14 * 30 + 200


def test_how_it_was_read_is_kept_over_restarts(model: Path, tmp_path: Path) -> None:
    with serve(model, documents=tmp_path / "kept", **SPARSE) as served:
        told = put_and_wait(served, "one", TEXT)
        answer = ask(served, "one", QUESTION)[0]
    record = json.loads((tmp_path / "kept" / "one" / "document.json").read_text())
    assert record["prefill"] == "sparse" and len(record["sparse_counts"]) == 4
    with serve(model, documents=tmp_path / "kept", **SETTINGS) as served:  # which reads exactly
        assert status(served, "one") == told and ask(served, "one", QUESTION)[0] == answer
        assert httpx.get(f"{served.root}/status").json()["prefill"] is None
        assert put(served, "one", TEXT).status_code == 200, "the same text, read as it was"
        assert put_and_wait(served, "one", TEXT, "exact")["reading"] == EXACTLY
    del record["prefill"], record["sparse_counts"]  # as records were once
    (tmp_path / "kept" / "one" / "document.json").write_text(json.dumps(record))
    with serve(model, documents=tmp_path / "kept", **SPARSE) as served:
        assert status(served, "one")["reading"] == EXACTLY


def test_prompts_are_read_as_the_server_reads_and_questions_exactly(
    sparse: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, prefill = [], Session.prefill

    def noted(self: Session, token_ids: list[int], *given: Any, sparse: bool = True, more: int = 0) -> Any:
        seen.append((sparse, more, len(token_ids)))
        return prefill(self, token_ids, *given, sparse=sparse, more=more)

    monkeypatch.setattr(Session, "prefill", noted)
    put_and_wait(sparse, "one", TEXT)
    assert all(may_be for may_be, _, _ in seen) and seen[-1][1] == 0
    assert [more for _, more, _ in seen] == [sum(count for _, _, count in seen[at + 1 :]) for at in range(len(seen))]
    seen.clear()
    ask(sparse, "one", user(TEXT[:700]))
    assert seen and not any(may_be for may_be, _, _ in seen)
    seen.clear()
    sparse.client().chat.completions.create(model=NAME, messages=user("Now: " + TEXT), max_tokens=3)
    assert seen and all(may_be for may_be, _, _ in seen)
    assert httpx.get(f"{sparse.root}/status").json()["context"]["sparse_tokens"] > 500


def test_refusals(sparse: Served, model: Path, tmp_path: Path) -> None:
    refused = put(sparse, "one", TEXT, "dense")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prefill"
    assert "prefill 'dense' is unknown: use exact or sparse" in refused.json()["error"]["message"]
    assert put(sparse, "one", TEXT, "").status_code == 400
    assert httpx.get(f"{sparse.root}/documents").json()["data"] == []
    with serve(model, documents=tmp_path / "exact", **SETTINGS) as served:
        put_and_wait(served, "one", TEXT)
        refused = put(served, "one", TEXT, "sparse")
        assert refused.status_code == 400 and "this server reads exactly" in refused.json()["error"]["message"]
        assert status(served, "one")["state"] == "ready"


@pytest.mark.parametrize(
    "wrong", [{"prefill": "dense"}, {"prefill": 1}, {"sparse_counts": [1]}, {"sparse_counts": [1, 2, 3, -1]},
              {"sparse_counts": [1, 2, 3, "4"]}, {"sparse_counts": [1, 2, 3, True]}, {"sparse_counts": None}],
)  # fmt: skip
def test_records_that_no_server_wrote(sparse: Served, wrong: dict[str, Any], tmp_path: Path) -> None:
    from longrun.errors import InputError
    from longrun.server.document_files import DocumentFiles

    put_and_wait(sparse, "one", "short")
    path = tmp_path / "kept" / "one" / "document.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    sparse.serving.service.documents.close()
    with pytest.raises(InputError, match="is no record of a document"):
        DocumentFiles(tmp_path / "kept").found()


def test_the_script_that_puts_documents(sparse: Served, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    shared = [str(tmp_path / "text.txt"), "--url", f"{sparse.root}/v1"]
    put_document.main([*shared, "--name", "one"])
    put_document.main([*shared, "--name", "two", "--prefill", "exact"])
    assert capsys.readouterr().out.split() == [f"{NAME}@one", f"{NAME}@two"]
    check_sparse(status(sparse, "one"))
    assert status(sparse, "two")["reading"] == EXACTLY
