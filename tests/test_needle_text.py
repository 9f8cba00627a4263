"""A text with hidden numbers as files: what a chat is given finds them."""

import json

import pytest
import torch

import longrun
from longrun.errors import InputError
from longrun.model.tokenizer import load_tokenizer
from scripts.bench import needle_text


def test_the_questions_are_answered_from_the_text(planted, tmp_path, capsys):
    argv = ["--model", str(planted.path), "--length", "2K", "--needles", "3", "--out", str(tmp_path / "new")]
    assert needle_text.main(argv) == 0
    text, questions, numbers = (
        (tmp_path / "new" / name).read_text() for name in ("text.txt", "questions.txt", "numbers.json")
    )
    tokenizer = load_tokenizer(planted.path)
    ids = tokenizer(text)["input_ids"]
    assert f"{len(ids):,} tokens" in capsys.readouterr().out
    asked = questions.splitlines()
    assert 1900 < len(ids) + max(len(tokenizer(one)["input_ids"]) for one in asked) <= 2000
    session = longrun.load(planted.path, "cpu", device="cpu", ctx=2100).new_session()
    session.prefill(torch.tensor(ids))
    mark = session.mark()
    for question, number in zip(asked, json.loads(numbers), strict=True):
        session.prefill(torch.tensor(tokenizer(question)["input_ids"]))
        answer = tokenizer.decode(list(session.generate(len(number), eos=False)))
        assert answer.replace(" ", "") == number
        session.rewind(mark)


def test_a_folder_that_cannot_be_made(planted, tmp_path):
    (tmp_path / "file").touch()
    argv = ["--model", str(planted.path), "--length", "2K", "--out", str(tmp_path / "file" / "new")]
    with pytest.raises(InputError, match="cannot be made"):
        needle_text.main(argv)
