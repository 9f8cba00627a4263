"""Held-out tests of reading long texts: what a document holds, and the texts it is made of."""

from __future__ import annotations

import random

import numpy as np
import pytest
from long_text import save_corpus, texts, tokenizer

from longrun.errors import InputError
from longrun.lab import long_words as words
from longrun.lab.long_tasks import Corpus, TaskWriter

PINNED = [
    ("Lakshmi Mendoza", "63572"), ("indigo_perfume_count", "CY18054"), ("blue-ibis-46", "5776733"),
    ("Crimson Badger", "Lagos"), ("Nasrin Duarte", "12 May 2026"), ("Anselm", "indigo chessboard"),
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.of_texts(tokenizer(), texts())


@pytest.fixture(scope="module")
def writer() -> TaskWriter:
    return TaskWriter(tokenizer())


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


def test_a_test_stays_the_same(corpus, writer):
    """Results of different versions are compared: the same seed must ask the same."""
    found = [(q.subject, q.value) for q in writer.test_document(corpus, "0/0", 8000, [0.0, 0.5, 1.0], 2).questions]
    assert found == PINNED
    assert found != [(q.subject, q.value) for q in writer.test_document(corpus, "0/1", 8000, [0.0, 1.0], 3).questions]


def test_forms_begin_with_the_one_asked_for(corpus, writer):
    """Five facts a text: with another first form in every text, no depth is always the same form."""
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    names = [form.name for form in words.TEST_FORMS]
    for first in range(7):
        document = writer.test_document(corpus, first, 4000, depths, first_form=first)
        assert [question.form for question in document.questions] == [names[(first + i) % 6] for i in range(5)]


def test_too_short(corpus, writer):
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
