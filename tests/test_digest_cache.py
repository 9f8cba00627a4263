"""Digests in the cache: planned byte by byte, and those of the stored pages whatever has happened to these."""

import dataclasses

import pytest
import torch
from test_store import mixed_map, token_ids
from tiny_models import save_tiny

import longrun
from longrun.cache.dual import DualCache
from longrun.cache.page_movers import KernelPageMover, TorchPageMover
from longrun.kernels.page_copy import copy_pages_reference
from longrun.kernels.page_digest import digest_pages_reference
from longrun.kernels.page_store import reference_store_pages
from longrun.lab.synthetic_cache import fill_synthetic
from longrun.plan.budget import Budget
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.session.manifest import Manifest
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.reach import ALL_TOKENS

CPU, DIM, HEADS, CAPACITY = torch.device("cpu"), 64, (2, 0, 3), 1500
KERNELS = KernelPageMover(reference_store_pages, copy_pages_reference, digest_pages_reference, on_gpu=False)
MOVERS = {"torch": TorchPageMover(), "kernels": KERNELS}


def make(name="k5v3", share=0.4, mover="torch", reaches=(), page_size=16, **changes):
    fmt = PageFormat(name, page_size, DIM)
    spec = CacheSpec(
        HEADS, 3, fmt, CAPACITY, 8, 24, int(fmt.pooled_pages(CAPACITY) * share), 6, reaches,
        digest=DigestFormat(page_size, DIM),
    )  # fmt: skip
    cache = DualCache(dataclasses.replace(spec, **changes), CPU, MOVERS[mover])
    for pages, _ in cache.layers:
        if pages is not None:
            pages.digest.fill_(0xFF)  # scales of NaN
    return cache


def feed(cache, count, seed=0, in_place=False):
    """Append tokens; `in_place` as decode does, which flushes full tails and writes into them."""
    g = torch.Generator().manual_seed(seed)
    for layer_idx, (pages, _) in enumerate(cache.layers):
        k, v = torch.randn(2, 3, count, DIM, generator=g)
        if not in_place:
            cache.append(layer_idx, k, v, cache.seq_len)
        elif pages is not None:
            pages.make_room(cache.seq_len)
            slot = cache.place_of(cache.seq_len).tail_slot
            pages.tail_k[:, slot], pages.tail_v[:, slot] = k[: pages.num_heads, 0], v[: pages.num_heads, 0]
    cache.advance(count)


def test_the_check_finds_a_digest_that_is_not_the_pages():
    cache = make()
    feed(cache, 700)
    cache.check()
    cache.layers[2][0].digest[1, 5, 3] ^= 1
    with pytest.raises(AssertionError, match="digest"):
        cache.check()


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("name", ["int4", "k5v3"])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_every_sequence_of_steps_leaves_the_digests_of_the_stored_pages(name, share, mover):
    cache = make(name, share, mover)
    feed(cache, 17)
    feed(cache, 400, 1)
    mark = cache.mark()
    for step in range(40):
        feed(cache, 1, 2 + step, in_place=True)
    cache.check()
    for pages, _ in cache.layers:
        if pages is not None:
            pages.begin_spill(cache.seq_len + 300)
    feed(cache, 300, 50)
    cache.check()
    later = [pages.digest.clone() for pages, _ in cache.layers if pages is not None]
    made = cache.layers[0][0].num_pooled
    assert all((digest[:, made:] == 0xFF).all() for digest in later)  # of pages to come nothing is written
    cache.rewind(mark)
    cache.check()
    feed(cache, 500, 60)
    cache.check()
    for before, pages in zip(later, [pages for pages, _ in cache.layers if pages is not None], strict=True):
        first = pages.fmt.pooled_pages(417)
        assert torch.equal(before[:, :first], pages.digest[:, :first])
        assert not torch.equal(before[:, first], pages.digest[:, first])


