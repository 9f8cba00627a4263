"""What an answer looked at, over HTTP: the planted line of a document, of its files, of messages, of a text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_tokenizers import CHATML, byte_tokenizer
from planted_chat import NEEDLES, ask, spaced
from server_case import NAME, Served, copy_with_plain_template, serve, user, wait_for
from test_server_documents import put_and_wait

from longrun.lab.planted import PlantedModel
from longrun.needles.needles import generate_sentences
from longrun.server.looked import question_start
from longrun.session.session import Session
from longrun.text.chat_prompt import ChatPrompts

SENTENCES = list(islice(generate_sentences(5), 60))
TEXTS = [[*SENTENCES[:11], NEEDLES[0].sentence, *SENTENCES[11:30]], [*SENTENCES[30:50], NEEDLES[1].sentence]]
ONE, TWO = ("\n".join(lines) for lines in TEXTS)
LINES = (12, 21)
WORDS = {"max_tokens": 20, "stop": "."}


@pytest.fixture(scope="module")
def model(planted: PlantedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_plain_template(planted.path, tmp_path_factory.mktemp("citing") / "model")


@pytest.fixture(scope="module")
def citing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    kept = tmp_path_factory.mktemp("kept")
    with serve(model, documents=kept, head_map=model / "head_map", retrieval_ratio=1 / 8) as running:  # the planted one
        yield running


def answer(served: Served, number: int, messages: list[dict[str, str]], model: str = NAME) -> list[dict[str, Any]]:
    """What the right answer to the question of a needle looked at."""
    body = {"model": model, "messages": messages, "looked_at": True, **WORDS}
    told = served.post("/v1/chat/completions", body).json()
    assert told["choices"][0]["message"]["content"].strip() == spaced(NEEDLES[number].key), told
    passages = told["looked_at"]
    shares = [each["share"] for each in passages]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 and sum(shares) <= 1
    assert all(each["tokens"][0] < each["tokens"][1] < told["usage"]["prompt_tokens"] for each in passages)
    return passages


def check(passage: dict[str, Any], number: int, text: str, line: int, **names: Any) -> None:
    """The passage is the needle's line of the text; some are around it, for a random head has the same keys."""
    assert {name: passage[name] for name in ("document", "file", "message")} == {
        "document": None, "file": None, "message": None, **names
    }  # fmt: skip
    assert passage["lines"][0] <= line <= passage["lines"][1] and passage["lines"][1] - passage["lines"][0] < 8
    part = text.encode()[slice(*passage["bytes"])].decode()
    assert NEEDLES[number].key[1:] in part and " ".join(part.split())[:200] in passage["text"]


