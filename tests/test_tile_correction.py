"""Tiles of a sparse read, corrected by their middle rows: against float64, with nothing to correct, and with an error
that is the same in a whole tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_case import ALL, BACKENDS, DIM, GROUP, KV_HEADS, make, random_tokens, read, rms_ratio, spied

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.specs import tile_batches
from longrun.specs.prefill_spec import TILE, PrefillSpec
from longrun.specs.reach import ALL_TOKENS

FEW = PrefillSpec(mass=0.8, newest=2, floor=4, least=0.1, cap=0.3, correct=True)
CHUNKS = [(300, False), (257, True), (128, True), (40, True), (467, True)]
LENGTH = sum(size for size, _ in CHUNKS)
SHAPE = {"kv": "k5v3", "device_share": 0.4}


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_everything_chosen_nothing_is_corrected(backend):
    tokens = random_tokens(LENGTH, layers=2)
    shape = {**SHAPE, "reaches": ((ALL_TOKENS,) * 3, (ALL_TOKENS,))}
    out = read(make(backend, replace(ALL, correct=True), LENGTH, **shape), *tokens, CHUNKS)
    dense = read(make(backend, None, LENGTH, **shape), *tokens, [(size, False) for size, _ in CHUNKS])
    assert rms_ratio(out, dense) < 2e-6


@pytest.mark.parametrize("workspace", [None, 1_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_of_a_whole_tile_is_removed(monkeypatch, backend, workspace):
    """Reading adds a number of its own to each tile and channel; tiles of no more than 64 queries keep it."""
    if workspace is not None:
        monkeypatch.setattr(tile_batches, "LARGEST_BYTES", workspace)
    tokens = random_tokens(LENGTH)
    attention = make(backend, replace(ALL, correct=True), LENGTH, **SHAPE)
    kernels, generator = attention.sparse._kernels, torch.Generator().manual_seed(3)

    def attend(q, k, v, lists, counts, first_page, total, lse, *args, **kwargs):
        kernels.attend_tiles_(q, k, v, lists, counts, first_page, total, lse, *args, **kwargs)
        if first_page + k.shape[1] // kwargs["page_size"] == counts.max():  # the last piece: all pages are chosen
            for tile in total.split(TILE, dim=2):
                tile += torch.randn(*tile.shape[:2], 1, DIM, generator=generator)

    attention.sparse._kernels = replace(kernels, attend_tiles_=attend)
    out = read(attention, *tokens, CHUNKS)
    dense = read(make(backend, None, LENGTH, **SHAPE), *tokens, [(size, False) for size, _ in CHUNKS])
    corrected = torch.ones(LENGTH, dtype=torch.bool)
    for first, size in ((300, 257), (685, 40)):
        corrected[first + size // TILE * TILE : first + size] = False
    assert rms_ratio(out[:, corrected], dense[:, corrected]) < 5e-6
    assert rms_ratio(out[:, ~corrected, : 3 * GROUP], dense[:, ~corrected, : 3 * GROUP]) > 0.5


def test_the_definition():
    """float64: attention to the listed pages, and for each tile what its middle row differs by from all keys."""
    q, k, v = random_tokens(LENGTH)
    q *= 2
    heads = ((ALL_TOKENS,) * KV_HEADS,)
    attention = make("torch", FEW, LENGTH, "fp32", reaches=heads)
    chosen = spied(attention)
    out = read(attention, q, k, v, CHUNKS)
    start, changed = 300, 0
    for (size, _), (_, _, lists, _) in zip(CHUNKS[1:], chosen, strict=True):
        tiles, pooled = -(-size // TILE), (start - 1) // 16 * 16  # a full tail stays until its room is needed
        positions = torch.arange(start + size)
        for number, listed in enumerate(lists):
            head, tile = divmod(number, tiles)
            own = positions[start:][tile * TILE : (tile + 1) * TILE]
            causal = positions[None] <= own[:, None]
            seen = causal & ((positions >= pooled) | torch.isin(positions // 16, torch.tensor(listed)))
            scores = q[0, own, head].double() @ k[0, : start + size, head // GROUP].double().T / DIM**0.5
            dense, sparse = (
                scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[0, : start + size, head // GROUP].double()
                for mask in (causal, seen)
            )
            if len(own) > TILE // 2:
                sparse = sparse + (dense - sparse)[TILE // 2]
                changed += 1
            assert rms_ratio(out[0, own, head], sparse) < 5e-6
        start += size
    assert changed == KV_HEADS * GROUP * (2 + 1 + 0 + 4)
    counts = attention.sparse.levels.counts()
    assert counts.rows == ((2 + 1 + 0 + 4,) * KV_HEADS * GROUP,)


def test_it_is_planned():
    plain, correcting = (make("torch", replace(FEW, correct=wanted), 900).spec for wanted in (False, True))
    tiles = 3 * GROUP * -(-900 // TILE)
    assert correcting.activation_bytes() - plain.activation_bytes() >= 5 * 4 * tiles * DIM
    assert correcting.sparse_bytes() == plain.sparse_bytes()
