"""Heads that keep their newest tokens beside the sinks: exact to the token, pages given back, placement of any kind."""

import dataclasses

import numpy as np
import pytest
import torch
from driven_attention import attention_over, cpu_kernels, drive
from test_attention import DIM, GROUP, KV_HEADS, RECENT, SINK, chunked, make, random_tokens, rms_ratio

from longrun.attention.interface import Step
from longrun.cache.spans import HOST
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import key_rotation
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.reach import ALL_TOKENS, Reach

PAGE = 16
REACHES = ((ALL_TOKENS, 90, 90), (70, 5, 1, 1))
HEADS = tuple(map(len, REACHES))


def reaching(kv, capacity, compiled=True, reaches=REACHES, sink_size=SINK, device_pages=None, marks=2, scratch=160):
    fmt = PageFormat(kv, PAGE, DIM)
    pages = fmt.pooled_pages(capacity)
    device_pages = pages if device_pages is None else device_pages
    spec = CacheSpec(
        tuple(map(len, reaches)), KV_HEADS, fmt, capacity, sink_size, RECENT, device_pages, 9, reaches, marks
    )  # fmt: skip
    heads = max(spec.retrieval_heads)
    shape = AttentionSpec(scratch, heads, KV_HEADS * GROUP, KV_HEADS, DIM, 4, capacity, sink_size, RECENT)
    return attention_over(spec, shape, kernels=cpu_kernels() if compiled else None)


def seen_by(n, reach, sink_size=SINK):
    rows, cols = torch.arange(n)[:, None], torch.arange(n)[None]
    return (cols <= rows) & ((cols < sink_size) | (cols > rows - reach))


