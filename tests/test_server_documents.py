"""Documents: put, read once, kept over restarts, asked through a model of their own, deleted."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_case import LIMITS, NAME, TEMPLATE, Served, serve, user, wait_for
from test_archives import zipped
from transformers import AutoTokenizer

from longrun.documents.find import read_documents
from longrun.documents.parts import file_part, joined
from longrun.errors import InputError, LongrunError
from longrun.server.document_prompts import document_ids
from longrun.session.session import Session
from longrun.text.chat_prompt import ChatPrompts
from scripts import put_document
from scripts.fuzz_documents import make_pdf

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 20
QUESTION = "who was it?"
PLAIN = "text/plain; charset=utf-8"


def put(served: Served, name: str, content: str | bytes, kind: str = PLAIN) -> httpx.Response:
    raw = content.encode() if isinstance(content, str) else content
    return httpx.put(f"{served.root}/documents/{name}", content=raw, headers={"Content-Type": kind}, timeout=60)


def status(served: Served, name: str) -> dict[str, Any]:
    return httpx.get(f"{served.root}/documents/{name}", timeout=60).json()


def put_and_wait(served: Served, name: str, content: str | bytes, kind: str = PLAIN) -> dict[str, Any]:
    response = put(served, name, content, kind)
    assert response.status_code == 202, response.text
    wait_for(lambda: status(served, name)["state"] not in ("queued", "reading"))
    told = status(served, name)
    assert told["state"] == "ready" and told["tokens_done"] == told["tokens"] > 0, told
    return told


def ask(served: Served, name: str, messages: list[dict[str, str]]) -> tuple[str, int, int]:
    """The answer, the prompt's tokens, and those that were not read."""
    model = f"{NAME}@{name}" if name else NAME
    answer = served.client().chat.completions.create(model=model, messages=messages, max_tokens=8)
    assert answer.model == model
    usage = answer.usage
    return answer.choices[0].message.content, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def count_reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every prefill from now on."""
    read, counts = Session.prefill, []

    def counted(self: Session, token_ids: Any, progress: Any = None, **how: Any) -> Any:
        counts.append(len(token_ids))
        return read(self, token_ids, progress, **how)

    monkeypatch.setattr(Session, "prefill", counted)
    return counts


def test_a_document_is_read_once_and_kept_over_a_restart(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = user(f"{TEXT.rstrip()}\n\n{QUESTION}")
    with serve(chat_model, documents=tmp_path / "kept") as served:
        told = put_and_wait(served, "book.md", TEXT, "text/markdown")
        assert told["bytes"] == len(TEXT)
        ids = served.prompt_ids(whole)
        prompts = ChatPrompts(served.reference.tokenizer)
        assert ids[: told["tokens"]] == document_ids(prompts, TEXT.rstrip(), told["created"])[0]
        expected = served.expected(ids, 8)
        assert {model.id for model in served.client().models.list()} == {NAME, f"{NAME}@book.md"}
        answer, prompt_tokens, cached = ask(served, "book.md", user(QUESTION))
        assert (answer, prompt_tokens) == (expected, len(ids)) and cached >= told["tokens"]
        ask(served, "", user("something else " * 50))  # takes the session over
        answer, _, cached = ask(served, "book.md", user(QUESTION))
        assert answer == expected and cached == told["tokens"]
        assert "longrun_session_load_seconds_count 1.0" in httpx.get(f"{served.root}/metrics").text
        loading = httpx.get(f"{served.root}/status").json()["last"]["loading"]
        assert loading["tokens"] == told["tokens"] and loading["seconds"] > 0
        assert put(served, "book.md", TEXT).status_code == 200  # nothing to do
        system = [{"role": "system", "content": "be brief"}, *user(QUESTION)]
        moved = served.prompt_ids(user(f"{TEXT.rstrip()}\n\nbe brief\n\n{QUESTION}"))
        answer, prompt_tokens, cached = ask(served, "book.md", system)
        assert (answer, prompt_tokens) == (served.expected(moved, 8), len(moved)) and cached == told["tokens"]
        with (
            pytest.raises(InputError, match=r"documents folder .* is in use"),
            serve(chat_model, documents=tmp_path / "kept"),
        ):
            pass
    with serve(chat_model, documents=tmp_path / "kept") as served:
        assert status(served, "book.md")["state"] == "ready"
        answer, prompt_tokens, cached = ask(served, "book.md", user(QUESTION))
        assert answer == expected and prompt_tokens - cached < 100
        ask(served, "", user("something else " * 50))
        counts = count_reading(monkeypatch)
        longer = put_and_wait(served, "book.md", TEXT + "More of it came. " * 10)
        assert sum(counts) == longer["tokens"] - told["tokens"] > 0  # only what was added
        assert ask(served, "book.md", user(QUESTION))[2] >= longer["tokens"]
        other = put_and_wait(served, "book.md", "<html><body><p>Quite another text.</p></body></html>", "text/html")
        answer, prompt_tokens, _ = ask(served, "book.md", user(QUESTION))
        ids = served.prompt_ids(user(f"Quite another text.\n\n{QUESTION}"))
        assert (answer, prompt_tokens) == (served.expected(ids, 8), len(ids)) and other["tokens"] < len(ids)
        assert httpx.delete(f"{served.root}/documents/book.md").json()["deleted"]
        assert httpx.get(f"{served.root}/documents").json() == {"object": "list", "data": []}
        assert [model.id for model in served.client().models.list()] == [NAME]
        with pytest.raises(openai.NotFoundError):
            ask(served, "book.md", user(QUESTION))
    assert [entry.name for entry in (tmp_path / "kept").iterdir()] == []


def test_reading_goes_on_where_the_server_ended(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a template that writes the time, which a document's prompts keep: that of its being put."""
    read, steps, held, go_on = Session.prefill, [], threading.Event(), threading.Event()

    def slow(self: Session, ids: Any, progress: Any = None, **how: Any) -> Any:
        steps.append(len(ids))
        if len(steps) == 2:
            held.set()
            assert go_on.wait(20)
        return read(self, ids, progress, **how)

    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "<s>{{ strftime_now('%f') }}</s>" + TEMPLATE
    tokenizer.save_pretrained(model)
    with serve(model, documents=tmp_path / "kept") as served:
        monkeypatch.setattr(Session, "prefill", slow)
        put(served, "book", TEXT)
        assert held.wait(20)
        assert status(served, "book")["state"] == "reading"
        with pytest.raises(openai.ConflictError, match="document book is reading"):
            ask(served, "book", user(QUESTION))
        served.serving.leave()
        go_on.set()
    record = json.loads((tmp_path / "kept" / "book" / "document.json").read_text())
    assert not record["ready"]
    first, steps[:] = sum(steps), [0, 0]
    with serve(model, documents=tmp_path / "kept") as served:
        wait_for(lambda: status(served, "book")["state"] == "ready")
        assert first + sum(steps) == status(served, "book")["tokens"] and first > 0 and sum(steps) > 0
        monkeypatch.undo()
        whole = [("user", f"{TEXT.rstrip()}\n\n{QUESTION}")]
        ids = ChatPrompts(served.reference.tokenizer).ids(whole, now=status(served, "book")["created"])
        answer, prompt_tokens, cached = ask(served, "book", user(QUESTION))
        assert (answer, prompt_tokens) == (served.expected(ids, 8), len(ids)) and prompt_tokens - cached < 100


