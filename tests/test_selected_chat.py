"""--select and --select-question in the chat: what is read token by token, statistics, the plan, refusals."""

from __future__ import annotations

import io
import json

import pytest
from chat_tokenizers import CHATML, byte_tokenizer
from planted_chat import ask
from rich.console import Console
from test_chat_loop import Chat
from test_conversation import ListSession, document

import longrun
from longrun.chat.answer import AnswerOptions
from longrun.chat.conversation import Conversation
from longrun.chat.runner import ChatRunner
from longrun.documents.document import read_document
from longrun.plan.command import plan_command
from longrun.session.session import Session
from longrun.specs.hot_counts import HotCounts


def test_where_a_question_begins():
    session = ListSession()
    conversation = Conversation(session, byte_tokenizer(CHATML), ())
    reading = conversation.prepare([document("a text"), document("another", "b.txt")], "What?")
    ids, at = reading.token_ids, conversation.question_at(reading)
    stops = [entry["stop"] for entry in session.extra["chat"]["documents"]]
    assert at == max(stops) and 0 < at < len(ids)
    session.token_ids += ids[:5]  # reading stopped within the first text
    reading = conversation.prepare([document("a text"), document("another", "b.txt")], "What?")
    assert reading.token_ids == ids[5:] and conversation.question_at(reading) == at - 5
    session.token_ids += ids[5 : at + 2]  # and within the question
    assert conversation.rest().token_ids == ids[at + 2 :] and conversation.question_at(conversation.rest()) == 0
    session.token_ids += ids[at + 2 :]
    conversation.answered()
    reading = conversation.prepare([], "And now?")  # its turn's opening belongs to it
    assert conversation.question_at(reading) == 0
    session.token_ids += reading.token_ids
    conversation.answered()
    reading = conversation.prepare([document("more", "c.txt")], None)
    assert not reading.asks and conversation.question_at(reading) == len(reading.token_ids)


@pytest.fixture
def reads(monkeypatch):
    """Tokens given to `Session.prefill`, and whether one by one."""
    found, prefill = [], Session.prefill

    def noted(self, token_ids, progress=None, one_by_one=False, **more):
        found.append((len(token_ids), one_by_one))
        return prefill(self, token_ids, progress, one_by_one, **more)

    monkeypatch.setattr(Session, "prefill", noted)
    return found


@pytest.mark.parametrize("select_question", [False, True])
def test_a_question_is_read_token_by_token_where_that_is_asked_for(planted, text_file, reads, select_question):
    runtime = longrun.load(planted.path, ctx=4000, chunk_size=256, device="cpu", select=6, select_from=0)
    said = io.StringIO()
    runner = ChatRunner(
        runtime, AnswerOptions(max_new_tokens=4), Console(file=said, width=300), select_question=select_question
    )
    runner.talk.read([read_document(text_file)], ask(0))
    if select_question:
        (text, whole), (question, one_by_one) = reads
        assert text > 1500 and 0 < question < 50 and (whole, one_by_one) == (False, True)
    else:
        assert len(reads) == 1 and not reads[0][1]
    report = runner.answer(lambda text: None, keep_unfinished=False)
    tokens = runner.session.seq_len
    held = runner.session.plan.cache.page_format.pooled_pages(tokens)
    share = (tokens - (held - 6) * 64) / tokens
    assert f"; 6 of {held} pages a head read ({share:.1%} of its tokens); context" in report.line()
    selection = report.to_dict()["selection"]
    assert (selection["pages_held"], selection["pages_read"], selection["share_of_tokens"]) == (held, 6, share)
    assert (selection["pages_per_head"], selection["selector"]) == (6, "top")
    caught = selection["caught_mass"]
    assert caught["estimated_by"] == "digests" and len(caught["by_layer"]) == runtime.plan.cache.num_layers
    assert 0 < caught["share"] <= 1
    assert report.to_dict()["hot_pool"] is None and "hot pool" not in report.line()