def by_mask(q, k, v, reaches=REACHES, sink_size=SINK):
    """The definition: float64 softmax under each head's mask; heads without a reach stream."""
    layers, n = q.shape[:2]
    out = torch.empty(q.shape, dtype=torch.float64)
    for layer in range(layers):
        windows = [*reaches[layer], *[RECENT] * KV_HEADS][:KV_HEADS]
        for head in range(q.shape[2]):
            kv = head // GROUP
            scores = q[layer, :, head].double() @ k[layer, :, kv].double().T / DIM**0.5
            hidden = ~seen_by(n, windows[kv], sink_size)
            out[layer, :, head] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[layer, :, kv].double()
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sink_size", [0, 7, 16, 20, 40])
@pytest.mark.parametrize("chunk", [1, 7, 33, 300])
def test_exact_to_the_token_at_every_chunk_size(compiled, sink_size, chunk):
    n = 300 if chunk > 1 else 180
    q, k, v = random_tokens(n)
    attention = reaching("fp32", n, compiled, sink_size=sink_size)
    out = drive(attention, q, k, v, chunked(n, chunk))
    assert rms_ratio(out, by_mask(q, k, v, sink_size=sink_size)) < 2e-6


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sink_size", [5, 20, 40])
def test_quantized_pages_are_masked_to_the_token(kv, compiled, sink_size):
    """Decode after a prefill, against attention over the dequantized tokens under the mask."""
    n, start = 260, 150
    q, k, v = random_tokens(n)
    fmt = PageFormat(kv, PAGE, DIM)
    for_queries, for_keys = key_rotation(DIM)
    attention = reaching(kv, n, compiled, sink_size=sink_size)
    out = drive(attention, q, k, v, [start] + [1] * (n - start))
    worst = 0.0
    for layer, reaches in enumerate(REACHES):
        for head in range(len(reaches) * GROUP):
            kv_head = head // GROUP
            keys, values = (k[layer, :, kv_head] @ for_keys).bfloat16().float(), v[layer, :, kv_head]
            if fmt.rotates_values:
                values = values @ for_keys
            values = values.bfloat16().float()
            closed = slice(0, n // PAGE * PAGE)
            in_pages = encode_pages(*(x[closed].view(-1, PAGE, DIM) for x in (keys, values)), fmt)
            stored_k, stored_v = (x.flatten(0, 1) for x in decode_pages(*in_pages, fmt))
            for position in range(start, n):
                held_k, held_v = keys[: position + 1].clone(), values[: position + 1].clone()
                pooled = slice(PAGE, fmt.closed_pages(position + 1) * PAGE)
                held_k[pooled], held_v[pooled] = stored_k[pooled], stored_v[pooled]
                hidden = ~seen_by(position + 1, reaches[kv_head], sink_size)[-1]
                scores = (q[layer, position, head] @ for_queries) @ held_k.T / DIM**0.5
                expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ held_v
                if fmt.rotates_values:
                    expected = expected @ for_queries.T
                worst = max(worst, rms_ratio(out[layer, position, head], expected))
    assert worst < 1e-4


def test_pages_out_of_reach_return_to_the_pool():
    n = 600
    q, k, v = random_tokens(n)
    attention = reaching("int4", n)
    cache, spec = attention.cache, attention.cache.spec
    drive(attention, q, k, v, [200, 1, 199, *[1] * 100, 100])
    pooled = spec.page_format.pooled_pages(n)
    held = [[reach.held_pages(n - 1) for reach in spec.layer_reaches(layer)] for layer in range(2)]
    assert held[0][0] == pooled and max(held[1]) < 8
    assert cache.device_pool.num_used == sum(map(sum, held))
    assert cache.device_pool.num_slots < pooled * 4  # of seven heads


def test_the_plan_has_pages_for_the_marks_it_counts():
    n = 900
    q, k, v = random_tokens(n)
    attention = reaching("k5v3", n, marks=2)
    cache = attention.cache
    drive_on(attention, q, k, v, 0, [300])
    first = cache.mark()
    drive_on(attention, q, k, v, 300, [150, 1, 1])
    second = cache.mark()
    assert cache.holds_back_pages
    whole = drive_on(attention, q, k, v, 452, [200, *[1] * 70, 100])
    cache.check()
    cache.rewind(second)
    cache.check()
    assert torch.equal(drive_on(attention, q, k, v, 452, [200, *[1] * 70, 100]), whole)
    cache.rewind(first)
    cache.check()
    drive_on(attention, q, k, v, 300, [150, 1, 1])
    assert torch.equal(drive_on(attention, q, k, v, 452, [200, *[1] * 70, 100]), whole)
    used = cache.device_pool.num_used
    cache.release(first)
    drive_on(attention, q, k, v, 822, [40])
    assert cache.device_pool.num_used < used
    del second, first
    cache.check()


def test_a_mark_that_is_gone_holds_nothing_back():
    n = 700
    q, k, v = random_tokens(n)
    attention, other = reaching("int4", n), reaching("int4", n)
    drive_on(attention, q, k, v, 0, [200])
    marks = [attention.cache.mark() for _ in range(2)]
    assert attention.cache.holds_back_pages
    del marks
    assert not attention.cache.holds_back_pages
    drive_on(attention, q, k, v, 200, [400])
    drive_on(other, q, k, v, 0, [200, 400])
    assert attention.cache.device_pool.num_used == other.cache.device_pool.num_used


def drive_on(attention, q, k, v, start, chunks):
    out = []
    for size in chunks:
        piece = slice(start, start + size)
        step = Step(start, size, None, None)
        out.append(
            [attention.run(i, q[i, piece].clone(), k[i, piece].clone(), v[i, piece].clone(), step) for i in range(2)]
        )
        attention.cache.advance(size)
        attention.cache.check()
        start += size
    return torch.cat([torch.stack(row) for row in out], dim=1)


def scattered(attention, seed):
    """Move pages at random between the pools."""
    draw = np.random.default_rng(seed)

    def room(pool):
        return pool.num_slots - pool.num_used

    for pages, _ in attention.cache.layers:
        if pages is None:
            continue
        for head in range(pages.num_heads):
            chosen = draw.permutation(pages.num_pooled)
            pages.places.move(head, chosen[: min(room(attention.cache.host_pool), len(chosen) // 2)], to_host=True)
            chosen = draw.permutation(pages.num_pooled)
            pages.places.move(head, chosen[: min(room(attention.cache.device_pool), len(chosen) // 3)], to_host=False)
        assert pages.num_pages(HOST) > 0


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kv", ["k5v3", "fp32"])
@pytest.mark.parametrize("reaches", [(), REACHES])
def test_pages_of_any_position_may_stand_anywhere(compiled, kv, reaches):
    n, capacity = 400, 700
    q, k, v = random_tokens(n)
    plain = reaching(kv, capacity, compiled, reaches or ((ALL_TOKENS,) * 3, (ALL_TOKENS,) * 4), device_pages=20)
    mixed = reaching(kv, capacity, compiled, reaches or ((ALL_TOKENS,) * 3, (ALL_TOKENS,) * 4), device_pages=20)
    mark = None
    for start, sizes in ((0, [250]), (250, [1, 30, 1]), (282, [1] * 40 + [78])):
        expected = drive_on(plain, q, k, v, start, sizes)
        assert rms_ratio(drive_on(mixed, q, k, v, start, sizes), expected) < 1e-5
        mark = mark or (plain.cache.mark(), mixed.cache.mark())
        scattered(mixed, start)
        mixed.cache.check()
    for attention, at in zip((plain, mixed), mark, strict=True):
        attention.cache.rewind(at)
        attention.cache.check()
    sizes = [1, 149]
    assert rms_ratio(drive_on(mixed, q, k, v, 250, sizes), drive_on(plain, q, k, v, 250, sizes)) < 1e-5


def test_reach_arithmetic_against_its_definition():
    for kv, sink_size, tokens in (("int4", 20, 70), ("int4", 3, 1), ("fp32", 40, 33), ("k5v3", 16, 16), ("fp32", 0, 5)):
        fmt = PageFormat(kv, PAGE, DIM)
        reach = Reach(tokens, sink_size, fmt)
        most = 0
        for seq_len in range(400):
            seen = [p for p in range(seq_len) if p < sink_size or p > seq_len - tokens]
            pages = {p // PAGE - fmt.sink_pages for p in seen} & set(range(fmt.pooled_pages(seq_len)))
            kept = {p for begin, end in reach.kept(0, fmt.pooled_pages(seq_len), seq_len) for p in range(begin, end)}
            assert pages <= kept and len(kept - pages) <= 1, (seq_len, pages, kept)
            assert reach.held_pages(seq_len) == len(kept)
            most = max(most, len(kept))
        assert most <= reach.most_pages(400, marks=0) <= most + 2


def test_the_spec_counts_what_the_cache_holds():
    attention = reaching("int4", 500, device_pages=7)
    spec = attention.cache.spec
    assert attention.cache.nbytes() == {**spec.device_bytes(), **spec.host_bytes()}
    everything = dataclasses.replace(spec, reaches=())
    assert spec.device_pages + spec.host_pages < everything.device_pages + everything.host_pages
    assert spec.filled_bytes(500) < everything.filled_bytes(500)
    assert spec.bytes_per_token * 7 == everything.bytes_per_token


def test_all_heads_reaching_everything_is_the_dense_cache():
    n = 333
    q, k, v = random_tokens(n)
    explicit = reaching("k5v3", n, reaches=((ALL_TOKENS,) * 4, (ALL_TOKENS,) * 4))
    outs = [
        drive(a, q, k, v, [100, 1, 64, 1, 167])
        for a in (explicit, make("full", "k5v3", n, cpu_kernels(), page_size=PAGE, scratch_tokens=160))
    ]
    assert torch.equal(*outs)