def test_reading_gives_way_to_who_waits_and_reads_nothing_twice(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrun.server.answerer.TURN_SECONDS", 0.0)
    read, steps, reading, go_on = Session.prefill, [], threading.Event(), threading.Event()

    def held(self: Session, token_ids: Any, progress: Any = None, **how: Any) -> Any:
        steps.append(len(token_ids))
        if len(steps) == 1:
            reading.set()
            assert go_on.wait(20)
        return read(self, token_ids, progress, **how)

    with serve(chat_model, documents=tmp_path / "kept") as served:
        other = served.prompt_ids(user("hello"))
        expected = served.expected(other, 8)
        monkeypatch.setattr(Session, "prefill", held)
        put(served, "book", TEXT)
        assert reading.wait(20)
        with ThreadPoolExecutor(2) as asking:
            answers = [asking.submit(ask, served, "", user("hello")) for _ in range(2)]
            wait_for(lambda: served.health()["waiting"] == 2)
            go_on.set()
            assert [answer.result()[0] for answer in answers] == [expected, expected]
        wait_for(lambda: status(served, "book")["state"] == "ready")
        tokens = status(served, "book")["tokens"]
        assert steps[0] < tokens and steps[1] == len(other), "after one step the first who waits is answered"
        assert steps[0] + sum(steps[2:]) == tokens, "the second one had its prompt in the session"
        monkeypatch.undo()
        ids = served.prompt_ids(user(f"{TEXT.rstrip()}\n\n{QUESTION}"))
        assert ask(served, "book", user(QUESTION))[:2] == (served.expected(ids, 8), len(ids))


def test_a_folder_of_code_is_put_as_an_archive_and_asked_like_any_text(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files = {
        "code/.gitignore": "*.log\n",
        "code/a.py": "x = 1\n" * 40,
        "code/run.log": "no",
        "code/t/b.html": "<p>b</p>",
    }
    for name, text in {**files, "code/made.bin": "\0"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with serve(chat_model, documents=tmp_path / "kept") as served:

        def put_folder() -> str:
            put_document.main(["code", "--url", f"{served.root}/v1"])
            said = capsys.readouterr()
            assert said.out == f"{NAME}@code\n" and "left out of code: 1 binary file (code/made.bin)\n" in said.err
            return joined(read_documents(["code"]).texts)

        text = put_folder()
        assert text == f"==> code/a.py <==\n{files['code/a.py'].rstrip()}\n\n==> code/t/b.html <==\n<p>b</p>"
        told = status(served, "code")
        ids = served.prompt_ids(user(f"{text}\n\n{QUESTION}"))
        expected = served.expected(ids, 8)
        assert ask(served, "code", user(QUESTION))[:2] == (expected, len(ids))
        kept = (tmp_path / "kept" / "code").glob("text-*.txt")
        part = file_part(next(kept).read_text(), text.index("<p>b"), len(text))
        assert part is not None and (part.name, part.lines) == ("code/t/b.html", (1, 1))
        assert sorted(entry.name for entry in (tmp_path / "kept").iterdir()) == [".documents.lock", "code"]
    with serve(chat_model, documents=tmp_path / "kept", limits=replace(LIMITS, unpacked_bytes=20_000)) as served:
        answer, prompt_tokens, cached = ask(served, "code", user(QUESTION))
        assert answer == expected and prompt_tokens - cached < 100
        (tmp_path / "code" / "z.py").write_text("y = 2\n")
        counts = count_reading(monkeypatch)
        text = put_folder()
        assert 0 < sum(counts) == status(served, "code")["tokens"] - told["tokens"]  # only what was added
        ids = served.prompt_ids(user(f"{text}\n\n{QUESTION}"))
        assert ask(served, "code", user(QUESTION))[:2] == (served.expected(ids, 8), len(ids))
        (tmp_path / "code" / "bomb.txt").write_text("word " * 10**5)
        with pytest.raises(LongrunError, match=r"refused: unpacked, archive code holds more than the 20\.0 KB"):
            put_folder()
        told = put_and_wait(served, "zip", zipped({"a.txt": b"a", "b.bin": b"\0"}), "application/zip")
        assert told["notices"] == ["left out of zip: 1 binary file (b.bin)"]
        response = put(served, "code", b"PK\x03\x04 no", "application/zip")
        assert response.status_code == 400 and "archive code cannot be read" in response.json()["error"]["message"]
        assert status(served, "code")["state"] == "ready"


def test_what_is_refused(chat_model: Path, tmp_path: Path) -> None:
    with serve(chat_model, documents=tmp_path / "kept") as served:

        def code(response: httpx.Response) -> tuple[int, str | None]:
            return response.status_code, response.json()["error"]["code"]

        for name in ("..%2Fout", "%2e%2e", ".hidden", "a%2Fb", "a%20b", "n" * 101):
            assert code(put(served, name, TEXT)) == (400, "invalid_name")
        assert code(put(served, "book", "word " * 1000)) == (400, "context_length_exceeded")
        assert code(put(served, "book", TEXT, "application/json")) == (415, "unsupported_media_type")
        assert code(put(served, "book", "x" * (10**6 + 1))) == (413, "request_too_large")
        assert (
            put(served, "book", b"%PDF-no", "application/pdf").json()["error"]["message"].startswith("file book is PDF")
        )
        assert code(httpx.get(f"{served.root}/documents/book")) == (404, "document_not_found")
        assert code(httpx.delete(f"{served.root}/documents/book")) == (404, "document_not_found")
        pdf = make_pdf((("The first line",), ()))
        told = put_and_wait(served, "book", pdf, "application/pdf")
        assert told["notices"] == ["1 of 2 pages of book hold no text: images are not read"]
        ids = served.prompt_ids(user(f"The first line\n\n{QUESTION}"))
        assert ask(served, "book", user(QUESTION))[:2] == (served.expected(ids, 8), len(ids))
        body = {"model": f"{NAME}@book", "messages": [{"role": "system", "content": "hear"}]}
        assert code(served.post("/v1/chat/completions", body)) == (400, "invalid_value")
        assert code(served.post("/v1/completions", {"model": f"{NAME}@book", "prompt": "x"})) == (
            400,
            "unsupported_value",
        )
        assert sorted(entry.name for entry in (tmp_path / "kept").iterdir() if entry.is_dir()) == ["book"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    with serve(chat_model) as served:
        assert code(put(served, "book", TEXT)) == (404, "not_found")


def test_a_misspelled_query_is_refused(chat_model: Path, tmp_path: Path) -> None:
    with serve(chat_model, documents=tmp_path / "kept") as served:

        def asked(method: str, path: str, query: str, **more: Any) -> tuple[str, str]:
            answer = httpx.request(method, f"{served.root}{path}?{query}", timeout=60, **more)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "unknown_parameter")
            return error["param"], error["message"]

        text = {"content": TEXT, "headers": {"Content-Type": PLAIN}}
        told = "query parameter 'prefil' is unknown: use prefill"
        assert asked("PUT", "/documents/book", "prefil=exact", **text) == ("prefil", told)
        assert asked("PUT", "/documents/book", "prefill=exact&prefil=exact", **text) == ("prefil", told)
        assert httpx.get(f"{served.root}/documents").json()["data"] == []
        for path in ("/health?verbose", "/metrics?name=a", "/?from=mail", "/documents?page=1", "/v1/models?version=1"):
            assert httpx.get(f"{served.root}{path}").status_code == 200, path  # what asks so means nothing by it


def test_a_deleted_document_is_not_read_on_and_one_of_other_settings_says_so(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(chat_model, documents=tmp_path / "kept") as served:
        put_and_wait(served, "book", TEXT)
        read, reading, go_on = Session.prefill, threading.Event(), threading.Event()

        def held(self: Session, token_ids: Any, progress: Any = None, **how: Any) -> Any:
            reading.set()
            assert go_on.wait(20)
            return read(self, token_ids, progress, **how)

        monkeypatch.setattr(Session, "prefill", held)
        put(served, "other", TEXT[::-1])
        assert reading.wait(20)
        assert httpx.delete(f"{served.root}/documents/other", timeout=60).status_code == 200
        go_on.set()
        wait_for(lambda: served.health()["running"] == 0)
        monkeypatch.undo()
        assert served.health()["session_tokens"] < 1000  # of 1,200: it ended after a step
        assert sorted(entry.name for entry in (tmp_path / "kept").iterdir() if entry.is_dir()) == ["book"]
    with serve(chat_model, documents=tmp_path / "kept", kv_format="bf16") as served:
        told = status(served, "book")
        assert told["state"] == "failed" and "was saved with kv format fp32" in told["error"]
        put_and_wait(served, "book", TEXT)
        ask(served, "", user("something else " * 50))
        _, prompt_tokens, cached = ask(served, "book", user(QUESTION))
        assert prompt_tokens - cached < 100
