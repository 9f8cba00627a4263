"""How a text is cut into chunks, and which of them are read sparsely."""

import random

import pytest

from longrun.engine.chunks import chunk_lengths, sparse_positions
from longrun.specs.prefill_spec import TILE, PrefillSpec

SPEC = PrefillSpec(dense_tokens=1000, dense_end=300)


def cut(start, count, chunk_size=400, spec=SPEC):
    return list(chunk_lengths(start, count, chunk_size, sparse_positions(spec, start + count)))


def test_by_hand():
    assert cut(0, 3000) == [(400, False)] * 3 + [(400, True)] * 3 + [(300, True), (300, False)]
    assert cut(1000, 2500) == [(400, True)] * 5 + [(200, True), (300, False)]
    assert cut(990, 1000) == [(400, False), (300, True), (300, False)]
    from_the_first = PrefillSpec(dense_tokens=0, dense_end=300)
    assert cut(0, 1500, spec=from_the_first) == [(400, False), (400, True), (400, True), (300, False)]
    assert cut(5000, 300) == [(300, False)]
    assert cut(5000, 300 + TILE) == [(TILE, True), (300, False)]
    assert cut(5000, 300 + TILE - 1) == [(400, False), (27, False)]  # less than a tile
    assert cut(5000, 400 + 300 + 50) == [(400, True), (350, False)]
    assert cut(0, 3000, 800, PrefillSpec(dense_tokens=0, dense_end=300))[:2] == [(800, False), (800, True)]  # no past
    assert cut(5000, 1000, 1) == [(1, False)] * 1000  # decode steps
    assert list(chunk_lengths(5000, 401, 400, range(1000, 9000))) == [(400, True), (1, False)]
    assert cut(5000, 1000, 64) == [(64, True)] * 9 + [(64, False)] * 6 + [(40, False)]


@pytest.mark.parametrize("seed", range(20))
def test_any_cut(seed):
    draw = random.Random(seed)
    for _ in range(100):
        start, count, size = draw.randint(0, 3000), draw.randint(1, 3000), draw.randint(1, 900)
        spec = PrefillSpec(dense_tokens=draw.randint(0, 2500), dense_end=draw.randint(1, 1200))
        at, found = start, cut(start, count, size, spec)
        for length, sparse in found:
            assert 0 < length <= size
            inside = length > 1 and max(1, spec.dense_tokens) <= at and at + TILE <= start + count - spec.dense_end
            assert sparse == inside
            assert not sparse or at + length <= start + count - spec.dense_end
            at += length
        assert at == start + count
        if not any(sparse for _, sparse in found):
            assert [length for length, _ in found] == [size] * (count // size) + [count % size] * (count % size > 0)
        assert list(chunk_lengths(start, count, size)) == [(n, False) for n, _ in chunk_lengths(0, count, size)]
