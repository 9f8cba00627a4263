"""What an answer looked at, in the chat: file, lines and bytes, under /sources and with --json."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from planted_chat import NEEDLES, ask, spaced

from longrun.errors import PlanError
from longrun.needles.needles import generate_sentences
from longrun.session.session import Session


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two files of a sentence a line, a needle in each."""
    sentences = list(islice(generate_sentences(5), 60))
    texts = [sentences[:30], sentences[30:]]
    texts[0].insert(11, NEEDLES[0].sentence)
    texts[1].insert(20, NEEDLES[1].sentence)
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, lines in zip(paths, texts, strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def check(first: dict, path: Path, line: int, number: int) -> None:
    assert first["file"] == str(path) and first["share"] > 0.5
    assert first["lines"][0] <= line <= first["lines"][1] and first["lines"][1] - first["lines"][0] < 3
    part = path.read_bytes()[slice(*first["bytes"])].decode()
    assert NEEDLES[number].key[1:] in part.replace(" ", ""), part
    assert part.strip()[-20:] in first["text"] or first["text"].endswith("...")


@pytest.mark.parametrize("more", [[], ["--kv", "fp32", "--chunk-size", "64"]])
def test_the_first_passage_is_the_needle(chat, files, more) -> None:
    for number, line in ((0, 12), (1, 21)):
        done = chat("--ctx", "4K", "--file", *files, "--prompt", ask(number), "--stop", ".", "--json", *more)
        assert done.result["text"] == spaced(NEEDLES[number].key)
        check(done.result["looked_at"][0], files[number], line, number)
        question = done.result["tokens"]["prompt"]
        assert all(64 <= a < b < question - 10 for a, b in (one["tokens"] for one in done.result["looked_at"]))


def test_sources_of_the_last_answer(chat, files, tmp_path) -> None:
    """After a second turn, too; not after more was read, and of a text that this process did not see without lines."""
    kept = ["--ctx", "4K", "--stop", ".", "--session", tmp_path / "kept"]
    lines = ["/sources", f"/file {files[0]}", f"/file {files[1]}", ask(1), "/sources", ask(0), "/sources"]
    done = chat(*kept, stdin="\n".join([*lines, "/file nowhere", "/sources", "/reset", "/sources"]))
    assert done.out == f"{spaced(NEEDLES[1].key)}\n{spaced(NEEDLES[0].key)}\n"
    shown = done.err.split("looked at:\n")[1:]
    assert len(shown) == 3 and "line" in shown[0]
    assert f"{files[1].name}, line 21: " in shown[0].splitlines()[0] and NEEDLES[1].key in shown[0].splitlines()[0]
    assert f"{files[0].name}, line 12: " in shown[1].splitlines()[0]
    assert done.err.count("there is no answer here to look back from") == 2
    again = chat(*kept, stdin=f"{ask(1)}\n/sources\n")
    first = again.err.split("looked at:\n")[1].splitlines()[0]
    assert f"{files[1].name}: " in first and NEEDLES[1].key[1:] in first.replace(" ", "")


def test_every_question_of_a_file_has_its_own(chat, files, tmp_path) -> None:
    (tmp_path / "q.txt").write_text(f"{ask(1)}\n{ask(0)}\n")
    done = chat("--ctx", "4K", "--file", *files, "--ask", tmp_path / "q.txt", "--stop", ".", "--json")
    results = [json.loads(line) for line in done.out.splitlines()]
    check(results[0]["looked_at"][0], files[1], 21, 1)
    check(results[1]["looked_at"][0], files[0], 12, 0)


def test_an_answer_that_cannot_be_looked_back_from_is_given_and_told(chat, files, monkeypatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise PlanError("chunks are too short")

    monkeypatch.setattr(Session, "looked_at", refuse)
    done = chat("--ctx", "4K", "--file", *files, "--prompt", ask(0), "--stop", ".", "--json")
    assert done.result["text"] == spaced(NEEDLES[0].key) and done.result["looked_at"] is None
    assert "note: what the answer looked at is not known: chunks are too short" in done.err
