"""--prefill sparse in the chat: how documents and questions are read, statistics, saved sessions, refusals."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from planted_chat import NEEDLES, ask, spaced
from rich.console import Console

import longrun
from longrun.chat.answer import AnswerOptions
from longrun.chat.runner import ChatRunner
from longrun.documents.document import read_document
from longrun.session.session import Session
from longrun.specs.prefill_spec import PrefillSpec

SPEC = PrefillSpec(mass=0.9, dense_tokens=256, dense_end=200, newest=1, floor=2, least=0, cap=0.5)


@pytest.fixture
def reads(monkeypatch):
    """Tokens given to `Session.prefill`, and whether they might be read sparsely."""
    found, prefill = [], Session.prefill

    def noted(self, token_ids, progress=None, one_by_one=False, sparse=True, more=0):
        found.append((len(token_ids), sparse, one_by_one))
        return prefill(self, token_ids, progress, one_by_one, sparse, more)

    monkeypatch.setattr(Session, "prefill", noted)
    return found


def make_runner(planted, **options):
    runtime = longrun.load(planted.path, ctx=4000, chunk_size=256, device="cpu", **options)
    return ChatRunner(runtime, AnswerOptions(max_new_tokens=6), Console(file=io.StringIO(), width=300))


def test_documents_are_read_sparsely_and_questions_exactly(planted, text_file, reads):
    runner = make_runner(planted, prefill=SPEC)
    runner.talk.read([read_document(text_file)], ask(0))
    (text, may_be, _), (question, whole, _) = reads
    assert text > 1500 and 0 < question < 50 and (may_be, whole) == (True, False)
    sparse = runner.session.sparse_tokens
    assert text - 256 - 200 - 128 < sparse <= text - 256 - 200
    report = runner.answer(lambda text: None, keep_unfinished=True)
    assert report.answer.text.strip().startswith(spaced(NEEDLES[0].key)[:3])
    counts = runner.session.prefill_counts
    assert 0 < counts.read_share < 1 and 0 < counts.caught_share <= 1
    told = f"{sparse:,} of them read sparsely ({counts.line()})"
    assert report.line().endswith(f"context {runner.session.num_tokens:,} of 4,000, {told}")
    assert f"{runner.session.num_tokens:,} of 4,000 tokens used, {told}; documents: {text_file}" in runner.status()
    found = report.to_dict()["prefill"]
    assert (found["sparse_tokens"], found["settings"]["mass"]) == (sparse, 0.9)
    assert (found["read"]["read_share"], found["read"]["caught_share"]) == (counts.read_share, counts.caught_share)
    runner.talk.read([], ask(1) * 20)  # a message alone is a question, however long
    assert not reads[-1][1] and runner.session.sparse_tokens == sparse


def test_without_it_question_and_text_are_read_at_once(planted, text_file, reads):
    runner = make_runner(planted)
    runner.talk.read([read_document(text_file)], ask(0))
    assert len(reads) == 1
    report = runner.answer(lambda text: None, keep_unfinished=True)
    assert report.to_dict()["prefill"] is None and "sparsely" not in report.line() + runner.status()


def test_questions_read_token_by_token_stay_so(planted, text_file, reads):
    runtime = longrun.load(planted.path, ctx=4000, chunk_size=256, device="cpu", select=6, prefill=SPEC)
    runner = ChatRunner(
        runtime, AnswerOptions(max_new_tokens=2), Console(file=io.StringIO()), select_question=True
    )  # fmt: skip
    runner.talk.read([read_document(text_file)], ask(0))
    assert [one[1:] for one in reads] == [(True, False), (False, True)]


def test_the_command(chat, text_file, tmp_path):
    shared = ["--ctx", "4K", "--chunk-size", "256", "--file", text_file, "--max-new-tokens", "3"]
    sparse = ["--prefill", "sparse", "--prefill-mass", "0.9", "--prefill-dense", "0"]
    done = chat(*shared, *sparse, "--prompt", ask(0), "--json", "--session", tmp_path / "kept")
    assert done.status == 0, done.err
    # the text is shorter than the end of a document that is always read exactly
    assert done.result["prefill"]["sparse_tokens"] == 0 and done.result["prefill"]["read"]["read_share"] is None
    assert (done.result["plan"]["prefill"]["mass"], done.result["plan"]["prefill"]["dense_tokens"]) == (0.9, 0)
    assert "documents are read sparsely throughout, the last 2,048 tokens excepted" in done.err
    assert "sparse prefill" in done.err and re.search(r"takes about .* if \d+% of the pages hold", done.err)
    exact = chat(*shared, "--prefill", "exact", "--prompt", ask(0), "--json")
    assert exact.result["prefill"] is None is exact.result["plan"]["prefill"] and "sparse" not in exact.err
    short = chat(*shared, "--prefill", "sparse", "--prompt", ask(0), "--json")
    assert "note: prefill sparse changes nothing: chunks before token 131,072 and the last" in short.err
    for arguments, words in (
        (["--prefill", "dense"], "argument --prefill: invalid choice: 'dense'"),
        (["--prefill", "sparse", "--prefill-mass", "0"], "argument --prefill-mass: value 0.0 is outside the range"),
        (["--prefill", "sparse", "--prefill-mass", "1"], "argument --prefill-mass: value 1.0 is outside the range"),
        (["--prefill", "sparse", "--prefill-mass", "x"], "argument --prefill-mass: value 'x' is not a finite number"),
        (["--prefill", "sparse", "--prefill-dense", "-5"], "--prefill-dense '-5' is not a number with a known unit"),
        (["--prefill-mass", "0.9"], "prefill_mass 0.9 is for sparse prefill, and texts are read exactly"),
        (["--prefill-dense", "64K"], "prefill_dense 64000 is for sparse prefill"),
    ):
        done = chat(*shared, *arguments, "--prompt", ask(0))
        assert done.status == 2 and words in done.err.splitlines()[-1] and not done.out, done.err


def test_a_session_that_was_read_sparsely_says_so_when_it_is_opened(planted, chat, text_file, tmp_path):
    runner = make_runner(planted, prefill=SPEC)
    runner.talk.read([read_document(text_file)], None)
    sparse = runner.session.sparse_tokens
    assert sparse > 1000
    runner.save(tmp_path / "kept")
    runner.session.detach()
    for name, mode in (("exact", []), ("sparse", ["--prefill", "sparse", "--prefill-dense", "0"])):
        for copy in (name, f"{name} stats"):  # a run owns its folder for as long as its session lives
            shutil.copytree(tmp_path / "kept", tmp_path / copy)
        asked = ["--file", text_file, "--prompt", ask(0), "--max-new-tokens", "3", "--json"]
        done = chat("--ctx", "4K", "--session", tmp_path / name, *mode, *asked)
        assert done.status == 0, done.err
        assert f"{sparse:,} of them read sparsely; documents: {text_file}" in done.err
        assert done.result["prefill"]["sparse_tokens"] == sparse
        assert (done.result["prefill"]["settings"] is None) == (mode == [])
        done = chat("--ctx", "4K", "--session", tmp_path / f"{name} stats", stdin="/stats\n")
        assert f"{sparse:,} of them read sparsely" in done.err


def test_asking_many_questions_tells_how_the_texts_were_read(planted, text_file, tmp_path):
    from longrun.chat.ask import Asker
    from longrun.chat.questions import Question

    runner, lines = make_runner(planted, prefill=SPEC), []
    asker = Asker(runner, lines.append, lambda text: None, True)
    assert asker.run([read_document(text_file)], [Question(ask(0)), Question(ask(1))])
    assert runner._console.file.getvalue().count("of them read sparsely (") == 2
    told = [json.loads(line)["prefill"] for line in lines]
    assert told[0] == told[1] and told[0]["sparse_tokens"] == runner.session.sparse_tokens
    assert told[0]["read"].keys() == {"pages_read", "pages", "read_share", "caught_share"}
    assert told[0]["read"]["caught_share"] == runner.session.prefill_counts.caught_share