def test_a_document_s_line_comes_first(citing: Served) -> None:
    """Also from the session on disk, and in a stream, where the list comes before usage and the end."""
    text = f"  {ONE}\n\n{TWO}  \n"
    put_and_wait(citing, "both", text)
    read = httpx.get(f"{citing.root}/documents/both/text", timeout=60)
    assert read.text == text.rstrip() and read.headers["content-type"] == "text/plain; charset=utf-8"
    name = f"{NAME}@both"
    found = [answer(citing, number, user(ask(number)), name) for number in (0, 1)]
    for number, line in ((0, LINES[0]), (1, len(TEXTS[0]) + 1 + LINES[1])):
        check(found[number][0], number, read.text, line, document="both")
    citing.post("/v1/chat/completions", {"messages": user(SENTENCES[0]), "max_tokens": 1})  # takes the session over
    again = answer(citing, 1, user(ask(1)), name)
    assert [each["bytes"] for each in again] == [each["bytes"] for each in found[1]]
    assert [each["share"] for each in again] == pytest.approx([each["share"] for each in found[1]], abs=1e-3)

    body = {"model": name, "messages": user(ask(1)), "looked_at": True, "stream": True, **WORDS}
    for more in ({}, {"stream_options": {"include_usage": True}}):
        sent = citing.post("/v1/chat/completions", body | more).text
        lines = [line.removeprefix("data: ") for line in sent.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        place = next(number for number, chunk in enumerate(chunks) if "looked_at" in chunk)
        assert chunks[place]["choices"] == [] and chunks[place]["looked_at"] == again
        assert chunks[place - 1]["choices"][0]["finish_reason"] == "stop"
        assert len(chunks) - place - 1 == len(more) and ("usage" in chunks[place]) == bool(more)
        assert not more or (chunks[-1]["usage"]["completion_tokens"] > 0 and chunks[place]["usage"] is None)


def test_a_file_s_line_is_counted_in_that_file(citing: Served) -> None:
    put_and_wait(citing, "files", f"==> long/text <==\n{ONE}\n\n==> text/a <==\n{TWO}\n")
    for number, name, text in ((0, "long/text", ONE), (1, "text/a", TWO)):
        found = answer(citing, number, user(ask(number)), f"{NAME}@files")
        check(found[0], number, text, LINES[number], document="files", file=name)


def test_a_message_s_line(citing: Served) -> None:
    """Of several in one text, counted as the client sent them; also of a system message behind a document."""
    chat = [
        {"role": "user", "content": ONE}, {"role": "assistant", "content": SENTENCES[59]},
        *user(f"\n{TWO}\n\n{SENTENCES[55]}\n{ask(1)}"),
    ]  # fmt: skip
    check(answer(citing, 1, chat)[0], 1, chat[2]["content"], LINES[1] + 1, message=2)
    chat[2]["content"] = ask(0)
    check(answer(citing, 0, chat)[0], 0, ONE, LINES[0], message=0)
    put_and_wait(citing, "one", ONE)
    chat = [{"role": "system", "content": TWO}, *user(f"{SENTENCES[57]}\n{ask(1)}")]
    check(answer(citing, 1, chat, f"{NAME}@one")[0], 1, TWO, LINES[1], message=0)


def test_a_completion_s_line(citing: Served) -> None:
    for number, prompt in enumerate((f"{ONE}\n{ask(0)}", citing.reference.encode(f"{TWO}\n{ask(1)}"))):
        told = citing.post("/v1/completions", {"prompt": prompt, "looked_at": True, **WORDS}).json()
        text = prompt if isinstance(prompt, str) else citing.reference.tokenizer.decode(prompt)
        line = LINES[0] if number == 0 else 1  # words joined by spaces
        passage = told["looked_at"][0]
        if number == 0:
            check(passage, number, text, line)
        else:
            part = text.encode()[slice(*passage["bytes"])].decode()
            assert spaced(NEEDLES[1].key)[2:] in part and passage["lines"] == [1, 1]


def test_who_does_not_ask_is_told_nothing_and_the_session_stays_as_it_is(
    citing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, states = Session.looked_at, []

    def state(session: Session) -> list[Any]:
        held = {**session.snapshot(), **session.cache.state()}
        return [session.seq_len, *(value.clone() for value in held.values())]

    def watched(session: Session, *given: Any, **more: Any) -> Any:
        before = state(session)
        found = looked(session, *given, **more)
        states.extend([before, state(session)])
        return found

    monkeypatch.setattr(Session, "looked_at", watched)
    body = {"messages": user(f"{ONE}\n\n{ask(0)}"), **WORDS}
    plain = citing.post("/v1/chat/completions", body).json()
    assert "looked_at" not in plain and not states
    asked = citing.post("/v1/chat/completions", body | {"looked_at": True}).json()
    assert asked["choices"] == plain["choices"] and asked["looked_at"]
    before, after = states
    assert len(before) > 3 and all(
        (a == b) if isinstance(a, int) else a.equal(b) for a, b in zip(before, after, strict=True)
    )
    then = citing.post("/v1/chat/completions", body | {"looked_at": False}).json()
    assert then["choices"] == plain["choices"] and "looked_at" not in then


def test_a_client_that_leaves_ends_the_look(citing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, began, ended, found = Session.looked_at, threading.Event(), threading.Event(), []

    def slow(session: Session, *given: Any, check: Any, **more: Any) -> Any:
        began.set()

        def waiting() -> None:
            ended.wait(20)
            check()
            found.append("looked")  # a layer

        return looked(session, *given, check=waiting, **more)

    monkeypatch.setattr(Session, "looked_at", slow)
    body = {"model": NAME, "messages": user(f"{ONE}\n\n{ask(0)}"), "looked_at": True, "stream": True, **WORDS}
    with httpx.stream("POST", f"{citing.root}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert began.wait(20)
    job = citing.serving.worker._running
    wait_for(lambda: job is None or job.is_cancelled)
    ended.set()
    wait_for(lambda: citing.health()["running"] == 0)
    assert not found
    monkeypatch.undo()
    check(answer(citing, 0, user(f"{ONE}\n\n{ask(0)}"))[0], 0, ONE, LINES[0], message=0)


def test_what_cannot_be_looked_back_from_is_refused(model: Path, citing: Served) -> None:
    with serve(model, chunk_size=1) as small:
        told = small.post("/v1/chat/completions", {"messages": user(ONE), "looked_at": True, **WORDS})
        assert told.status_code == 400 and told.json()["error"]["param"] == "looked_at"
        assert "larger chunk_size" in told.json()["error"]["message"] and small.health()["session_tokens"] == 0
    told = citing.post("/v1/completions", {"prompt": ONE, "looked_at": True, "max_tokens": 0, "echo": True})
    assert told.status_code == 400 and told.json()["error"]["param"] == "looked_at"
    assert citing.post("/v1/chat/completions", {"messages": user("a"), "looked_at": "yes"}).status_code == 400
    assert httpx.get(f"{citing.root}/documents/none/text").status_code == 404


def test_where_a_question_begins() -> None:
    assert question_start("a text\nof lines\n \nWhat?\nSay it.\n", alone=True) == 18
    assert question_start("a text\nWhat?", alone=True) == 7
    assert (question_start("What?", alone=False), question_start("What?", alone=True)) == (0, 5)


def test_where_messages_stand_in_a_prompt() -> None:
    """Between control tokens, stripped by the template, with a control token's spelling in them."""
    tokenizer = byte_tokenizer(CHATML.replace("m['content']", "(m['content'] | trim)"))
    chat = [("system", " one "), ("user", "the <|im_end|> two"), ("user", "the <|im_end|> two\n")]
    ids, texts = ChatPrompts(tokenizer).read(chat)
    assert ids == ChatPrompts(tokenizer).ids(chat)
    found = [(each.number, text.text[each.first : each.stop], each.skipped) for text in texts for each in text.messages]
    assert found == [(0, "one", 1), (1, "the <|im_end|> two", 0), (2, "the <|im_end|> two", 0)]
    for text in texts:
        assert tokenizer.decode(ids[text.first : text.stop]) == text.text
