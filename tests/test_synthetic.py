"""Synthetic caches: they keep the rules of the cache, hold the same content wherever pages stand, and are not saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.cache.dual import DualCache
from longrun.cache.spans import DEVICE, HOST
from longrun.errors import ContextFullError, InputError, SessionError
from longrun.lab.synthetic_cache import distinct_pages, fill_synthetic
from longrun.lab.synthetic_session import make_synthetic
from longrun.patterns.head_map import HeadMap
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages
from longrun.specs.cache_spec import CacheSpec

CPU = torch.device("cpu")


def make_cache(name: str, capacity: int, device_share: float = 1.0, heads: tuple[int, ...] = (2, 0, 3)) -> DualCache:
    fmt = PageFormat(name, 16, 32)
    on_device = int(fmt.pooled_pages(capacity) * device_share)
    fetch = 6 if on_device < fmt.pooled_pages(capacity) else 0
    return DualCache(CacheSpec(heads, 3, fmt, capacity, 8, 24, on_device, fetch), CPU)


def appended(capacity: int, seq_len: int, device_share: float, name: str = "int4") -> DualCache:
    """A cache that took its tokens by `append`, as a model gives them."""
    cache = make_cache(name, capacity, device_share)
    k = torch.randn(3, seq_len, 32, generator=torch.Generator().manual_seed(1))
    for layer_idx in range(3):
        cache.append(layer_idx, k, k, 0)
    cache.advance(seq_len)
    return cache


@pytest.mark.parametrize("device_share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("seq_len", [1, 16, 17, 32, 33, 700, 1000])
@pytest.mark.parametrize("name", ["int4", "k5v3", "bf16", "fp32"])
def test_pages_stand_where_appending_would_have_put_them(name, seq_len, device_share):
    real, made = appended(1000, seq_len, device_share, name), make_cache(name, 1000, device_share)
    fill_synthetic(made, seq_len, seed=3)
    made.check()
    assert made.seq_len == seq_len
    assert made.device_pool.num_used == real.device_pool.num_used
    assert made.host_pool.num_used == real.host_pool.num_used
    for (pages, ring), (real_pages, _) in zip(made.layers, real.layers, strict=True):
        if pages is not None:
            assert pages.num_pooled == real_pages.num_pooled
            assert [pages.num_pages(at) for at in (HOST, DEVICE)] == [real_pages.num_pages(at) for at in (HOST, DEVICE)]
        if ring is not None:
            assert ring.k.float().std() > 0.3


def pooled(cache: DualCache, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages = cache.layers[layer_idx][0]
    return pages.places.read(slice(None), np.arange(pages.num_pooled)), pages.index[:, : pages.num_pooled]


def test_content_depends_on_seed_layer_head_and_page_and_on_nothing_else():
    wide, split, longer, other = (
        make_cache("int4", capacity, share) for capacity, share in ((1000, 1.0), (1200, 0.3), (3000, 0.9), (1000, 1.0))
    )
    for cache, seq_len, seed in ((wide, 1000, 5), (split, 1000, 5), (longer, 2900, 5), (other, 1000, 6)):
        fill_synthetic(cache, seq_len, seed)
    assert split.layers[0][0].num_pages(HOST) > 0
    for layer_idx in (0, 2):
        payload, index = pooled(wide, layer_idx)
        for cache in (split, longer):
            found, found_index = pooled(cache, layer_idx)
            assert torch.equal(found[:, : payload.shape[1]], payload)
            assert torch.equal(found_index[:, : payload.shape[1]], index)
        assert not torch.equal(pooled(other, layer_idx)[0], payload)
        assert len(payload.flatten(0, 1).unique(dim=0)) > 0.9 * payload[..., 0].numel()  # hardly a page twice
    assert not torch.equal(pooled(wide, 0)[0][0], pooled(wide, 2)[0][0])
    for name, tensor in wide.state().items():
        assert torch.equal(tensor, split.state()[name])


def test_numbers_are_finite_and_of_moderate_size():
    cache = make_cache("int4", 2000)
    fill_synthetic(cache, 2000)
    payload, index = pooled(cache, 2)
    k, v = decode_pages(payload, index, cache.spec.page_format)
    for x, most in ((k, 2.0), (v, 1.2)):
        assert x.isfinite().all() and x.abs().max() < most and abs(x.mean()) < 0.05 and x.std() > 0.2
    assert all(tensor.isfinite().all() and 0.4 < tensor.float().std() < 0.6 for tensor in cache.state().values())


def test_a_pool_whose_free_slots_are_in_disorder_is_filled_as_well():
    plain, used = make_cache("int4", 1000, 0.5), make_cache("int4", 1000, 0.5)
    for pool in (used.device_pool, used.host_pool):
        slots = pool.allocate(pool.num_slots)
        pool.release(slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))])
    fill_synthetic(plain, 900)
    fill_synthetic(used, 900)
    used.check()
    assert torch.equal(pooled(plain, 2)[0], pooled(used, 2)[0])
    assert not torch.equal(plain.layers[2][0].places.table, used.layers[2][0].places.table)


def test_the_library_of_pages_stays_small():
    assert distinct_pages(PageFormat("int4", 64, 128)) == 4096
    assert distinct_pages(PageFormat("fp32", 256, 128)) * PageFormat("fp32", 256, 128).page_bytes <= 128 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    save_tiny(folder, "llama", head_dim=32, max_position_embeddings=4096)
    return folder


def load(model, device_share=1.0):
    head_map = HeadMap.uniform(3, 3, 0.5, sink_size=8, recent_size=32)
    return longrun.load(
        model, "cpu", head_map, device="cpu", ctx=2000, retrieval_ratio=0.5, device_share=device_share
    )  # fmt: skip


def test_an_offloaded_session_decodes_what_a_resident_one_does(model):
    tokens, logits = [], []
    for device_share in (1.0, 0.3):
        session = load(model, device_share).new_session()
        make_synthetic(session, 1800, seed=2)
        assert session.seq_len == session.num_tokens == 1800
        assert (session.cache.host_pool.num_used > 0) == (device_share < 1)
        logits.append(session.logits.clone())
        tokens.append(list(session.generate(80, eos=False)))
        session.cache.check()
    assert tokens[0] == tokens[1]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert len(set(tokens[0])) > 1


def test_pages_matter_to_what_is_decoded(model):
    """Otherwise equal tokens of an offloaded and a resident session would prove nothing."""
    session = load(model).new_session()
    make_synthetic(session, 1800, seed=2)
    mark = session.mark()
    before = session.prefill([5]).clone()
    session.rewind(mark)
    session.cache.device_pool.storage.random_(0, 16)
    for pages, _ in session.cache.layers:
        pages.index.uniform_(-1, 1)
    assert (session.prefill([5]) - before).abs().max() > 1e-2


def test_a_synthetic_session_is_never_saved(model, tmp_path):
    session = load(model).new_session()
    session.attach(tmp_path / "attached")
    make_synthetic(session, 500)
    session.prefill([1, 2, 3])
    for save in (session.save, session.attach):
        with pytest.raises(SessionError, match="synthetic"):
            save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    real = load(model).new_session()
    real.prefill([1, 2, 3])
    real.save(tmp_path / "real")


def test_sessions_that_cannot_be_made_synthetic(model):
    session = load(model).new_session()
    with pytest.raises(InputError, match="at least 2"):
        make_synthetic(session, 1)
    with pytest.raises(ContextFullError, match="2,001"):
        make_synthetic(session, 2001)
    session.prefill([1, 2])
    with pytest.raises(InputError, match="holds 2 tokens"):
        make_synthetic(session, 100)
