"""What the models of a comparison read: documents with facts and questions, and texts spread over their source."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longrun.errors import InputError
from longrun.lab.quality.tasks import held_out_text, retrieval_documents, text_documents
from longrun.needles.needles import Haystack
from longrun.text.encoder import leading_ids


@pytest.fixture(scope="module")
def tokenizer(planted) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(planted.path)


def test_documents_hold_their_facts_once_and_fit(tokenizer):
    haystack = Haystack.generated(0)
    for task, count in (("single", 4), ("several", 2), ("keyvalue", 2)):
        made = list(retrieval_documents(tokenizer, haystack, task, 500, [0.0, 1.0], 2, seed=0))
        again = list(retrieval_documents(tokenizer, Haystack.generated(0), task, 500, [0.0, 1.0], 2, seed=0))
        assert made == again and len(made) == count
        for document in made:
            text = tokenizer.decode(document.prompt.document_ids)
            assert 400 < document.prompt.num_tokens <= 500
            for question in document.prompt.questions:
                digits = " ".join(question.needle.key)
                assert text.count(digits) == (2 if not question.needle.name else 1)  # a pass key is said twice
        asked = [(name, q.depth) for d in made for name, q in zip(d.tasks, d.prompt.questions, strict=True)]
        for name in {name for name, _ in asked}:
            assert sorted(depth for other, depth in asked if other == name) == [0.0, 0.0, 1.0, 1.0]


def test_texts_are_spread_over_the_source(tokenizer):
    ids = list(range(1000))
    assert [doc[0] for doc in text_documents(ids, 100, 3)] == [0, 450, 900]
    assert [len(doc) for doc in text_documents(ids, 100, 3)] == [100] * 3
    assert text_documents(ids, 1000, 1) == [ids]
    assert text_documents(ids, 4, 2, before=[-1]) == [[-1, 0, 1, 2], [-1, 997, 998, 999]]
    assert leading_ids(tokenizer) == []

    def enclosing(text, add_special_tokens=True):
        return {"input_ids": [1, 7, 2] if add_special_tokens else [7]}

    assert leading_ids(enclosing) == [1]
    with pytest.raises(InputError, match="1,000 tokens and 1,001 are needed"):
        text_documents(ids, 1001, 1)
    assert len(held_out_text()) > 300_000 and held_out_text(["a", "b"]) == "a\n\nb"
