"""--ask: every question answered as if it were the only one, over texts that are read once."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from planted_chat import NEEDLES, ask, spaced

from longrun.chat.progress import PrefillProgress
from longrun.chat.questions import Question, questions_in, read_questions
from longrun.errors import InputError

ASKED = [{"question": ask(0), "id": "first"}, {"question": ask(1), "id": 2}, ask(0)]


@pytest.fixture
def common(text_file) -> list:
    return ["--ctx", "4K", "--file", text_file, "--stop", "."]


NAMES = {
    "question", "id", "text", "stop_reason", "seed", "tokens", "timings", "texts", "prefill", "looked_at",
}  # fmt: skip


def write(path: Path, questions: list) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def test_json_lines_are_all_of_stdout_and_each_answer_is_that_of_a_run_of_its_own(chat, common, tmp_path, monkeypatch):
    alone = {number: chat(*common, "--prompt", ask(number), "--json").result for number in (0, 1)}
    read: list[int] = []
    start = PrefillProgress.start
    monkeypatch.setattr(PrefillProgress, "start", lambda self, total: (read.append(total), start(self, total))[1])
    done = chat(*common, "--ask", write(tmp_path / "q.jsonl", ASKED), "--json")
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["question"], line["id"]) for line in lines] == [(ask(0), "first"), (ask(1), 2), (ask(0), None)]
    for line, number in zip(lines, (0, 1, 0), strict=True):
        assert line["text"] == alone[number]["text"] == spaced(NEEDLES[number].key)
        for name in ("prompt", "generated", "total", "capacity"):
            assert line["tokens"][name] == alone[number]["tokens"][name]
        assert line["stop_reason"] == "stop string" and line["timings"]["decode_ms_per_token"] > 0
        assert line.keys() == NAMES and line["prefill"] is None
        assert line["texts"]["prefilled"] == read[0] and line["texts"]["prefill_s"] > 0
    assert f"[the texts: {read[0]:,} tokens read in " in done.err
    assert read[0] > 1500 and len(read) == 4 and all(0 < count < 50 for count in read[1:]), "the text was read once"


def test_text_lines_are_answered_below_their_questions(chat, common, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text(f"\n{ask(1)}\n\n{ask(0)}\n", encoding="utf-16")
    done = chat(*common, "--ask", file)
    answers = {number: f"> {ask(number)}\n{spaced(NEEDLES[number].key)}\n\n" for number in (0, 1)}
    assert done.out == answers[1] + answers[0] and done.status == 0


def test_questions_on_stdin_and_the_folder_keeps_the_texts_alone(chat, common, tmp_path):
    kept = ["--session", tmp_path / "kept"]
    first = chat(*common, *kept, "--ask", "-", "--json", stdin=json.dumps(ask(0)) + "\n\n" + json.dumps(ask(1)))
    assert [json.loads(line)["text"] for line in first.out.splitlines()] == [spaced(n.key) for n in NEEDLES]
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    again = chat(*common, *kept, "--ask", "-", "--json", stdin=ask(1))
    assert "was read before: not read again" in again.err and again.result["texts"] is None
    assert again.result["text"] == spaced(NEEDLES[1].key)
    assert manifest["num_tokens"] == json.loads((tmp_path / "kept" / "manifest.json").read_text())["num_tokens"]
    assert manifest["num_tokens"] < json.loads(first.out.splitlines()[0])["tokens"]["prompt"]


def test_a_question_that_fails_does_not_end_the_others(chat, common):
    lines = [json.dumps(ask(0)), "no JSON", json.dumps({"question": "word " * 5000, "id": "long"}), json.dumps(ask(1))]
    done = chat(*common, "--ask", "-", "--json", stdin="\n".join(lines))
    results = [json.loads(line) for line in done.out.splitlines()]
    assert [result.get("text") for result in results] == [spaced(NEEDLES[0].key), None, None, spaced(NEEDLES[1].key)]
    assert "line 2 of stdin" in results[1]["error"] and results[1]["question"] is None
    assert "more than the capacity of 4,000" in results[2]["error"] and results[2]["id"] == "long"
    assert done.status == 2


def test_text_piped_in_beside_a_file_of_questions_is_read(chat, text_file, tmp_path):
    file = write(tmp_path / "q.jsonl", [ask(1)])
    done = chat("--ctx", "4K", "--stop", ".", "--ask", file, stdin=text_file.read_text())
    assert done.out == f"> {ask(1)}\n{spaced(NEEDLES[1].key)}\n\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ask", "-", "--prompt", "x"], "--ask and --prompt exclude each other"),
        (["--ask", "-", "--interactive"], "--ask answers and leaves"),
        (["--ask", "-", "--file", "-"], "--file - and --ask - both read stdin"),
        (["--ask", "/nowhere"], "there is no file /nowhere"),
        (["--ask", "-"], "stdin holds no question"),
    ],
)
def test_what_cannot_be_asked_is_refused(chat, arguments, message):
    done = chat("--ctx", "500", *arguments)
    assert done.status == 2 and done.out == "" and message in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["What?", "", '{"question": "x"}', '"quoted"'], ["What?", '{"question": "x"}', '"quoted"']),
        (['"What is\\nthis?"', '{"id": 7, "question": " Why? "}'], ["What is\nthis?", ("Why?", 7)]),
        (['"Why" is a word', "x"], ['"Why" is a word', "x"]),
        (['\ufeff{"question": "a\u2028b"}'], ["a\u2028b"]),
        (["7", "null"], ["7", "null"]),
    ],
)
def test_lines_are_text_or_json(lines, expected):
    wanted = [Question(*item) if isinstance(item, tuple) else Question(item) for item in expected]
    assert list(questions_in(lines, "here")) == wanted


def test_ctrl_c_stops_an_answer_and_begins_no_other(chat, common, monkeypatch):
    said: list[str] = []

    def press_once(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("longrun.chat.command._emit_to_stderr", press_once)
    done = chat(*common, "--ask", "-", "--json", stdin=f"{ask(0)}\n{ask(1)}\n")
    assert done.status == 130 and json.loads(done.out)["stop_reason"] == "interrupted"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of q cannot be used .*no valid JSON"),
        ('"open', "line 2 of q is no valid JSON"),
        ("text", "line 2 of q cannot be used .*no valid JSON"),
        ("[]", "line 2 of q cannot be used .*no JSON object"),
        ('{"question": 7}', "line 2 of q holds 7 as its question, which is no text"),
        ('{"id": "a"}', "line 2 of q holds None as its question"),
        ('""', "line 2 of q holds '' as its question"),
        ('{"question": "x", "id": 1.5}', r"line 2 of q has the id 1\.5: give a string or a whole number"),
        ('{"question": "x", "max": 1}', "line 2 of q has an unknown key 'max'"),
        ('{"question": "x", "question": "y"}', "has 'question' twice"),
        ('"\\ud800"', "line 2 of q is not UTF-8"),
        ('{"question": ' + "[" * 100_000, "line 2 of q cannot be used"),
    ],
)
def test_a_line_that_is_no_question_is_refused_in_a_sentence(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    Path("q").write_text(f'"first"\n{line}\n')
    with pytest.raises(InputError, match=message):
        read_questions("q")
