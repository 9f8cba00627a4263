"""What a comparison measures: exact answers, their first choices, bytes in use, and blocks of text by hand."""

from __future__ import annotations

import math

import pytest
import torch
from planted_maps import maps_that_miss

import longrun
from longrun.lab.quality.measures import (
    SPARE_TOKENS,
    Opened,
    cache_bytes,
    compare_blocks,
    greedy_choices,
    measure_retrieval,
    open_session,
)
from longrun.lab.quality.row import Row
from longrun.lab.quality.tasks import retrieval_documents
from longrun.needles.needles import Haystack


@pytest.fixture(scope="module")
def runtime(planted):
    return longrun.load(planted.path, "cpu", planted.head_map, device="cpu", ctx=900, retrieval_ratio=0.125)


def test_exact_match_is_what_greedy_generation_gives(planted):
    """Against another way to the same answer: generate, decode and compare the digits."""
    row = Row("random", f"random:{maps_that_miss(planted)[0]}", 0.25)
    runtime = longrun.load(
        planted.path, "cpu", row.make_map(2, 4), device="cpu", ctx=800, retrieval_ratio=row.retrieval_ratio
    )  # fmt: skip
    documents = list(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 600, [0.3, 0.9], 2, 3))
    measured = measure_retrieval(runtime, row, Opened.of(runtime, row, 600), documents, lambda name: None)["items"]
    exact = []
    for document in documents:
        for question in document.prompt.questions:
            session = runtime.new_session(700)
            session.prefill([*document.prompt.document_ids, *question.token_ids])
            text = runtime.tokenizer.decode(list(session.generate(len(question.expected_ids) + 3)))
            exact.append(question.needle.matches(text))
    assert [item["exact"] for item in measured] == exact
    assert set(exact) == {True, False}
    assert all(item["token_accuracy"] < 1 for item in measured if not item["exact"])


def test_choices_in_one_chunk_are_those_along_one_token_after_another(runtime):
    """Also where the answer ends one page and begins the next, and after a rewind."""
    document = next(iter(retrieval_documents(runtime.tokenizer, Haystack.generated(3), "several", 600, [0.9], 1, 3)))
    question = document.prompt.questions[0]
    session = open_session(runtime, Row("map", "unused"), 700)
    session.prefill(document.prompt.document_ids)
    found = []
    for filled in (0, 60 - (session.seq_len + len(question.token_ids)) % 64):
        if filled > 0:
            session.prefill(document.prompt.document_ids[-filled:])
        mark = session.mark()
        session.prefill(question.token_ids)
        one_by_one = [int(session.logits.argmax())]
        one_by_one += [int(session.prefill([token]).argmax()) for token in question.expected_ids]
        session.rewind(mark)
        session.prefill(question.token_ids)
        at_once, after = greedy_choices(session, question.expected_ids)
        assert [*at_once, after] == one_by_one
        found.append(at_once == list(question.expected_ids))
    assert session.seq_len % 64 < 60 and found == [True, True]
    wrong = [(token + 1) % 90 for token in question.expected_ids]
    session.rewind(mark)
    session.prefill(question.token_ids)
    assert greedy_choices(session, wrong)[0] != wrong  # the failing side


def test_bytes_in_use_are_those_of_the_tokens_held(runtime):
    row = Row("map", "unused")
    session = open_session(runtime, row, 700)
    session.prefill(list(range(3, 603)))
    # one retrieval head: page 0 and the tail exact (bf16), 8 INT4 pages; 7 streaming heads with full rings of 64 + 256
    head_dim, page = 64, 64
    exact = 2 * page * head_dim * 2
    int4 = page * head_dim + page * 4 + head_dim * 4 + 4  # nibbles, value scales, key scales, table entry
    rings = 7 * 320 * 2 * head_dim * 2
    assert session.seq_len == 600
    assert cache_bytes(session.cache)["used"] == 2 * exact + 8 * int4 + rings
    assert cache_bytes(session.cache)["allocated"] == session.cache_bytes == session.plan.cache_bytes
    assert session.capacity == 700 + SPARE_TOKENS


def test_blocks_by_hand():
    generator = torch.Generator().manual_seed(0)
    own, reference = (torch.randn(40, 11, generator=generator).log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 11, (40,), generator=generator).tolist()
    blocks = compare_blocks(own, reference, ids)
    assert [block["tokens"] for block in blocks] == [32, 8]
    for block, rows in zip(blocks, (range(32), range(32, 40)), strict=True):
        kl = [sum(math.exp(p) * (p - q) for p, q in zip(*pair, strict=True)) for pair in
              ((reference[row].tolist(), own[row].tolist()) for row in rows)]  # fmt: skip
        assert block["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-5)
        assert block["nll"] == pytest.approx(-sum(float(own[row, ids[row]]) for row in rows) / len(rows), rel=1e-5)
        same = [int(own[row].argmax()) == int(reference[row].argmax()) for row in rows]
        assert block["top1"] == pytest.approx(sum(same) / len(same))
    assert 0 < blocks[0]["top1"] < 1
