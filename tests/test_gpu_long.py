"""Needles beyond position 2^21 and beyond bytes 2^31 and 2^32 of the page pool, and with pages in host memory.

On the CPU the same function runs at a length that takes seconds; `pytest -m gpu` runs the lengths that matter.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoTokenizer

import longrun
from longrun.lab.planted import PlantedModel, make_planted_model
from longrun.lab.planted_tokenizer import build_vocabulary, cue_words
from longrun.lab.planted_weights import MATCH_NATS, NUM_SLOTS, OFFSET_NATS, PlantedShape, make_codes
from longrun.needles.needles import Haystack, NeedlePrompt, build_prompt, make_needles
from longrun.session.session import Session

LONG = PlantedShape(
    num_layers=2, hidden_size=1024, intermediate_size=1024, num_qo_heads=8, num_kv_heads=8, head_dim=128,
    vocab_size=8192, max_position_embeddings=2**22, moving_pairs=16, dtype="bfloat16", retrieval_ratio=1.0,
)  # fmt: skip
"""Small weights, large cache: 16 heads, all retrieval, hold 2.11 KB a token in INT4 pages."""
DEPTHS = (0.0, 0.25, 0.5, 0.88, 0.93, 0.96, 0.99)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("long") / "model", LONG, seed=21)


def hide(planted: PlantedModel, length: int) -> NeedlePrompt:
    tokenizer = AutoTokenizer.from_pretrained(planted.path)
    return build_prompt(tokenizer, Haystack.generated(21), make_needles(len(DEPTHS), 21), length, DEPTHS)


def smallest_margin(prompt: NeedlePrompt) -> float:
    """Nats between the right position and the best wrong one in the retrieval head, over all answers: from the codes
    alone, so that a wrong answer is the machinery's."""
    vocabulary = build_vocabulary(LONG.vocab_size)
    first = vocabulary.index(cue_words()[0])
    codes = make_codes(LONG.vocab_size, NUM_SLOTS, LONG.slot_size, range(first, first + len(cue_words())), 21)
    ids = torch.tensor(prompt.document_ids)
    margins = []
    for question in prompt.questions:
        fed = [*question.token_ids, *question.expected_ids]
        for step, expected in enumerate(question.expected_ids):
            cue = fed[: len(question.token_ids) + step][-NUM_SLOTS:]
            # slot s of a position's key is the token s + 1 before it, of the query the token s before the last
            score = torch.zeros(len(ids) - NUM_SLOTS)
            for slot in range(NUM_SLOTS):
                like = codes[:, slot] @ codes[cue[-1 - slot], slot]
                score += like[ids[NUM_SLOTS - 1 - slot : len(ids) - 1 - slot]]
            best = score.topk(2)
            assert ids[int(best.indices[0]) + NUM_SLOTS] == expected
            assert best.values[0] == pytest.approx(NUM_SLOTS, abs=1e-3)
            margins.append(MATCH_NATS * float(best.values[0] - best.values[1]))
    return min(margins)


def answer_everything(
    planted: PlantedModel, prompt: NeedlePrompt, device: str, device_share: float = 1.0
) -> tuple[list[list[int]], Session]:
    """What is generated to every question of the prompt, with INT4 pages and every head a retrieval head."""
    weights = "bf16" if device == "cuda" else "fp32"  # a CPU multiplies float32 several times faster
    runtime = longrun.load(
        planted.path, head_map="full", kv_format="int4", weight_format=weights, device=device,
        ctx=prompt.num_tokens + 32, device_share=device_share,
    )  # fmt: skip
    session = runtime.new_session()
    session.prefill(prompt.document_ids)
    end = session.mark()
    answers = []
    for question in prompt.questions:
        session.rewind(end)
        session.prefill(question.token_ids)
        answers.append(list(session.generate(len(question.expected_ids), eos=False)))
    session.cache.check()
    return answers, session


