"""The workspace of sparse prefill, by hand, and the batches into which a chunk's tiles are cut."""

import pytest

from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.prefill_spec import PrefillSpec
from longrun.specs.tile_batches import LARGEST_BYTES, TileBatches

SPEC = PrefillSpec(cap=0.25, floor=16, rows=2)


def test_bytes_by_hand():
    """1,000 pages: rows of 1,024 float16 scores, lists of 250 int32, rounded up to 252; 300 tokens are three tiles."""
    batches = TileBatches(SPEC, num_heads=3, group=4, tokens=300, pages=1000)
    assert batches.tiles == 3 and batches.row_pages == 1024 and batches.list_pages == 252
    assert batches.tile_bytes == 4 * (2 * 2 * 1024 + 4 * 252)
    assert batches.workspace_bytes == 3 * 3 * batches.tile_bytes


def test_a_long_past_is_bounded():
    batches = TileBatches(SPEC, 8, 4, 32_768, 160_000)
    assert batches.tile_bytes * 256 > LARGEST_BYTES == batches.workspace_bytes
    assert TileBatches(SPEC, 8, 8, 32_768, 2**26).workspace_bytes == 8 * (2 * 2 * 2**26 + 2**26) > LARGEST_BYTES


@pytest.mark.parametrize("pages", [1, 60, 1000, 20_000, 160_000])
@pytest.mark.parametrize(("heads", "tokens"), [(8, 32_768), (3, 1), (5, 10_001)])
def test_batches_fit_and_are_even(pages, heads, tokens):
    batches = TileBatches(SPEC, heads, 4, tokens, pages)
    for room in (batches.workspace_bytes, batches.tile_bytes, 3 * batches.tile_bytes, LARGEST_BYTES):
        at_once, tiles = batches.sizes(room)
        assert 1 <= at_once <= heads and 1 <= tiles <= batches.tiles
        assert at_once * tiles * batches.tile_bytes <= room
        assert at_once == 1 or tiles == batches.tiles  # nothing is read twice that need not be
        most = room // batches.tile_bytes
        if most >= batches.tiles:
            assert -(-heads // at_once) == -(-heads // (most // batches.tiles))
        else:
            assert -(-batches.tiles // tiles) == -(-batches.tiles // most)


def test_a_shorter_past_never_needs_more():
    sizes = [TileBatches(SPEC, 8, 4, 4096, pages).workspace_bytes for pages in range(1, 3000)]
    assert sizes == sorted(sizes)


def test_attention_holds_it():
    shape = AttentionSpec(4096, 3, 12, 4, 64, 2, 300, 64, 256, num_layers=5, listed_pages=1000, prefill=SPEC)
    workspace = TileBatches(SPEC, 3, 3, 300, 1000).workspace_bytes
    assert shape.sparse_bytes() == workspace + 5 * 12 * 20
    assert shape.allocated_bytes() == shape.scratch_bytes() + shape.sparse_bytes()
    exact = AttentionSpec(4096, 3, 12, 4, 64, 2, 300, 64, 256, num_layers=5, listed_pages=1000)
    streaming = AttentionSpec(4096, 0, 12, 4, 64, 2, 300, 64, 256, num_layers=5, listed_pages=1000, prefill=SPEC)
    assert exact.sparse_bytes() == streaming.sparse_bytes() == 0
    assert streaming.activation_bytes() == exact.activation_bytes() < shape.activation_bytes()
