"""The planted model through the real runtime: every needle at 1K-66K with INT4 pages, half of them in the host pool.

A planted model tests machinery (cache, quantization, paging, offload, kernels), never model quality.
"""

import pytest

import longrun
from longrun.needles.needles import generate_sentences, make_needles
from longrun.patterns.head_map import HeadMap

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def document(tokenizer, length, needles):
    """Token ids of a text of `length` tokens with the needles at even depths, and where each stands."""
    budget = length - sum(len(tokenizer(needle.sentence).input_ids) for needle in needles)
    ids, spots, sentences = [], [], generate_sentences("long context")
    waiting = list(zip(DEPTHS, needles, strict=True))
    while waiting or len(ids) < length - 60:
        if waiting and len(ids) >= waiting[0][0] * (budget - 60):
            spots.append(len(ids))
            ids += tokenizer(" " + waiting.pop(0)[1].sentence, add_special_tokens=not ids).input_ids
        else:
            ids += tokenizer(" " + next(sentences), add_special_tokens=not ids).input_ids
    assert length - 120 < len(ids) <= length
    return ids, spots


def ask(runtime, session, needles):
    """Which needles the session continues exactly, each asked from the same point."""
    found, mark = [], session.mark()
    for needle in needles:
        session.prefill(runtime.tokenizer(" " + needle.answer_prefix, add_special_tokens=False).input_ids)
        expected = runtime.tokenizer(" " + needle.key, add_special_tokens=False).input_ids
        found.append(list(session.generate(len(expected), eos=False)) == expected)
        session.rewind(mark)
    return found


def load(planted, head_map, length, **options):
    settings = {"kv_format": "int4", "device": "cpu", "ctx": length + 200, "device_share": 0.5, "chunk_size": 2048}
    budget = longrun.Budget.parse('[memory]\ngpu = "3 GB"\nhost = "2 GB"', "test")
    return longrun.load(planted.path, budget=budget, head_map=head_map, **{**settings, **options})


@pytest.mark.parametrize("length", [1_000, 8_000, 66_400])  # the last one beyond position 2^16
def test_every_needle_is_found(planted, length):
    runtime = load(planted, planted.head_map, length, retrieval_ratio=1 / 8)  # the one true head
    assert runtime.plan.cache.host_pages >= runtime.plan.cache.device_pages > 0
    needles = make_needles(len(DEPTHS), seed=length)
    ids, _ = document(runtime.tokenizer, length, needles)
    session = runtime.new_session()
    session.prefill(ids)
    session.cache.check()
    assert session.cache.host_pool.num_used > 0
    assert ask(runtime, session, needles) == [True] * len(DEPTHS)
    assert session.cache_bytes == runtime.plan.cache_bytes


def test_streaming_heads_find_none_outside_their_window(planted):
    """So the test above can fail: without the retrieval head only the needle in the recent window is found."""
    config = planted.shape
    nothing = HeadMap.from_scores([[0.0] * config.num_kv_heads] * config.num_layers, sink_size=4, recent_size=256)
    runtime = load(planted, nothing, 8_000)
    needles = make_needles(len(DEPTHS), seed=8_000)
    ids, spots = document(runtime.tokenizer, 8_000, needles)
    assert len(ids) - spots[-1] < 200  # the last one is inside
    session = runtime.new_session()
    session.prefill(ids)
    assert ask(runtime, session, needles) == [False] * 4 + [True]


def test_a_wrong_head_map_finds_none(planted):
    """Keeping a decoy instead of the true head loses every needle outside the window."""
    layer, head = planted.retrieval_head
    scores = [[1.0] * planted.shape.num_kv_heads for _ in range(planted.shape.num_layers)]
    scores[layer][head] = 0.0
    runtime = load(planted, HeadMap.from_scores(scores, sink_size=4, recent_size=256), 4_000)
    needles = make_needles(len(DEPTHS), seed=4)
    ids, _ = document(runtime.tokenizer, 4_000, needles)
    session = runtime.new_session()
    session.prefill(ids)
    assert ask(runtime, session, needles)[:4] == [False] * 4