def test_stats_estimate_what_chosen_pages_hold(planted, text_file):
    for select, said in ((6, True), ("off", False)):
        chat = Chat(longrun.load(planted.path, ctx=4000, chunk_size=256, device="cpu", select=select, select_from=0))
        told = chat.type(f"/file {text_file}", ask(0), "/stats")
        assert ("pages that the next step chooses: they hold about" in told) == said
        assert not said or "of the attention to pages, as digests estimate it" in told


def test_statistics_of_the_hot_pool_are_those_of_the_answer(planted, text_file, monkeypatch):
    """Of a session that has one, which only a GPU's has."""
    counts = iter([HotCounts((4, 4), (4, 3), 100), HotCounts((9, 9), (6, 5), 100)])
    monkeypatch.setattr(Session, "hot_counts", property(lambda self: next(counts)))
    runtime = longrun.load(planted.path, ctx=4000, chunk_size=256, device="cpu", select=6, select_from=0)
    runner = ChatRunner(runtime, AnswerOptions(max_new_tokens=2), Console(file=io.StringIO()))
    runner.talk.read([read_document(text_file)], ask(0))
    report = runner.answer(lambda text: None, keep_unfinished=False)
    assert "; 60.0% of 10 chosen host pages in the hot pool, 400 B fetched; context" in report.line()
    found = report.to_dict()["hot_pool"]
    assert (found["host_pages_chosen"], found["hits"], found["link_bytes"]) == (10, 6, 400)
    assert json.dumps(found["by_layer"]) == '{"pages": [5, 5], "missed": [2, 2], "payload_bytes": 100}'


def test_the_command(chat, text_file):
    shared = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--max-new-tokens", "3", "--json"]
    done = chat(*shared, "--select", "6", "--select-question")
    assert done.status == 0, done.err
    assert done.result["selection"]["pages_read"] == 6
    assert done.result["plan"]["selection"]["pages_per_head"] == 6
    assert "a decoded token reads at most 6 of each retrieval head's 61 pages, chosen by their digests" in done.err
    assert "page digests" in done.err and "6 of 2" in done.err
    off = chat(*shared, "--select", "off")
    assert off.result["selection"] is off.result["plan"]["selection"] is None and "pages a head" not in off.err
    assert off.result["text"] == chat(*shared).result["text"]
    for arguments, words in (
        (["--select", "3"], "--select 3 is too small: it must be at least 5"),
        (["--select", "x"], "--select 'x' is neither a number of pages, nor a share of them, nor off"),
        (["--select", "9" * 5000], "is neither a number of pages, nor a share"),
        (["--select", "0.001%"], "--select '0.001%' is finer than hundredths of a percent"),
        (["--select", "6", "--kv", "bf16"], "select 6 needs quantized pages, and those of bf16 are exact"),
        (["--hot-pool", "1GB"], "hot_pool 1.00 GB is for the pages that decode steps select, and these read all"),
        (["--select", "6", "--hot-pool", "x"], "--hot-pool 'x' is not a number with a known unit"),
        (["--select-question"], "--select-question needs pages to select: give --select N, or leave it out"),
    ):
        done = chat(*shared, *arguments)
        assert done.status == 2 and words in done.err.splitlines()[-1] and not done.out


def test_the_plan_command(capsys):
    shared = ["--model", "Llama-3-8B", "--budget", "h100-80g", "--retrieval-ratio", "0.5", "--ctx"]
    plans = []
    for more in (["1M"], ["1M", "--select", "512"], ["1M", "--select", "off"]):
        assert plan_command([*shared, *more, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    dense, selecting, off = plans
    assert off == dense and dense["selection"] is None and selecting["selection"]["pages_per_head"] == 512
    assert selecting["times"]["token_ms"] < 0.7 * dense["times"]["token_ms"]
    assert plan_command([*shared, "16K", "--select", "512"]) == 0
    assert "a decoded token reads all pages: no head has more than 248, and select 512" in capsys.readouterr().out
    assert plan_command([*shared, "1M", "--select", "6.25%"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "reads 6.25% of the pages that a head holds then (at least 64 pages), at most 977 of each retrieval" in found
    assert plan_command([*shared, "3K", "--select", "25%"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "no head has more than 45, and select 25% (at least 64 pages) allows so many" in found
