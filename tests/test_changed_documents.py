"""A file that has changed since a session read it: said with its name, and read again from where it differs."""

from __future__ import annotations

import copy
import gc
import hashlib
import os

import pytest
from chat_tokenizers import CHATML, LLAMA2, byte_tokenizer, metaspace_tokenizer
from planted_chat import NEEDLES, ask, spaced
from test_documents import ListSession

from longrun.chat.changed_files import ChangedFiles
from longrun.chat.conversation import Conversation
from longrun.documents.document import Document
from longrun.errors import SessionError


def document(text: str, name: str = "a.txt", headed: bool = False) -> Document:
    return Document(name, text, f"sha of {text}", headed)


def read(session: ListSession, tokenizer, *documents: Document, question: str | None = "what?") -> tuple[str, tuple]:
    """What the model reads, and what is told; the question has its answer then."""
    conversation = Conversation(session, tokenizer, ())
    reading = conversation.prepare(list(documents), question)
    session.token_ids += reading.token_ids
    if reading.asks:
        conversation.answered()
    session.extra = copy.deepcopy(session.extra)
    return tokenizer.decode(reading.token_ids), reading.changed


V1, APPENDED, MIDDLE = "one\ntwo\nthree", "one\ntwo\nthree\nfour\nfive", "one\nTWO\nthree\nfour\nfive"


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("headed", [False, True])
def test_only_what_differs_is_read_again(make, headed):
    tokenizer = make(CHATML if make is byte_tokenizer else None)
    session = ListSession()
    other = document("other", "b.txt", headed)
    read(session, tokenizer, document(V1, headed=headed), other)
    text, told = read(session, tokenizer, document(APPENDED, headed=headed), other)
    assert "==> a.txt, changed: from line 4 on it reads now <==\nfour\nfive\n\nwhat?" in text and "three" not in text
    assert told == ("a.txt has changed since it was read: read again from line 4 of 5 on",)
    text, told = read(session, tokenizer, document(MIDDLE, headed=headed))
    assert "==> a.txt, changed: from line 2 on it reads now <==\nTWO\nthree\nfour\nfive\n\nwhat?" in text
    text, told = read(session, tokenizer, document("one\nTWO", headed=headed))
    assert "==> a.txt, changed: it ends behind line 2 now <==\n\nwhat?" in text and "TWO" not in text
    assert told == ("a.txt has changed since it was read: it ends behind line 2 now",)
    text, told = read(session, tokenizer, document(V1, headed=headed))
    assert "from line 2 on it reads now <==\ntwo\nthree\n\nwhat?" in text, "back to the first version is a change"
    text, told = read(session, tokenizer, document("new", headed=headed))
    assert "==> a.txt, changed: it reads now <==\nnew\n\nwhat?" in text
    assert told == ("a.txt has changed since it was read: read again",)
    assert Conversation(session, tokenizer, ()).prepare([document("new"), other], None).already_read == (
        "a.txt", "b.txt",
    )  # fmt: skip


def test_what_is_no_change():
    tokenizer, session = byte_tokenizer(CHATML), ListSession()
    read(session, tokenizer, document(V1), document("piped", "stdin"))
    resaved = Document("a.txt", V1, "other bytes, the same text")
    text, told = read(session, tokenizer, resaved, document("also piped", "stdin"), document(V1, "copy.txt"))
    assert told == () and "changed" not in text and "also piped" in text and "one" not in text


def test_a_session_that_does_not_know_where_a_text_begins_reads_all_of_it():
    tokenizer, session = byte_tokenizer(CHATML), ListSession()
    read(session, tokenizer, document(V1))
    for entry in session.extra["chat"]["documents"]:
        del entry["start"], entry["line"]
    text, told = read(session, tokenizer, document(APPENDED))
    assert "==> a.txt, changed: it reads now <==\none\ntwo" in text and told[0].endswith("it was read: read again")


def test_what_the_template_writes_before_a_text_is_not_the_text():
    session = ListSession()
    llama = metaspace_tokenizer(LLAMA2)  # writes [INST] as text before the first line
    read(session, llama, document(V1))
    assert "from line 4 on it reads now <==\nfour" in read(session, llama, document(APPENDED))[0]


def test_every_point_of_interruption_of_a_change_is_taken_up_and_a_change_before_that_is_told():
    tokenizer, session = byte_tokenizer(CHATML), ListSession()
    read(session, tokenizer, document(V1))
    before, extra = list(session.token_ids), copy.deepcopy(session.extra)
    whole = Conversation(session, tokenizer, ()).prepare([document(APPENDED)], "and?").token_ids
    begun = session.extra
    for done in range(1, len(whole)):
        session.token_ids, session.extra = before + whole[:done], copy.deepcopy(begun)
        reading = Conversation(session, tokenizer, ()).prepare([document(APPENDED)], "and?")
        assert session.token_ids + reading.token_ids == before + whole
    session.token_ids, session.extra = before + whole[:40], copy.deepcopy(begun)
    with pytest.raises(SessionError, match=r"differs from the one given now \(a\.txt has changed since\): give"):
        Conversation(session, tokenizer, ()).prepare([document(MIDDLE)], "and?")
    assert extra != begun


def test_the_chat_answers_from_what_was_added(chat, text_file, tmp_path):
    text = text_file.read_text().rstrip()
    log, kept = tmp_path / "log.txt", tmp_path / "kept"
    at = text.index(NEEDLES[1].sentence)
    log.write_text(text[:at] + "\n")
    common = ["--ctx", "6K", "--stop", ".", "--session", kept, "--file", log, "--json"]
    first = chat(*common, "--prompt", ask(0))
    log.write_text(text[:at].rstrip() + "\n" + text[at:])
    second = chat(*common, "--prompt", ask(1))
    assert (first.result["text"], second.result["text"]) == tuple(spaced(needle.key) for needle in NEEDLES)
    # The planted model's tokenizer does not give a text back as it was, so all of it is read again.
    assert f"note: {log} has changed since it was read: read again\n" in second.err
    assert second.result["tokens"]["prefilled"] > first.result["tokens"]["prefilled"]

    lines = "The magic number of\nis: 1\n"
    chatted = chat("--ctx", "6K", "--session", kept, "--max-new-tokens", "2", stdin=lines)
    assert "has changed since it was read" not in chatted.err
    log.write_text("other")
    gc.collect()  # a process that ends gives its folder back, too
    chatted = chat("--ctx", "6K", "--session", kept, "--max-new-tokens", "2", stdin=lines)
    assert chatted.err.count(f"note: {log} has changed since it was read: /file {log} reads what is new\n") == 1


def test_files_are_looked_at_again_only_where_they_may_have_changed(tmp_path, monkeypatch):
    file, gone = tmp_path / "a", tmp_path / "gone"
    file.write_text("one")
    known = {str(file): hashlib.sha256(b"one").hexdigest(), str(gone): "x", "stdin": "x", "a\0b": "x"}
    changed, hashed = ChangedFiles(), []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: (hashed.append(1), digest(*given))[1])
    assert changed.look(known) == changed.look(known) == [] and len(hashed) == 1
    file.write_text("three")
    assert changed.look(known) == [str(file)] and changed.look(known) == [] and len(hashed) == 2
    file.write_text("seven")
    os.utime(file, ns=(1, 1))
    assert changed.look(known) == [str(file)]
    assert changed.look({str(file): hashlib.sha256(b"seven").hexdigest()}) == []