def test_pages_that_move_and_pages_that_are_dropped():
    cache = make("k5v3", 1.0, reaches=((ALL_TOKENS, 200), (), (130, 90, 64)), page_size=16)
    feed(cache, 300)
    mark = cache.mark()
    for step in range(12):
        feed(cache, 37, 1 + step)
        cache.check()
    cache.rewind(mark)
    cache.check()
    feed(cache, 600, 20)
    cache.check()
    moving = make("int4", 0.4)
    feed(moving, 1000)
    moving.layers[2][0].places.move(1, [30, 31, 32], to_host=True)
    moving.layers[2][0].places.move(1, [0, 2], to_host=False)
    moving.check()
    feed(moving, 200, 1)
    moving.check()


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_synthetic_pages_have_digests(share):
    cache = make("k5v3", share)
    fill_synthetic(cache, 1234)
    cache.check()
    assert all((pages.digest[:, : pages.num_pooled] != 0xFF).any(-1).all() for pages, _ in cache.layers if pages)


@pytest.mark.parametrize("mover", MOVERS)
def test_digests_have_their_bytes_in_the_spec(mover):
    cache = make(mover=mover)
    spec, digest = cache.spec, cache.spec.digest
    by_hand = 5 * spec.pages_per_head * digest.page_bytes
    assert cache.nbytes() == {**spec.device_bytes(), **spec.host_bytes()}
    assert spec.device_bytes()["page digests"] == by_hand == sum(spec.digest_tensors)
    without = dataclasses.replace(spec, digest=None)
    assert spec.total_bytes - without.total_bytes == by_hand and spec.kv_bytes == without.kv_bytes
    assert DualCache(without, CPU).layers[0][0].digest is None
    assert list(spec.page_tensors)[:2] == [spec.index_tensors[0], spec.digest_tensors[0]]


BUDGET = Budget(device_bytes=10**9, host_bytes=10**8, weight_format="fp32", chunk_size=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests") / "model"
    save_tiny(folder, "llama", head_dim=DIM, max_position_embeddings=2048)
    return folder


def load(model, pages_per_head=None, **options):
    settings = {"device": "cpu", "ctx": CAPACITY, "head_map": mixed_map(), "device_share": 0.5, **options}
    budget = BUDGET.override(pages_per_head=pages_per_head, select_from=None if pages_per_head is None else 0)
    return longrun.load(model, budget, **settings)


@pytest.mark.parametrize("compiled_kernels", [True, False])
def test_a_session_is_saved_without_digests_and_loaded_with_or_without_them(model, tmp_path, compiled_kernels):
    plain, selecting = (load(model, n, compiled_kernels=compiled_kernels) for n in (None, 6))
    assert plain.plan.cache.digest is None and selecting.plan.cache.digest == DigestFormat(64, DIM)
    with_digests = {item.name: item.bytes for item in selecting.plan.items}
    assert with_digests["page digests"] == 4 * selecting.plan.cache.pages_per_head * DigestFormat(64, DIM).page_bytes
    ids, states = token_ids(1100), []
    for number, runtime in enumerate((plain, selecting)):
        session = runtime.new_session()
        session.prefill(ids)
        session.save(tmp_path / f"s{number}")
        session.cache.check()
        states.append(session.cache)
    for number, runtime in ((0, selecting), (1, plain), (1, selecting)):
        again = runtime.load_session(tmp_path / f"s{number}")
        again.cache.check()
        for (pages, _), (first, _) in zip(again.cache.layers, states[1].layers, strict=True):
            if pages is not None and pages.digest is not None:
                made = pages.num_pooled
                assert torch.equal(pages.digest[:, :made], first.digest[:, :made]) and made == 16
        again.prefill(ids[:200])
        again.cache.check()
    saved = [Manifest.read(tmp_path / f"s{n}").identity["selection"] for n in (0, 1)]
    assert saved == [
        None,
        {"pages_per_head": 6, "selector": "top", "lam": 0.25, "newest": 4, "share": 0.0, "select_from": 0},
    ]
    assert plain.identity == selecting.identity
    sizes = [sum(path.stat().st_size for path in (tmp_path / f"s{n}").glob("pages-*")) for n in (0, 1)]
    assert sizes[0] == sizes[1] > 0


def test_a_cache_that_never_has_more_pages_than_are_read_keeps_no_digests(model):
    assert load(model, 22).plan.cache.digest is None  # 1,500 tokens: 22 pages beside sink page and tail
    assert load(model, 21).plan.cache.digest is not None
