"""A chunk's attention to chosen pages, through both backends: when that is dense attention, what it is else, what is
chosen in any case, steering and counts."""

import json
from dataclasses import replace

import pytest
import torch
from allocation_peak import allocation_peak
from sparse_case import ALL, BACKENDS, DIM, GROUP, KV_HEADS, make, random_tokens, read, rms_ratio, spied

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.attention.interface import Step
from longrun.attention.sparse_past import tile_means
from longrun.attention.tile_levels import LEAST_LEFT, TileLevels
from longrun.kernels.tile_attention import TILE as KERNELS_TILE
from longrun.specs import tile_batches
from longrun.specs.prefill_spec import TILE, PrefillSpec
from longrun.specs.reach import ALL_TOKENS

FEW = PrefillSpec(mass=0.8, newest=2, floor=4, least=0.1, cap=0.5)
CHUNKS = [(300, False), (257, True), (128, True), (131, True), (260, True)]
LENGTH = sum(size for size, _ in CHUNKS)


def test_the_tile_is_the_kernels_own():
    assert TILE == KERNELS_TILE == 128


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kv", "device_share"), [("fp32", 1.0), ("int4", 1.0), ("int4", 0.4), ("int4", 0.0), ("k5v3", 0.4)]
)
def test_everything_chosen_is_dense_attention(backend, kv, device_share, rows):
    if backend == "cuda" and kv == "fp32":
        pytest.skip("the GPU's kernels serve quantized pages")
    tokens = random_tokens(LENGTH, layers=2)
    shape = {"kv": kv, "device_share": device_share, "reaches": ((ALL_TOKENS,) * 3, (ALL_TOKENS,))}
    sparse = make(backend, replace(ALL, rows=rows), LENGTH, **shape)
    chosen = spied(sparse)
    out = read(sparse, *tokens, CHUNKS)
    dense = read(make(backend, None, LENGTH, **shape), *tokens, [(size, False) for size, _ in CHUNKS])
    assert rms_ratio(out, dense) < 2e-6
    assert len(chosen) == 8 and all(row == list(range(pages)) for pages, _, lists, _ in chosen for row in lists)
    counts = sparse.sparse.levels.counts()
    assert counts.read_share == 1 and counts.caught_share == pytest.approx(1, abs=1e-5)


def test_bf16_is_dense_attention_up_to_rounding():
    tokens = [x.bfloat16() for x in random_tokens(LENGTH)]
    shape = {"kv": "k5v3", "dtype": torch.bfloat16}
    out = read(make("cuda", ALL, LENGTH, **shape), *tokens, CHUNKS)
    dense = read(make("cuda", None, LENGTH, **shape), *tokens, [(size, False) for size, _ in CHUNKS])
    assert rms_ratio(out, dense) < 4e-3


