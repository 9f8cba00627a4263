"""How a text is cut into the chunks of its forward passes."""

from __future__ import annotations

from collections.abc import Iterator

from longrun.specs.prefill_spec import TILE, PrefillSpec

NOWHERE = range(0)


def sparse_positions(spec: PrefillSpec, stop: int) -> range:
    """Positions at which chunks of a document that ends at `stop` may be read sparsely: those that have a past."""
    return range(max(1, spec.dense_tokens), stop - spec.dense_end)


def chunk_lengths(start: int, count: int, chunk_size: int, sparse: range = NOWHERE) -> Iterator[tuple[int, bool]]:
    """Lengths of consecutive chunks, and whether each is read sparsely.

    A chunk that begins in `sparse` is, and ends with it; one that begins elsewhere is as long as it may be, so that
    texts without a sparse chunk are cut as if there was no such thing. A rest of less than a tile is not worth it, and
    a chunk of one token is a decode step, which reads everything.

    Args:
        start: position of the first of `count` tokens.
        sparse: positions, with steps of 1.
    """
    stop = start + count
    while start < stop:
        is_sparse = sparse.start <= start <= sparse.stop - TILE
        size = min(chunk_size, (min(stop, sparse.stop) if is_sparse else stop) - start)
        yield size, is_sparse and size > 1
        start += size
