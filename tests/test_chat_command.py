"""The chat as a command: a prompt or piped lines, its arguments, its answer on stdout and its status."""

from __future__ import annotations

import json
import re

import pytest
from planted_chat import NEEDLES, ask, spaced

from longrun.chat.options import template_option
from longrun.units import format_bytes


def test_json_is_all_of_stdout_and_the_answer_streams_to_stderr(planted, text_file, warm_python):
    arguments = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--stop", ".", "--json", "--chunk-size", "512"]
    arguments += ["--retrieval-ratio", "0.5", "--head-map", planted.path / "head_map"]
    done = warm_python.run("-m", "longrun.chat", "--model", planted.path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    answer = spaced(NEEDLES[0].key)
    assert result["text"] == answer and f"\n{answer}\n" in done.stderr
    assert result["resumed"] == {"session_tokens": 0, "message_tokens": 0, "documents_already_read": []}
    assert result["stop_reason"] == "stop string"
    tokens, timings = result["tokens"], result["timings"]
    assert tokens["generated"] == 8 and tokens["total"] == tokens["prompt"] + 8 and tokens["capacity"] == 4000
    assert tokens["prefilled"] == tokens["prompt"] > 1500
    assert all(timings[name] > 0 for name in ("load_s", "prefill_s", "prefill_tokens_per_s", "decode_ms_per_token"))
    assert result["cache_bytes"] == result["plan"]["cache_bytes"] > 0
    assert result["split_hash"] == result["plan"]["split"]["hash"]
    assert sum(result["plan"]["split"]["retrieval_heads"]) == 4
    for expected in ("retrieval pages", "prompt tokens", "tokens/s", "ms/token", "filled"):
        assert expected in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ctx", "0"], "--ctx '0' must be at least 1"),
        (["--ctx", "-5"], "--ctx '-5' is not a number"),
        (["--ctx", "9" * 5000], "must be at most 1,000,000,000 tokens"),
        (["--ctx", "3.3X"], "--ctx '3.3X' is not a number"),
        (["--temperature", "-1"], "--temperature: value -1.0 is outside the range"),
        (["--top-p", "2"], "--top-p: value 2.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: value 0 is too small"),
        (["--stop", ""], "stop string is empty"),
        (["--file", "/nowhere/a.txt"], "there is no file /nowhere/a.txt"),
        (["--session", "FULL"], "is not a session and not empty"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 (byte 0xe9 after 3 characters)"),
        (["--seed", "-1"], "--seed: value -1 is too small"),
        (["--interactive"], "--interactive needs a terminal"),
        (["--template-option", "thinking"], "'thinking' is no option: write NAME=VALUE"),
        (["--sampling", "makers"], "--sampling: invalid choice: 'makers'"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_arguments_are_one_sentence_and_status_2(chat, tmp_path, arguments, message):
    (tmp_path / "something").write_text("mine")
    arguments = [str(tmp_path) if argument == "FULL" else argument for argument in arguments]
    done = chat("--prompt", "Hi", *arguments)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error: ") and message in done.err and done.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["something"]


def test_values_of_template_options_are_json_or_text():
    given = ["a=false", "b=False", "c=3", "d=", "e=low", 'f="x"', "g=[1]", "h=a=b"]
    values = [False, False, 3, "", "low", "x", [1], "a=b"]
    assert [template_option(text) for text in given] == list(zip("abcdefgh", values, strict=True))


def test_json_needs_a_prompt(chat):
    done = chat("--json")
    assert done.status == 2 and "--json needs --prompt" in done.err


def test_a_prompt_beyond_the_capacity_names_both_numbers_before_reading(chat, text_file):
    done = chat("--ctx", "500", "--file", text_file, "--prompt", ask(0))
    assert done.status == 2 and done.out == ""
    sentence = done.err.splitlines()[-1]
    numbers = re.search(r"would hold ([\d,]+) tokens, more than the capacity of 500: give --ctx (\d+)", sentence)
    assert numbers and int(numbers[2]) > int(numbers[1].replace(",", "")) > 1500, sentence
    assert "tokens/s" not in done.err


def test_a_full_context_ends_the_answer_with_status_0(chat):
    done = chat("--ctx", "64", "--prompt", "The old lighthouse " * 10, "--max-new-tokens", "500", "--json")
    assert done.status == 0, done.err
    assert done.result["stop_reason"] == "context full" and "the context is full (64 tokens)" in done.err
    (weights,) = (item for item in done.result["plan"]["items"] if item["name"] == "weights")
    assert f"loading {format_bytes(weights['bytes'])} of weights\n" in done.err  # between the plan and a long silence
    assert done.result["tokens"]["total"] == 65, "64 in the cache and one that was given out"


def test_a_folder_is_read_with_headers_and_what_was_left_out_is_told(chat, text_file, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text(text_file.read_text())
    (tmp_path / "texts" / "a.md").write_text("A short text.")
    (tmp_path / "texts" / "c.bin").write_bytes(b"\0")
    monkeypatch.chdir(tmp_path)
    done = chat("--ctx", "4K", "--file", "texts", "--prompt", ask(1), "--stop", ".", "--session", "kept")
    assert done.out == f"{spaced(NEEDLES[1].key)}\n"
    assert "note: left out of texts: 1 binary file (texts/c.bin)" in done.err
    shown = ["--file", "texts/b.txt", "texts/a.md", "--prompt", ask(0), "--stop", ".", "--session", "kept", "--json"]
    again = chat("--ctx", "4K", *shown)
    assert again.result["resumed"]["documents_already_read"] == ["texts/b.txt", "texts/a.md"]
    assert "2 texts were read before: not read again (texts/b.txt, texts/a.md)" in again.err
    assert again.result["text"] == spaced(NEEDLES[0].key)


def test_text_piped_in_beside_a_prompt_is_read(chat, text_file):
    for arguments in ([], ["--file", "-"]):
        done = chat(
            "--ctx", "4K", "--prompt", ask(0), "--stop", ".", "--json", *arguments, stdin=text_file.read_text()
        )  # fmt: skip
        assert done.result["text"] == spaced(NEEDLES[0].key) and done.result["tokens"]["prompt"] > 1500
    done = chat("--file", "-", stdin="a text")
    assert done.status == 2 and "which without --prompt holds the messages: give --prompt TEXT" in done.err


def test_min_p_of_1_leaves_only_the_likeliest_token(chat, text_file):
    at_random = ["--ctx", "4K", "--file", text_file, "--prompt", ask(0), "--stop", ".", "--temperature", "50"]
    assert chat(*at_random, "--min-p", "1").out == f"{spaced(NEEDLES[0].key)}\n"
    assert chat(*at_random, "--max-new-tokens", "8").out != f"{spaced(NEEDLES[0].key)}\n"


def test_piped_lines_are_turns_and_errors_show_in_the_status(chat, text_file, tmp_path):
    lines = f"/file {text_file}\n{ask(0)}\n/nonsense\n{ask(1)}\n/save {tmp_path / 'saved'}\n"
    done = chat("--ctx", "4K", "--max-new-tokens", "7", stdin=lines)
    assert done.out.splitlines() == [spaced(needle.key) for needle in NEEDLES]
    assert done.status == 2 and "no command /nonsense" in done.err
    assert (tmp_path / "saved" / "manifest.json").is_file()
    done = chat("--ctx", "1K")
    assert done.status == 2 and "pass --prompt" in done.err.splitlines()[-1]