def by_lists(q, k, v, start, size, page_size, lists):
    """The definition: float64 softmax of a chunk's queries over exact keys that a mask shows: the chunk itself, the
    tail, and the pages on each tile's list. Pages of fp32 begin with the first token."""
    pooled = (start - 1) // page_size * page_size  # a full tail stays until its room is needed
    out = torch.empty(size, *q.shape[2:], dtype=torch.float64)
    tiles = -(-size // TILE)
    positions = torch.arange(start + size)
    for head in range(q.shape[2]):
        kv = head // GROUP
        visible = positions[None] <= positions[start:, None]
        for tile in range(tiles):
            of_page = positions[:pooled] // page_size
            listed = torch.isin(of_page, torch.tensor(lists[head * tiles + tile]))
            visible[tile * TILE : (tile + 1) * TILE, :pooled] = listed
        scores = q[0, start : start + size, head].double() @ k[0, : start + size, kv].double().T / DIM**0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[:, head] = weights @ v[0, : start + size, kv].double()
    return out


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("page_size", [16, 64])
def test_attention_to_what_was_chosen(page_size, rows):
    """Lists are as short and as long as they may be, hold the newest pages and leave what may be left; attention is
    what a mask makes of them. What any tile reads is its own choice."""
    q, k, v = random_tokens(LENGTH)
    q *= 2  # peaked
    heads = ((ALL_TOKENS,) * KV_HEADS,)
    attention = make("torch", replace(FEW, rows=rows), LENGTH, "fp32", page_size=page_size, reaches=heads)
    chosen = spied(attention)
    out = read(attention, q, k, v, CHUNKS)
    start, lengths = 300, set()
    for (size, _), (pages, (floor, cap, newest, left), lists, missed) in zip(CHUNKS[1:], chosen, strict=True):
        assert (pages, newest) == ((start - 1) // page_size, 2)
        assert (floor, cap) == (min(pages, max(4, int(0.1 * pages))), min(pages, max(4, int(0.5 * pages))))
        for row, may, is_missed in zip(lists, left.tolist(), missed.tolist(), strict=True):
            assert {pages - 2, pages - 1} <= set(row) <= set(range(pages)) and row == sorted(set(row))
            assert floor <= len(row) <= cap and (len(row) == cap or is_missed <= may)
            lengths.add(len(row))
        expected = by_lists(q, k, v, start, size, page_size, lists)
        assert rms_ratio(out[0, start : start + size], expected) < 2e-6
        start += size
    assert len(lengths) > 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("workspace", "heads", "tiles"), [(4_000, [2, 1], [5]), (1_000, [1, 1, 1], [3, 2])])
def test_batches_are_one_batch(monkeypatch, backend, workspace, heads, tiles):
    """Of a workspace for some KV heads, and for some tiles of a single one; a tile and KV head needs 320 bytes."""
    tokens = random_tokens(900)
    chunks = [(300, False), (600, True)]
    whole = make(backend, FEW, 900)
    chosen = spied(whole)
    out = read(whole, *tokens, chunks)
    monkeypatch.setattr(tile_batches, "LARGEST_BYTES", workspace)
    cut = make(backend, FEW, 900)
    assert cut.sparse.nbytes < whole.sparse.nbytes
    chosen_cut = spied(cut)
    assert rms_ratio(read(cut, *tokens, chunks), out) < 2e-6
    ((_, _, expected, _),) = chosen
    expected, calls = torch.arange(len(expected)).view(3, GROUP, 5), iter(chosen_cut)
    for part in torch.arange(3).split(heads):
        for some in torch.arange(5).split(tiles):
            numbers = expected[part][:, :, some].flatten()
            assert next(calls)[2] == [chosen[0][2][number] for number in numbers]
    assert next(calls, None) is None
    counts, one = cut.sparse.levels.counts(), whole.sparse.levels.counts()
    assert (counts.read, counts.pages, counts.rows) == (one.read, one.pages, one.rows)
    assert torch.tensor(counts.caught).allclose(torch.tensor(one.caught), atol=1e-5)
    assert torch.allclose(cut.sparse.levels.left, whole.sparse.levels.left, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device_share", [1.0, 0.4])
@pytest.mark.parametrize("at", [3, 20, 41])
def test_a_page_that_gets_much_attention_is_always_chosen(backend, device_share, at):
    """A planted key that all queries of one head look for, in either pool, under a cap of a few pages."""
    q, k, v = random_tokens(1000)
    q[0, 700:, 2] = torch.where(torch.arange(DIM) % 2 == 0, 1.0, -1.0)
    k[0, 16 * (at + 1) + 5, 1] = 2 * q[0, 700, 2]  # page 0 is the sinks'
    spec = PrefillSpec(mass=0.9, newest=1, floor=2, cap=0.05)
    sparse, dense = (make(backend, some, 1000, device_share=device_share) for some in (spec, None))
    chosen = spied(sparse)
    out = read(sparse, q, k, v, [(700, False), (300, True)])
    expected = read(dense, q, k, v, [(700, False), (300, False)])
    ((pages, _, lists, _),) = chosen
    assert pages == 42 and all(len(row) == 2 for row in lists)
    assert all(at in lists[2 * 3 + tile] for tile in range(3))
    assert rms_ratio(out[0, 700:, 2], expected[0, 700:, 2]) < 1e-3
    assert rms_ratio(out[0, 700:, 3], expected[0, 700:, 3]) > 0.1  # of the same KV head, and looks at nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_newest_pages_are_read_wherever_they_stand(backend):
    """Pages were moved, the newest ones to the host, whose pages are read first: entries are no page numbers."""
    q, k, v = random_tokens(1000)
    q *= 2
    spec, chunks = PrefillSpec(mass=0.9, newest=3, floor=4, cap=0.1), [(700, False), (300, True)]
    outs, lists = [], []
    for moved in (False, True):
        attention = make(backend, spec, 1000, device_share=0.6)
        read(attention, q, k, v, chunks[:1])
        pages, _ = attention.cache.layers[0]
        if moved:
            for head in range(3):
                pages.places.move(head, [30 + head, 40, 41], to_host=True)
                pages.places.move(head, [0, 1], to_host=False)
        chosen = spied(attention)
        outs.append(read(attention, q, k, v, chunks[1:], start=700)[:, 700:])
        lists.append(chosen[0][2])
    assert all({39, 40, 41} <= set(row) for found in lists for row in found)
    assert (lists[0] != lists[1]) == (backend == "cuda")  # the other one reads host pages where they stand
    assert rms_ratio(outs[1], outs[0]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_finite_reach_and_streaming_heads_are_untouched(backend):
    tokens = random_tokens(LENGTH, layers=2)
    reaches = ((ALL_TOKENS, ALL_TOKENS, 90), (200, 90))
    shape = {"reaches": reaches, "scratch": 256}
    sparse = make(backend, FEW, LENGTH, **shape)
    out = read(sparse, *tokens, CHUNKS)
    dense = read(make(backend, FEW, LENGTH, **shape), *tokens, [(size, False) for size, _ in CHUNKS])
    assert torch.equal(out[0, :, 4:], dense[0, :, 4:]) and torch.equal(out[1], dense[1])
    assert rms_ratio(out[0, 300:, :4], dense[0, 300:, :4]) > 0.05
    counts = sparse.sparse.levels.counts()
    assert all(counts.pages[0][:4]) and not any((*counts.pages[0][4:], *counts.pages[1], *counts.read[1]))


def test_counts_by_hand():
    """Two sparse chunks, pages of 16 behind a sink page, everything read: tiles times pages, and a dense row in every
    fourth tile."""
    tokens = random_tokens(1600)
    attention = make("torch", ALL, 1600)
    read(attention, *tokens, [(500, False), (1000, True), (100, True)])
    counts = attention.sparse.levels.counts()
    pages = 8 * (499 // 16 - 1) + 1 * (1499 // 16 - 1)
    assert counts.read == counts.pages == ((pages,) * 6 + (0, 0),)
    assert counts.rows == ((2 + 1,) * 6 + (0, 0),)
    assert counts.caught[0] == pytest.approx((3,) * 6 + (0, 0), abs=1e-4)
    assert counts.line() == "100.0% of the pages read, 100.0% of the attention caught"
    told = json.loads(json.dumps(counts.to_dict()))
    assert told["pages_read"] == told["pages"] == 6 * pages and told["read_by_head"] == [[1.0] * 6 + [None] * 2]
    attention.sparse.levels.reset()
    nothing = attention.sparse.levels.counts()
    assert nothing.line() == "nothing read sparsely" and nothing.read_share is None
    assert counts.since(nothing) == counts and counts.since(counts).rows == nothing.rows


def test_caught_attention_by_hand():
    """What the middle queries of every fourth tile find on their tile's pages, in float64."""
    q, k, v = random_tokens(1500)
    q *= 2
    attention = make("torch", FEW, 1500, "fp32", reaches=((ALL_TOKENS,) * KV_HEADS,))
    chosen = spied(attention)
    read(attention, q, k, v, [(500, False), (1000, True)])
    lists, caught = chosen[0][2], torch.zeros(KV_HEADS * GROUP, dtype=torch.float64)
    for head in range(KV_HEADS * GROUP):
        for tile in (0, 4):
            at = 500 + tile * TILE + TILE // 2
            weights = (k[0, : at + 1, head // GROUP].double() @ q[0, at, head].double() / DIM**0.5).softmax(0)
            pages = torch.arange(499 // 16 * 16) // 16
            unread = ~torch.isin(pages, torch.tensor(lists[head * 8 + tile]))
            caught[head] += 1 - weights[: len(pages)][unread].sum()
    found = attention.sparse.levels.counts()
    assert torch.tensor(found.caught[0], dtype=torch.float64).allclose(caught, atol=1e-5)
    assert 0.3 < found.caught_share < 0.95


def test_without_a_mass_nothing_is_left_and_nothing_steered():
    levels = TileLevels(None, 2, 4, torch.device("cpu"))
    levels.add(1, slice(1, 4), torch.full((3,), 7), 10, torch.tensor([0.0, 1.9, 2.0]), 2)
    assert not levels.left.any() and levels.counts().read_share == pytest.approx(0.7)


def test_levels_by_hand():
    levels = TileLevels(0.95, 2, 4, torch.device("cpu"))
    start = levels.left.clone()
    read = torch.zeros(3, dtype=torch.int64)
    levels.add(1, slice(1, 4), read, 10, torch.tensor([1.8, 1.9, 2.0]), 2)
    assert torch.equal(levels.left[0], start[0]) and levels.left[1, 0] == start[1, 0]
    assert levels.left[1, 1:].tolist() == pytest.approx([0.05 * 0.5**0.5, 0.05, 0.1], rel=1e-4)
    levels.add(1, slice(1, 4), read, 10, torch.tensor([0.0, 0.0, 2.0]), 0)  # without a row nothing is known
    assert levels.left[1, 3].item() == pytest.approx(0.1)
    for _ in range(20):
        levels.add(1, slice(1, 4), read, 10, torch.tensor([0.0, 1.0, 2.0]), 2)
    assert levels.left[1, 1:].tolist() == pytest.approx([LEAST_LEFT, LEAST_LEFT, 0.2])
    levels.begin()
    assert torch.equal(levels.left, start) and levels.counts().rows[1][1] == 42


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_fall_where_the_choice_catches_too_little(backend):
    """All queries of one head look for one key, but a tile's middle one for another, which the mean does not see."""
    q, k, v = random_tokens(1500)
    for rows, at in ((slice(1000, None), 100), (1064, 500)):
        q[0, rows, 0] = 4 * k[0, at, 0]
    attention = make(backend, PrefillSpec(mass=0.95, newest=1, floor=2, cap=0.2), 1500)
    left = attention.sparse.levels.left
    before = left[0].clone()
    read(attention, q, k, v, [(1000, False), (500, True)])
    counts = attention.sparse.levels.counts()
    assert counts.rows[0][0] == 1 and counts.caught[0][0] < 0.01
    assert left[0, 0] == before[0] / 2
    assert torch.equal(left[0, 6:], before[6:])  # streaming


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 127, 128, 129, 300, 512])
def test_means_by_hand(count, tokens):
    x = torch.randn(2, 3, 600, 5, generator=torch.Generator().manual_seed(1))[:, :, 50 : 50 + tokens]
    found = tile_means(x, count)
    tiles = -(-tokens // TILE)
    assert found.shape == (2, 3, tiles, count, 5)
    for tile in range(tiles):
        own = x[:, :, tile * TILE : (tile + 1) * TILE]
        for part in range(count):
            first = own.shape[2] * part // count
            stop = max(own.shape[2] * (part + 1) // count, first + 1)
            assert torch.allclose(found[:, :, tile, part], own[:, :, first:stop].mean(2), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_held_is_planned(backend):
    attention = make(backend, FEW, 900)
    assert attention.sparse.nbytes == attention.spec.sparse_bytes() > 0
    assert make(backend, None, 900).sparse is None
    assert make(backend, FEW, 900, reaches=((), ())).sparse is None


@pytest.fixture
def one_thread():
    """Of every thread torch's attention on a CPU has a scratch of its own, which no plan counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("start", "size", "page_size", "scratch", "rows"),
    [(6_000, 1000, 16, 2048, 1), (6_000, 1000, 16, 2048, 8), (3_000, 1300, 64, 4096, 8), (1_000, 2000, 64, 256, 1)],
)
def test_a_sparse_chunk_stays_within_the_planned_activations(
    one_thread, tmp_path, start, size, page_size, scratch, rows
):
    """Choosing, scoring, reading and the chunk itself are the most in turn."""
    shape = {"kv": "fp32", "page_size": page_size, "scratch": scratch, "reaches": ((ALL_TOKENS,) * KV_HEADS,)}
    attention = make("torch", PrefillSpec(rows=rows), start + size, chunk_size=max(size, 1000), **shape)
    tokens = random_tokens(start + size)
    read(attention, *tokens, [(1000, False)] * (start // 1000))
    given = [x[0, start:].clone() for x in tokens]
    step = Step(start, size, None, None, sparse=True)
    peak = allocation_peak(lambda: attention.run(0, *given, step), tmp_path)
    spec = attention.spec
    assert peak <= spec.activation_bytes()
    assert peak > 0.4 * spec.activation_bytes() > 0.4 * replace(spec, prefill=None).activation_bytes()
