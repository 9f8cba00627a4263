"""Long tasks: what a sample holds, that it is the same everywhere, and that tests and training share nothing."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from long_text import save_corpus, texts, tokenizer

from longrun import long_words as words
from longrun import needle_words
from longrun.errors import InputError
from longrun.long_tasks import Corpus, TaskWriter


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.of_texts(tokenizer(), texts())


@pytest.fixture(scope="module")
def writer() -> TaskWriter:
    return TaskWriter(tokenizer())


def answers_of(sample) -> list[str]:
    """The learned runs of a sample, decoded, each without its end token."""
    found, run = [], []
    for token, learned in zip([*sample.token_ids, 0], [*sample.answer_mask, 0], strict=True):
        if learned:
            run.append(token)
        if run and (not learned or token == tokenizer().eos_token_id):
            assert run[-1] == tokenizer().eos_token_id
            found.append(tokenizer().decode(run[:-1]))
            run = []
    return found


def test_samples_depend_on_seed_and_index_alone(corpus, writer):
    first = writer.training_sample(corpus, 1, 5, 1500)
    again = TaskWriter(tokenizer()).training_sample(corpus, 1, 5, 1500)
    assert first == again
    assert first.token_ids != writer.training_sample(corpus, 1, 6, 1500).token_ids
    assert first.token_ids != writer.training_sample(corpus, 2, 5, 1500).token_ids


@pytest.mark.parametrize("length", [400, 1500, 6000])
def test_a_sample_fills_its_length_and_asks_what_it_tells(corpus, writer, length):
    forms = set()
    for index in range(20):
        sample = writer.training_sample(corpus, 0, index, length)
        assert 0.85 * length < len(sample.token_ids) <= length
        assert len(sample.answer_mask) == len(sample.token_ids)
        forms |= set(sample.forms)
        answers = answers_of(sample)
        assert len(answers) == len(sample.forms) >= 1
        text = tokenizer().decode(sample.token_ids)
        document = text[: text.index("</s>")]
        for form, answer in zip(sample.forms, answers, strict=True):
            digits = [run for run in re.findall(r"\d{4,}", answer) if run not in document]
            assert not digits, (form, answer)
            if form == "quote":
                assert answer in document
    assert len(forms) >= (4 if length == 400 else 12)
    assert ("quote" in forms) == (length > 1000)


def test_harder_forms_have_the_answer_that_the_text_gives(corpus, writer):
    seen = set()
    for index in range(120):
        sample = writer.training_sample(corpus, 3, index, 1500)
        text = tokenizer().decode(sample.token_ids)
        document, questions = text.split("</s>")[0], re.findall(r"user\n(.*?)</s>", text, flags=re.S)
        questions[0] = document.rsplit("\n\n", 1)[1]
        document = document.rsplit("\n\n", 1)[0]
        for form, question, answer in zip(sample.forms, questions, answers_of(sample), strict=True):
            if form == "which first":
                a, b = re.search(r".*(?:text,|text:) (.*?) or (.*?)\?", question).groups()
                assert answer == min((a, b), key=document.index)
            elif form == "last value":
                name = max(re.findall(r"\w+", question), key=lambda word: document.count(word) if "_" in word else 0)
                values = re.findall(rf"\b{name} :?= (\d+)", document)
                assert answer.endswith(values[-1]) and len(values) >= 2
            elif form == "list":
                things = re.split(r", | and ", answer.rstrip("."))
                assert [document.index(thing) >= 0 for thing in things]
            seen.add(form)
    assert {"which first", "last value", "list"} <= seen


def test_test_documents_stand_at_their_depths(corpus, writer):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    document = writer.test_document(corpus, 0, 4000, depths, per_depth=2)
    assert [question.depth for question in document.questions] == depths * 2
    longest = max(len(question.token_ids) + len(question.value_ids) for question in document.questions)
    assert 3900 < len(document.token_ids) + longest <= 4000
    text = tokenizer().decode(document.token_ids)
    for question in document.questions:
        assert abs(text.index(question.value) / len(text) - question.depth) < 0.07
        assert text.count(question.value) == 1
        assert tokenizer().decode(question.value_ids).strip() == question.value
        asked = tokenizer().decode(question.token_ids)
        assert question.value not in asked and question.subject.split(",")[0] in asked
        whole = tokenizer()(asked + tokenizer().decode(question.value_ids), add_special_tokens=False)["input_ids"]
        assert whole == [*question.token_ids, *question.value_ids]
    assert {question.form for question in document.questions} == {form.name for form in words.TEST_FORMS}


def test_training_and_tests_share_no_name_form_or_phrasing():
    train, test = set(words.TRAIN_NAMES), set(words.TEST_NAMES)
    assert not train & test and not (train | test) & set(needle_words.NAMES)
    assert len(train) == len(words.TRAIN_NAMES) and len(test) == len(words.TEST_NAMES)

    def phrases(forms) -> set[str]:
        return {text for form in forms for text in (*form.statements, *form.questions, *form.answers)} - {"{value}"}

    assert not phrases(words.TRAIN_FORMS) & phrases(words.TEST_FORMS)
    assert "magic" not in " ".join(phrases(words.TRAIN_FORMS)).lower()
    assert words.TEST_INTRODUCTION not in words.INTRODUCTIONS


def test_too_short(corpus, writer):
    with pytest.raises(InputError, match="too short"):
        writer.training_sample(corpus, 0, 0, 60)
    with pytest.raises(InputError, match="too short"):
        writer.test_document(corpus, 0, 200, [0.0, 0.5, 1.0], per_depth=5)


def test_a_stretch_goes_on_in_order_and_weighs_kinds(tmp_path):
    own = Corpus(np.arange(1000, dtype=np.uint16), np.array([10, 500, 1000]), ("prose", "docs", "code"))
    found = own.stretch(random.Random(0), 5000)
    assert len(found) == 5000
    runs = np.diff(found) == 1
    assert runs.mean() > 0.95
    starts = [own.stretch(random.Random(seed), 1)[0] for seed in range(400)]
    assert 0.42 < np.mean(np.array(starts) < 10) < 0.58  # half of the draws, though 1% of the tokens
    save_corpus(tmp_path / "data")
    read = Corpus.read(tmp_path / "data", "held_out")
    assert tokenizer().decode(next(read.documents()).tolist()) == texts(1, 1500)[0]
    (tmp_path / "data" / "train.tokens.xz").write_bytes(b"x")
    with pytest.raises(InputError, match="make_long_data"):
        Corpus.read(tmp_path / "data", "train")