def answer_slots(planted: PlantedModel, prompt: NeedlePrompt, session: Session) -> list[tuple[int, int]]:
    """(position, slot in the page pool) of each answer's first token, in the one head that retrieves."""
    layer, head = planted.retrieval_head  # every head is kept, so that the split leaves the heads in their order
    pages = session.cache.layers[layer][0]
    table, fmt = pages.places.table[head].cpu(), pages.fmt
    found = []
    for question in prompt.questions:
        position = find(prompt.document_ids, [*question.token_ids[-NUM_SLOTS:], *question.expected_ids]) + NUM_SLOTS
        page = position // fmt.page_size - fmt.sink_pages
        assert page < pages.num_pooled, "the answer stands in the tail"
        found.append((position, -1 if page < 0 else int(table[page])))
    return found


def find(ids: Sequence[int], wanted: Sequence[int]) -> int:
    """Where `wanted` stands in `ids`: exactly once."""
    windows = torch.tensor(ids).unfold(0, len(wanted), 1)
    hit = torch.ones(len(windows), dtype=torch.bool)
    for place, token_id in enumerate(wanted):
        hit &= windows[:, place] == token_id
    (position,) = hit.nonzero()[:, 0].tolist()
    return position


def check_answers(planted: PlantedModel, length: int, device: str) -> tuple[list[tuple[int, int]], Session]:
    prompt = hide(planted, length)
    assert smallest_margin(prompt) > 30
    answers, session = answer_everything(planted, prompt, device)
    assert answers == [list(question.expected_ids) for question in prompt.questions]
    return answer_slots(planted, prompt, session), session


def check_offloaded(planted: PlantedModel, length: int, device: str) -> None:
    """Half of all pages in host memory: the same tokens as with every page on the device."""
    prompt = hide(planted, length)
    resident, session = answer_everything(planted, prompt, device)
    assert session.cache.host_pool.num_used == 0
    del session
    gc.collect()
    offloaded, session = answer_everything(planted, prompt, device, device_share=0.5)
    pools = session.cache.device_pool, session.cache.host_pool
    assert 0.4 < pools[1].num_used / (pools[0].num_used + pools[1].num_used) < 0.6
    slots = [slot for _, slot in answer_slots(planted, prompt, session) if slot >= 0]
    assert {slot >= pools[1].first_slot for slot in slots} == {True, False}  # needles in both pools
    assert offloaded == resident == [list(question.expected_ids) for question in prompt.questions]


def test_margins_of_the_shape():
    """As in test_planted: the nearest wrong distance of the offset heads over the whole context."""
    distance = torch.arange(1, LONG.max_position_embeddings, dtype=torch.float64)
    loss = torch.zeros_like(distance)
    for frequency, weight in zip(LONG.frequencies, LONG.pair_weights, strict=True):
        loss += weight * (1 - torch.cos(frequency * distance))
    assert OFFSET_NATS * loss.min() > 40 + math.log(LONG.max_position_embeddings)
    assert LONG.rope_theta < torch.finfo(torch.float32).max


def test_every_needle_on_the_cpu(planted):
    positions, session = check_answers(planted, 7_000, "cpu")
    assert [position < 64 for position, _ in positions] == [True] + [False] * 6
    assert session.cache.device_pool.num_used == 16 * (session.seq_len // 64 - 1)


def test_offloaded_pages_give_the_same_tokens_on_the_cpu(planted):
    check_offloaded(planted, 3000, "cpu")


@pytest.mark.gpu
def test_needles_beyond_two_million_tokens_and_four_gigabytes(planted):
    positions, session = check_answers(planted, 2_300_000, "cuda")
    payload = session.cache.spec.page_format.payload_bytes
    assert payload == 8448
    far = [(position, slot * payload) for position, slot in positions]
    assert max(position for position, _ in far) > 2**21
    assert any(2**31 < offset < 2**32 for _, offset in far), far
    assert any(position > 2**21 and offset > 2**32 for position, offset in far), far


@pytest.mark.gpu
def test_offloaded_pages_give_the_same_tokens(planted):
    check_offloaded(planted, 400_000, "cuda")
